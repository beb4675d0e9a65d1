"""The pool when things go wrong, with the real commands."""

import fcntl
import operator
import os
import signal
from collections import defaultdict
from functools import partial
from pathlib import Path

import psutil
import pytest
from commands import Forked
from conftest import Make
from launchers.commands import LONG, ROOT, SMALL, command, python, start, status_of, wait_for, wait_for_progress

from normlab import runs
from normlab.common.errors import UserError
from normlab.data.inventory import Inventory
from normlab.launchers import pool
from normlab.launchers.pool import Worker, packs_for
from normlab.launchers.sweep import Job


def planned(make: Make, *settings: str) -> Job:
    config = make(*settings)
    run = runs.Run(config.as_dict())
    run.freeze()
    return Job(config, run, Inventory(train_images=1000, test_images=100, classes=10, image_size=8))


def networks(*targets: str) -> list[str]:
    """The settings of small runs of several networks, in the order of their names in the sweep."""
    return [setting.replace("small.SmallNet", ",".join(targets)) for setting in SMALL]


def by_network(folder: Path) -> dict[str, list[str]]:
    """The states of the runs of each network."""
    found: dict[str, list[str]] = defaultdict(list)
    for run in runs.find(folder / "outputs" / "default"):
        found[runs.read_config(run)["model"]["target"]].append(status_of(run)["state"])
    return found


@pytest.mark.slow
def test_what_fails_for_want_of_memory_beside_others_is_tried_again_alone_and_a_bug_is_not(tmp_path) -> None:
    (tmp_path / "exiting.py").write_text(
        "import small, sys\nclass Exiting(small.SmallNet):\n    def forward(self, x):\n        sys.exit(3)\n"
    )
    arguments = (*networks("greedy.Alone", "greedy.Killed", "exiting.Exiting"), "seed=0,1", "hydra.launcher.slots=2")
    code, _, error = command(tmp_path, "train.py", "-m", *arguments)
    assert code == 1, error
    assert "does not fit into the memory" in error
    assert "its process was killed" in error
    assert "Tried again with a device of their own: 2" in error
    assert "2 of 6 runs failed." in error
    assert f"{runs.LOG}: SystemExit: 3" in error
    assert by_network(tmp_path) == {
        "greedy.Alone": ["done", "done"],
        "greedy.Killed": ["done", "done"],
        "exiting.Exiting": ["failed", "failed"],
    }
    [failed, _] = [run for run in runs.find(tmp_path / "outputs" / "default") if status_of(run)["state"] == "failed"]
    assert "in forward" in (failed / runs.LOG).read_text()


@pytest.mark.slow
def test_what_fails_alone_has_failed_is_listed_with_its_log_and_leaves_the_others(tmp_path) -> None:
    with (tmp_path / "greedy").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        arguments = (*networks("greedy.Alone", "greedy.Killed", "small.SmallNet"), "hydra.launcher.slots=1")
        code, _, error = command(tmp_path, "train.py", "-m", *arguments)
    assert code == 1
    assert "2 of 3 runs failed" in error
    assert "Traceback" not in error
    assert by_network(tmp_path) == {"greedy.Alone": ["failed"], "greedy.Killed": ["failed"], "small.SmallNet": ["done"]}
    for run in runs.find(tmp_path / "outputs" / "default"):
        why = (status_of(run).get("error") or "").split("\n")[0]
        assert (f", outputs/default/{run.name}/run.log: {why}" in error) is (status_of(run)["state"] == "failed")


class SpoiledFunction:
    """A function that no other process can unpickle."""

    def __reduce__(self) -> tuple[object, ...]:
        return int, ("spoiled",)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt("planted")


@pytest.mark.slow
def test_a_worker_that_fails_before_its_run_fails_that_run_alone(make, monkeypatch, capsys) -> None:
    jobs = [planned(make, "device=cpu", f"seed={seed}") for seed in range(5)]
    bad = {
        lambda *_: []: "Can't pickle",
        operator.index: "TypeError: ",
        interrupted: "KeyboardInterrupt: planted",
        SpoiledFunction(): "its process was killed",
    }
    functions = iter([*bad, pool._train_pack])  # the last worker's run is busy, which is no failure
    submit = Worker.submit
    monkeypatch.setattr(Worker, "submit", lambda worker, _, *rest: submit(worker, next(functions), *rest))
    with jobs[-1].run.lock():
        failed, elsewhere = pool.train_jobs(jobs, slots=1)
    printed = capsys.readouterr().err
    for job, (found, error), why in zip(jobs, failed, bad.values(), strict=False):
        assert found is job
        assert why in error
        assert job.status()["state"] == "failed"
        log = job.run.folder / runs.LOG
        assert f"{log}: {error}" in printed
        assert f" ERROR {error}\n" in log.read_text()
        assert ("Traceback (most recent call last)" in log.read_text()) is ("killed" not in why)
    assert len(failed) == 4
    assert elsewhere == jobs[-1:]


