"""The pool when things go wrong, with the real commands."""

import operator
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import Make
from launchers.commands import LONG, SMALL, command, start, status_of, wait_for, wait_for_progress

from normlab import runs
from normlab.data.inventory import Inventory
from normlab.launchers import pool
from normlab.launchers.pool import Worker, packs_for
from normlab.launchers.sweep import Job


def statuses(folder: Path) -> list[dict]:
    return [status_of(run) for run in runs.find(folder / "outputs" / "default")]


def planned(make: Make, *settings: str) -> Job:
    config = make(*settings)
    run = runs.Run(config.as_dict())
    run.freeze()
    return Job(config, run, Inventory(train_images=1000, test_images=100, classes=10, image_size=8))


def test_one_worker_does_one_run_after_the_other(tmp_path) -> None:
    code, _, error = command(tmp_path, "train.py", "-m", *SMALL, "seed=0,1,2", "hydra.launcher.slots=1")
    assert code == 0, error
    assert len({status["pid"] for status in statuses(tmp_path)}) == 1


def test_what_runs_out_of_memory_beside_others_is_tried_again_alone(tmp_path) -> None:
    greedy = [setting.replace("small.SmallNet", "greedy.Alone") for setting in SMALL]
    code, _, error = command(tmp_path, "train.py", "-m", *greedy, "seed=0,1", "hydra.launcher.slots=2")
    assert code == 0, error
    assert "does not fit into the memory" in error
    assert "Tried again with a device of their own: 1" in error
    assert [status["state"] for status in statuses(tmp_path)] == ["done", "done"]


def test_a_run_without_memory_that_was_alone_has_failed(tmp_path) -> None:
    greedy = [setting.replace("small.SmallNet", "greedy.Alone") for setting in SMALL]
    with (tmp_path / "greedy").open("w") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, error = command(tmp_path, "train.py", "-m", *greedy, "seed=0,1", "hydra.launcher.slots=1")
    assert code == 1
    assert "2 of 2 runs failed" in error
    assert "Traceback" not in error
    assert {status["state"] for status in statuses(tmp_path)} == {"failed"}


def test_a_run_that_was_killed_beside_others_is_tried_again_alone(tmp_path) -> None:
    killed = [setting.replace("small.SmallNet", "greedy.Killed") for setting in SMALL]
    code, _, error = command(tmp_path, "train.py", "-m", *killed, "seed=0,1", "hydra.launcher.slots=2")
    assert code == 0, error
    assert "its process was killed" in error
    assert [status["state"] for status in statuses(tmp_path)] == ["done", "done"]


class SpoiledFunction:
    """A function that no other process can unpickle."""

    def __reduce__(self) -> tuple[object, ...]:
        return int, ("spoiled",)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda *_: [], "Can't pickle"),
        (operator.index, "TypeError: "),
        (SpoiledFunction(), "its process was killed"),
    ],
    ids=["not pickled", "raises", "not unpickled"],
)
def test_a_worker_that_fails_before_its_run_fails_that_run_alone(make, monkeypatch, capsys, function, why) -> None:
    jobs = planned(make, "device=cpu", "seed=0"), planned(make, "device=cpu", "seed=1")
    functions = iter([function, pool._train_pack])  # the second worker's run is busy, which is no failure
    submit = Worker.submit
    monkeypatch.setattr(Worker, "submit", lambda worker, _, *rest: submit(worker, next(functions), *rest))
    with jobs[1].run.lock():
        ((job, error),) = pool.train_jobs(jobs, slots=1)
    assert job is jobs[0]
    assert why in error
    assert job.status()["state"] == "failed"
    log = job.run.folder / runs.LOG
    assert f"{log}: {error}" in capsys.readouterr().err
    assert f" ERROR {error}\n" in log.read_text()
    assert ("Traceback (most recent call last)" in log.read_text()) is ("killed" not in why)


def test_a_network_that_exits_fails_its_run_alone(tmp_path) -> None:
    (tmp_path / "exiting.py").write_text(
        "import small, sys\nclass Exiting(small.SmallNet):\n    def forward(self, x):\n        sys.exit(3)\n"
    )
    exiting = [setting.replace("small.SmallNet", "exiting.Exiting,small.SmallNet") for setting in SMALL]
    code, _, error = command(tmp_path, "train.py", "-m", *exiting)
    assert code == 1
    assert "1 of 2 runs failed." in error
    assert sorted(status["state"] for status in statuses(tmp_path)) == ["done", "failed"]
    [failed] = [run for run in runs.find(tmp_path / "outputs" / "default") if status_of(run)["state"] == "failed"]
    assert f"{runs.LOG}: SystemExit: 3" in error
    assert "in forward" in (failed / runs.LOG).read_text()


def test_runs_packed_into_one_process_end_as_those_of_their_own(tmp_path) -> None:
    sweep = ("-m", *SMALL, "norm=bn,none,noisy_bn", "batch=8,16")
    for words in (("hydra.launcher.slots=1", "hydra.launcher.pack=4"), ("study=solo",)):
        code, _, error = command(tmp_path, "train.py", *sweep, *words)
        assert code == 0, error
    packed, solo = (
        {run.name: status_of(run)["weights_sha256"] for run in runs.find(tmp_path / "outputs" / study)}
        for study in ("default", "solo")
    )
    assert len(packed) == 6
    assert packed == solo
    assert len({status["pid"] for status in statuses(tmp_path)}) == 1


def test_a_pack_that_was_killed_is_tried_again_run_by_run(tmp_path) -> None:
    killed = [setting.replace("small.SmallNet", "greedy.Killed") for setting in SMALL]
    arguments = ("-m", *killed, "seed=0,1", "hydra.launcher.slots=1", "hydra.launcher.pack=2")
    code, _, error = command(tmp_path, "train.py", *arguments)
    assert code == 0, error
    assert "its process was killed" in error
    assert "Tried again with a device of their own: 2" in error
    assert [status["state"] for status in statuses(tmp_path)] == ["done", "done"]


def test_a_packed_sweep_that_is_stopped_goes_on(tmp_path) -> None:
    arguments = ("-m", *LONG, "seed=0,1", "hydra.launcher.slots=1", "hydra.launcher.pack=2")
    sweep = start(tmp_path, "train.py", *arguments)
    wait_for_progress(tmp_path)
    sweep.send_signal(signal.SIGINT)
    sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert {status["state"] for status in statuses(tmp_path)} <= {"interrupted"}
    steps = {status["name"]: status["step"] for status in statuses(tmp_path)}
    again = start(tmp_path, "train.py", *arguments)
    wait_for_progress(tmp_path)
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=60)
    assert all(status["step"] >= steps[status["name"]] for status in statuses(tmp_path))


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


@pytest.mark.parametrize("value", ["0", "many"])
def test_a_wrong_number_of_runs_in_a_pack_is_a_sentence(tmp_path, value: str) -> None:
    code, _, error = command(tmp_path, "train.py", "-m", *SMALL, "seed=0,1", f"hydra.launcher.pack={value}")
    assert code == 1
    assert f"hydra.launcher.pack={value} is out of range: expected 1 or more." in error


def test_a_second_interrupt_stops_at_once(tmp_path) -> None:
    with start(tmp_path, "train.py", "-m", *LONG, "seed=0,1", "hydra.launcher.slots=1") as process:
        run = wait_for_progress(tmp_path)
        worker = status_of(run)["pid"]
        os.kill(worker, signal.SIGSTOP)  # it will not get round to its checkpoint
        process.send_signal(signal.SIGINT)
        time.sleep(1.0)
        assert process.poll() is None
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
        assert time.monotonic() - begun < 10
    assert process.returncode == 130
    assert "Traceback" not in error
    status = runs.read_status(run)
    assert status is not None
    assert (status["state"], status["error"]) == ("interrupted", "stopped at once")


@pytest.mark.parametrize("mode", [(), ("-m",)])
def test_a_closed_terminal_is_a_request_to_stop(tmp_path, mode) -> None:
    with start(tmp_path, "train.py", *mode, *LONG, new_session=True) as process:
        run = wait_for_progress(tmp_path)
        os.killpg(process.pid, signal.SIGHUP)  # as a terminal does, to launcher and workers
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Error executing job" not in error  # Hydra's line, of what is no error
    assert status_of(run)["state"] == "interrupted"
    assert (run / "checkpoint.pt").exists()


def test_a_sweep_started_three_times_trains_each_run_once(tmp_path) -> None:
    arguments = ("-m", "norm=bn,affine,none", "batch=8,16", *SMALL, "hydra.launcher.slots=1")
    with (
        start(tmp_path, "train.py", *arguments) as one,
        start(tmp_path, "train.py", *arguments) as two,
        start(tmp_path, "train.py", *arguments) as three,
    ):
        ended = [process.communicate(timeout=200) for process in (one, two, three)]
    assert [process.returncode for process in (one, two, three)] == [0, 0, 0], ended
    found = runs.find(tmp_path / "outputs" / "default")
    assert len(found) == 6
    for run in found:
        assert status_of(run)["state"] == "done"
        assert [row["epoch"] for row in runs.read_metrics(run)[0]] == [1, 2]
        assert (run / "run.log").read_text().count('"epoch": 2') == 1
        assert not (run / "run.claim").exists()


def test_a_worker_that_died_with_its_launcher_is_distinguished_from_one_at_work(tmp_path) -> None:
    """What was under way goes on when the same command is run again."""
    with start(tmp_path, "train.py", "-m", *LONG, "checkpoint_seconds=0") as process:
        run = wait_for_progress(tmp_path)
        process.kill()
    worker = status_of(run)["pid"]
    wait_for(lambda: not Path(f"/proc/{worker}").exists(), "the end of its worker")
    code, out, error = command(tmp_path, "train.py", "-m", *LONG, "hydra/launcher=plan")
    assert code == 0, error
    assert "1 to resume" in out