@pytest.mark.slow
def test_a_worker_that_trains_a_run_can_train_a_deterministic_one_next(tiny, monkeypatch) -> None:
    """cuBLAS reads the setting once, for the first run of a process."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)  # which the tests' process would hand down
    worker = Worker("cpu", 1)
    try:
        assert worker.submit(pool._train_pack, [tiny()], [""], "cpu", 1, 1).result()[0]["state"] == "done"
        assert worker.submit(os.getenv, "CUBLAS_WORKSPACE_CONFIG").result() == ":4096:8"
    finally:
        worker.close()


@pytest.mark.slow
def test_a_pack_that_was_killed_is_tried_again_run_by_run(tmp_path) -> None:
    arguments = (*networks("greedy.Killed"), "seed=0,1", "hydra.launcher.slots=1", "hydra.launcher.pack=2")
    code, _, error = command(tmp_path, "train.py", "-m", *arguments)
    assert code == 0, error
    assert "its process was killed" in error
    assert "Tried again with a device of their own: 2" in error
    assert by_network(tmp_path) == {"greedy.Killed": ["done", "done"]}


@pytest.mark.slow
def test_after_an_error_that_spoils_a_pack_all_that_is_left_of_it_is_tried_again_in_other_processes(tmp_path) -> None:
    targets = ("small.SmallNet", "greedy.Spoils", "greedy.SpoilsAlone")
    arguments = (*networks(*targets), "seed=0,1", "hydra.launcher.slots=1", "hydra.launcher.pack=2")
    code, _, error = command(tmp_path, "train.py", "-m", *arguments)
    assert code == 1, error
    assert "Traceback" not in error
    assert by_network(tmp_path) == {
        "small.SmallNet": ["done", "done"],
        "greedy.Spoils": ["done", "done"],
        "greedy.SpoilsAlone": ["failed", "failed"],
    }
    assert "2 of 6 runs failed." in error
    [_, failures] = error.split("Failed:")
    assert failures.count("device-side assert triggered") == 2
    assert "illegal memory access" in error.split("Failed:")[0]


@pytest.mark.slow
def test_a_packed_sweep_that_is_stopped_goes_on_in_one_process(tmp_path) -> None:
    arguments = ("-m", *networks("slow_net.SlowNet"), "seed=0,1", "hydra.launcher.slots=1", "hydra.launcher.pack=2")
    with python(tmp_path, ROOT / "train.py", *arguments, SLOW_SECONDS="0.2") as sweep:
        wait_for_progress(tmp_path)
        sweep.send_signal(signal.SIGINT)
        _, error = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, error
    found = runs.find(tmp_path / "outputs" / "default")
    assert {status_of(run)["state"] for run in found} == {"interrupted"}
    code, _, error = command(tmp_path, "train.py", *arguments)
    assert code == 0, error
    assert [status_of(run)["state"] for run in found] == ["done", "done"]
    assert len({status_of(run)["pid"] for run in found}) == 1


@pytest.mark.slow
def test_what_is_packed_together(make, tmp_path) -> None:
    """Runs of one process have its settings in common; streamed images and compiling keep to themselves."""

    job = partial(planned, make)
    common = [job(f"seed={seed}", f"norm={norm}") for seed in (0, 1) for norm in ("bn", "none")]
    half = job("precision=bf16")
    folder = ("dataset=image_folder", f"dataset.path={tmp_path}")
    stream, memory = job(*folder), job(*folder, "dataset.storage=memory")
    jobs = [*common, half, stream, memory, job("engine=compile")]
    found = packs_for(jobs, [Worker("cuda:0", 1, 8)])
    sets = sorted(sorted(jobs.index(job) for job in pack) for pack in found)
    assert sets == [[0, 1, 2, 3, 6], [4], [5], [7]]
    assert [len(pack) for pack in packs_for(jobs, [Worker("cpu", 1)])] == [1] * 8
    two = packs_for(common, [Worker("cuda:0", 1, 8), Worker("cuda:1", 1, 8)])
    assert [len(pack) for pack in two] == [2, 2]


def test_the_longest_runs_come_first(make) -> None:
    jobs = [planned(make, f"batch={batch}") for batch in (128, 8, 32)]
    assert [pack[0].config.batch for pack in packs_for(jobs, [Worker("cpu", 1)])] == [8, 32, 128]


@pytest.mark.parametrize("value", [0, "many"])
def test_a_wrong_number_of_runs_in_a_pack_is_a_sentence(make, value) -> None:
    with pytest.raises(UserError, match=f"hydra.launcher.pack={value} is out of range: expected 1 or more."):
        pool.train_jobs([planned(make, "device=cpu")], pack=value)


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(tmp_path) -> None:
    with start(tmp_path, "train.py", "-m", *LONG, "seed=0,1", "hydra.launcher.slots=1") as process:
        run = wait_for_progress(tmp_path)
        os.kill(status_of(run)["pid"], signal.SIGSTOP)  # it will not get round to its checkpoint
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert any("Once more stops at once." in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in error
    status = status_of(run)
    assert (status["state"], status["error"]) == ("interrupted", "stopped at once")


@pytest.mark.parametrize(
    ("mode", "number"),
    [((), signal.SIGINT), pytest.param(("-m",), signal.SIGHUP, marks=pytest.mark.slow)],
    ids=["Ctrl-C", "terminal closed"],
)
def test_a_signal_stops_a_command_and_its_run_can_go_on(tmp_path, mode, number) -> None:
    with start(tmp_path, "train.py", *mode, *LONG, new_session=True) as process:
        run = wait_for_progress(tmp_path)
        os.killpg(process.pid, number)  # as a terminal does, to launcher and workers
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "goes on from the last checkpoint" in error
    assert "Traceback" not in error
    assert "Error executing job" not in error  # Hydra's line, of what is no error
    assert status_of(run)["state"] == "interrupted"
    assert (run / "checkpoint.pt").exists()


@pytest.mark.slow
def test_an_interrupt_before_the_first_step_stops_a_sweep(tmp_path) -> None:
    def imports_torch(child: psutil.Process) -> bool:
        try:
            return any("libtorch" in mapped.path for mapped in child.memory_maps())
        except psutil.Error:  # it has ended
            return False

    with start(tmp_path, "train.py", "-m", *LONG) as process:
        launcher = psutil.Process(process.pid)
        wait_for(lambda: any(map(imports_torch, launcher.children())), "a worker that imports torch")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    found = runs.find(tmp_path / "outputs" / "default")  # none while networks are checked
    assert [status_of(run).get("state", "interrupted") for run in found] == ["interrupted"] * len(found)


@pytest.mark.slow
def test_a_sweep_started_twice_trains_each_run_once(tmp_path) -> None:
    arguments = ("-m", "norm=bn,affine,none", "batch=8,16", *SMALL, "hydra.launcher.slots=1")
    both = [Forked(tmp_path, "train.py", *arguments) for _ in range(2)]
    ended = [process.wait() for process in both]
    for status, _, error in ended:  # the first to end may leave one to the other
        assert status == ("other processes train them" in error), error
    assert 0 in (status for status, *_ in ended)
    found = runs.find(tmp_path / "outputs" / "default")
    assert len(found) == 6
    for run in found:
        assert status_of(run)["state"] == "done"
        assert [row["epoch"] for row in runs.read_metrics(run)[0]] == [1, 2]
        assert (run / "run.log").read_text().count('"epoch": 2') == 1
        assert not (run / "run.claim").exists()


@pytest.mark.slow
def test_of_two_commands_on_one_run_one_trains_and_the_others_report_it(tmp_path) -> None:
    one, two = (Forked(tmp_path, "train.py", *LONG, SLOW_SECONDS="0.02") for _ in range(2))
    run = wait_for_progress(tmp_path)
    winner, loser = (one, two) if status_of(run)["pid"] == one.pid else (two, one)
    code, _, error = loser.wait()
    assert code == 1
    assert f"is already being trained by process {winner.pid}" in error
    code, _, error = command(tmp_path, "train.py", "-m", *LONG)
    assert code == 1, "what is chained to it would miss a run"
    assert f"is already being trained by process {winner.pid}" in error
    assert "1 of 1 runs are not finished: other processes train them" in error
    os.kill(winner.pid, signal.SIGINT)
    assert winner.wait()[0] == 130
    assert len(runs.find(tmp_path / "outputs" / "default")) == 1


@pytest.mark.slow
def test_a_worker_dies_with_its_launcher_and_is_distinguished_from_one_at_work(tmp_path) -> None:
    """What was under way goes on when the same command is run again."""
    with start(tmp_path, "train.py", "-m", *LONG, "checkpoint_seconds=0") as process:
        run = wait_for_progress(tmp_path)
        process.kill()
    worker = status_of(run)["pid"]
    wait_for(lambda: not Path(f"/proc/{worker}").exists(), "the end of its worker")
    code, out, error = command(tmp_path, "train.py", "-m", *LONG, "hydra/launcher=plan")
    assert code == 0, error
    assert "1 to resume" in out
