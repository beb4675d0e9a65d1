"""The SLURM launcher against a real SLURM, the one of `scripts/local_slurm start` and no other: jobs are disturbed in
every way that a cluster knows, and must end as if nothing had happened."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from commands import run_command
from filelock import FileLock
from launchers.commands import ROOT, Command, python
from outcome import outcome

from normlab import runs
from normlab.common.errors import UserError
from normlab.launchers import preflight, slurm

LOCAL = subprocess.run([ROOT / "scripts" / "local_slurm", "status"], capture_output=True, text=True)
SETTINGS = (
    "model=custom",
    "model.target=slow_net.SlowNet",
    "model.name=slow",
    "dataset.train_size=160",
    "dataset.test_size=40",
    "batch=8",
    "epochs=2",
    "device=cpu",
    "threads=1",
    "memory_format=contiguous",
    "checkpoint_seconds=1",
)
SLURM = ("hydra/launcher=slurm", "hydra.launcher.cpus=1", "hydra.launcher.time=5")
LONG = (*SETTINGS, "epochs=30", "eval_every=10")
SLOW = {"SLOW_SECONDS": "0.045"}  # 600 steps: 27 s and what the network takes


CONF = dict(re.findall(r"(SLURM_CONF)=(\S+)", LOCAL.stdout))


def start(folder: Path, *arguments: str, **more: str) -> Command:
    return python(folder, ROOT / "train.py", "-m", *arguments, **CONF, **more)


def train(folder: Path, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
    with start(folder, *arguments, **more) as process:
        out, error = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def train_as_fork(folder: Path, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
    """The same without the time to import, for a process without threads."""
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])  # of the jobs
    words = ("-m", *arguments)
    return subprocess.CompletedProcess(
        words, *run_command(folder, "train.py", *words, PYTHONPATH=paths, **CONF, **more)
    )


def call(*words: str) -> str:
    done = subprocess.run(words, env={**os.environ, **CONF}, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def queue(*which: str) -> dict[str, str]:
    """The state of each task that SLURM has: {"3_0": "RUNNING"}."""
    lines = call("squeue", "--noheader", "--array", "--format=%F_%K %T", *which).splitlines()
    return dict(line.split() for line in lines)


def array(done: "subprocess.CompletedProcess[str]") -> str:
    found = re.search(r"Submitted: .* as job (\d+)", done.stdout)
    assert found, done.stdout + done.stderr
    return found[1]


def until(what: str, condition: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} takes too long; {queue()}"
        time.sleep(0.3)


def state(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(UserError):
        return runs.read_status(folder) or {}
    return {}


def steps(study: Path) -> dict[str, int]:
    return {folder.name: state(folder).get("step", 0) for folder in runs.find(study)}


def results(study: Path) -> dict[str, Any]:
    """Of each run everything that must not depend on how it was carried out."""
    return {folder.name: outcome(folder) for folder in runs.find(study)}


def ended(study: Path) -> list[str]:
    return [state(folder)["state"] for folder in runs.find(study)]


@pytest.fixture
def cluster() -> Iterator[None]:
    """The local SLURM for one test alone, which leaves no job behind."""
    if LOCAL.returncode:
        pytest.skip(LOCAL.stderr.strip())
    with FileLock(Path(tempfile.gettempdir()) / "normlab-test-slurm.lock"):
        yield
        for job in {task.partition("_")[0] for task in queue()}:
            call("scancel", job)
        until("the last job's end", lambda: not queue())


@pytest.fixture
def undisturbed(tmp_path) -> Iterator[Command]:
    """The pool at work on the long runs, in the folder `pool`."""
    (tmp_path / "pool").mkdir()
    with start(tmp_path / "pool", *LONG, "seed=0,1,2,3,4") as process:
        yield process


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.skipif(os.getuid() != 0, reason="crashing the node needs root")
def test_jobs_disturbed_in_every_way_end_as_if_nothing_had_happened(cluster, undisturbed, tmp_path) -> None:
    here = tmp_path / "slurm"
    here.mkdir()
    study = here / "outputs" / "default"
    sweep = (*LONG, *SLURM, "hydra.launcher.wait=false", "seed=0,1,2,3")
    first = train_as_fork(here, *sweep, **SLOW)
    job = array(first)
    assert "4 runs as job" in first.stdout
    assert f"scancel {job}" in first.stdout
    again = train_as_fork(here, *sweep, **SLOW)
    assert f"4 of 4 runs are queued or running already (job {job})" in again.stdout
    assert "Submitted" not in again.stdout

    def log(task: str) -> str:
        return (study / "slurm" / f"{task}_0_log.out").read_text()

    def back(*tasks: int) -> bool:
        return all(queue().get(f"{job}_{task}", "RUNNING") == "RUNNING" for task in tasks)

    until("the start", lambda: len(steps(study)) == 4 and all(steps(study).values()))
    call("scancel", "--signal=USR2", f"{job}_0")
    call("scontrol", "requeue", f"{job}_1")
    call("scancel", f"{job}_2")
    until("the cancelled job's end", lambda: f"{job}_2" not in queue())
    (cancelled,) = study.glob("*-s2-*")
    assert state(cancelled)["state"] == "interrupted"
    assert "goes back into the queue" not in log(f"{job}_2")
    until("the first two jobs' return", lambda: back(0, 1, 3))
    assert "SLURM sends SIGUSR2" in log(f"{job}_0")
    assert "goes back into the queue" in log(f"{job}_0")
    assert "SLURM sends SIGTERM" in log(f"{job}_1")

    # Pre-emption: a job that goes first needs all of the node's cores.
    first_of_all = ("--partition=urgent", "--ntasks=8", "--time=1", "--output=/dev/null", "--wrap=sleep 1")
    urgent = call("sbatch", "--parsable", *first_of_all).strip()
    until("pre-emption", lambda: f"{urgent}_N/A" not in queue())
    until("all jobs' return", lambda: back(0, 1, 3))
    assert "SLURM sends SIGTERM" in log(f"{job}_3")

    before = sum(steps(study).values())
    until("going on", lambda: sum(steps(study).values()) > before + 20)
    assert queue()[f"{job}_0"] == "RUNNING"
    subprocess.run([ROOT / "scripts" / "local_slurm", "crash"], check=True)
    until("SLURM's notice", lambda: "down" in call("sinfo", "--noheader", "--format=%T"))
    subprocess.run([ROOT / "scripts" / "local_slurm", "start"], check=True, capture_output=True)

    # SLURM looks for limits that are near twice a minute, and tells of them up to 30 s early.
    limited = ("seed=4", "hydra.launcher.time=1", "hydra.launcher.grace_seconds=30", "hydra.launcher.wait=false")
    of_a_minute = array(train_as_fork(here, *LONG, *SLURM, *limited, **SLOW))
    last = train_as_fork(here, *LONG, *SLURM, "seed=0,1,2,3,4", **SLOW)  # waits for all
    assert last.returncode == 0, last.stderr
    assert "Submitted: 1 run as" in last.stdout  # the cancelled one
    assert "SLURM sends SIGUSR2" in log(f"{of_a_minute}_0")
    assert log(f"{of_a_minute}_0").count(f"job {of_a_minute}_0 on") >= 2

    _, error = undisturbed.communicate(timeout=60)
    assert undisturbed.returncode == 0, error
    assert results(study) == results(tmp_path / "pool" / "outputs" / "default")


def wrapper(folder: Path, command: str, script: str) -> dict[str, str]:
    """An environment in which a command of SLURM is this script, which finds the real one as $real."""
    real = shutil.which(command)
    (folder / command).write_text(f"#!/bin/bash\nreal={real}\n{script}\n")
    (folder / command).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def a_run_in_several_tasks_stops_on_request_goes_on_and_finishes(here: Path) -> None:
    study = here / "outputs" / "several"
    several = ("study=several", "epochs=8", "sync_stats=true", "hydra.launcher.tasks=2")
    with start(here, *SETTINGS, *several, *SLURM, **SLOW) as waiting:
        until("the start", lambda: any(steps(study).values()))
        (task,) = queue("--name=several")
        call("scancel", "--signal=USR2", task)
        _, error = waiting.communicate(timeout=200)
    log = (study / "slurm" / f"{task}_0_log.out").read_text()
    assert waiting.returncode == 0, error + log
    assert "goes back into the queue" in log
    assert ended(study) == ["done"]


def a_submitter_killed_at_submission_leaves_an_array_that_the_same_command_finds(here: Path) -> None:
    sweep = (*SETTINGS, *SLURM, "hydra.launcher.memory_gb=0.7", "seed=0,1")
    deadly = wrapper(here, "sbatch", '[ "$1" = --version ] && exec $real "$@"; $real --hold "$@"; kill -KILL $PPID')
    inside_of_a_job = {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_CPU": "1", "SLURM_MEM_PER_NODE": "1"}  # srun refuses that
    killed = train(here, *sweep, **deadly, **inside_of_a_job)
    assert killed.returncode == -signal.SIGKILL
    again = train(here, *sweep, "hydra.launcher.wait=false")
    assert again.returncode == 0, again.stderr
    queued = re.search(r"2 of 2 runs are queued or running already \(job (\d+)\)", again.stdout)
    assert queued, again.stdout
    call("scontrol", "release", queued[1])
    last = train(here, *sweep)
    assert "Submitted" not in again.stdout + last.stdout
    assert ended(here / "outputs" / "default") == ["done", "done"]


def jobs_hold_more_runs_where_arrays_are_small_and_one_may_fail(here: Path) -> None:
    small_arrays = wrapper(here, "scontrol", '$real "$@" | sed "s/^MaxArraySize.*/MaxArraySize = 2/"')
    targets = "model.target=greedy.Insatiable,small.SmallNet,small.SmallResNet"
    done = train(here, *SETTINGS, *SLURM, targets, **small_arrays)
    assert done.returncode == 1
    assert "2 runs go into each job" in done.stdout
    assert "an array of 2 jobs" in done.stdout
    assert "1 of 3 runs are not finished" in done.stderr
    assert "does not fit into the memory" in done.stderr
    assert "Traceback" not in done.stderr
    states = {
        runs.read_config(run)["model"]["target"]: state(run)["state"] for run in runs.find(here / "outputs/default")
    }
    assert states == {"greedy.Insatiable": "failed", "small.SmallNet": "done", "small.SmallResNet": "done"}


def interrupting_the_waiting_command_leaves_jobs_alone_and_a_killed_one_is_reported(here: Path) -> None:
    study, endless = here / "outputs" / "default", (*LONG, *SLURM, "epochs=300", "seed=0")
    with start(here, *endless, **SLOW) as waiting:
        until("the start", lambda: any(steps(study).values()))
        waiting.send_signal(signal.SIGINT)
        _, error = waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    found = re.search(r"to cancel them: scancel (\d+)", error)
    assert found, error
    assert queue()[f"{found[1]}_0"] == "RUNNING"
    with start(here, *endless, **SLOW) as waiting:
        assert waiting.stderr
        assert "Waiting for 1 run" in waiting.stderr.readline()  # it has seen the job in the queue
        call("scancel", "--signal=KILL", found[1])
        out, error = waiting.communicate(timeout=120)
    assert waiting.returncode == 1
    assert f"1 of 1 runs are queued or running already (job {found[1]})" in out
    assert "its job has left SLURM's queue without finishing it" in error
    assert "Traceback" not in error


def queued_jobs_run_the_code_that_was_submitted(here: Path) -> None:
    """Of a network that is edited before its job starts; tests/launchers/test_snapshot.py has the other parts."""
    network = here / "quick.py"
    network.write_text("from small import SmallNet as Quick\n")
    mine = (*SETTINGS, "model.target=quick.Quick", "model.name=quick")
    assert train(here, *mine, "study=pool").returncode == 0
    held = train(here, *mine, *SLURM, "hydra.launcher.wait=false", "+cluster.options.hold=true")
    network.write_text("raise SystemExit('edited')\n")
    call("scontrol", "release", array(held))
    study = here / "outputs" / "default"
    until("the job's end", lambda: [state(run).get("state") for run in runs.find(study)] == ["done"])
    assert results(study) == results(here / "outputs" / "pool")
    (run,) = runs.find(study)
    assert (study / "slurm" / "code" / runs.read_provenance(run)["snapshot"] / "start.py").exists()


def a_refusal_of_slurm_is_reported_in_its_words(here: Path) -> None:
    done = train_as_fork(here, *SETTINGS, *SLURM, "cluster.partition=nowhere")
    assert done.returncode == 1
    assert "SLURM refuses the jobs: " in done.stderr
    assert "invalid partition" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(here.glob("outputs/default/slurm/*.json"))


def hydras_launcher_by_submitit_carries_out_a_sweep(here: Path) -> None:
    if find_spec("hydra_plugins.hydra_submitit_launcher"):
        needs = ("hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=5", "hydra.launcher.mem_gb=null")
        done = train(here, *SETTINGS, "hydra/launcher=submitit_slurm", *needs, "seed=0,1")
        assert done.returncode == 0, done.stderr
        assert ended(here / "outputs" / "default") == ["done", "done"]


@pytest.mark.slow
@pytest.mark.slurm
def test_seven_commands_on_one_cluster_at_a_time(cluster, tmp_path) -> None:
    """So that their waits overlap, but for one that has none."""
    a_refusal_of_slurm_is_reported_in_its_words(tmp_path)
    commands = (
        a_run_in_several_tasks_stops_on_request_goes_on_and_finishes,
        a_submitter_killed_at_submission_leaves_an_array_that_the_same_command_finds,
        jobs_hold_more_runs_where_arrays_are_small_and_one_may_fail,
        interrupting_the_waiting_command_leaves_jobs_alone_and_a_killed_one_is_reported,
        queued_jobs_run_the_code_that_was_submitted,
        hydras_launcher_by_submitit_carries_out_a_sweep,
    )
    folders = [tmp_path / str(number) for number in range(len(commands))]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(len(commands)) as threads:
        for future in [threads.submit(*job) for job in zip(commands, folders, strict=True)]:
            future.result()


def test_jobs_of_other_programs_are_none_of_ours(tmp_path, monkeypatch) -> None:
    """Whatever their comments are: their words begin as ours do, or name what is no list of runs."""
    os.mkfifo(tmp_path / "fifo")
    for name, content in (
        ("odd", '{"tasks": 3}'),
        ("deep", "[" * 100_000),
        ("true", '{"slots": 1, "tasks": [[{"folder": "/x/run", "settings": {}}]]}'),
    ):
        (tmp_path / name).write_text(content)
    names = ("fifo", "odd", "deep", "missing", "", "true")
    lines = [f"7_{index} normlab {tmp_path}/{name}" for name in names for index in ("N/A", "9", "0")]
    lines += [
        "8_0 normlab true",
        "9_N/A normlab notes",
        "9_1 normlab",
        "9_1",
        "10_0 \\xff\\x00",
        "11_0 normlab /dev/zero",
    ]
    shown = "".join(f"printf '{line}\\n'\n" for line in lines)
    for name, text in wrapper(tmp_path, "squeue", f"{shown}exit 0").items():
        monkeypatch.setenv(name, text)
    assert slurm._queued() == {"/x/run": "7_0"}


def test_without_slurm_the_command_ends_in_a_sentence(tmp_path) -> None:
    done = train_as_fork(tmp_path, *SETTINGS, *SLURM, PATH=str(tmp_path))
    assert done.returncode == 1
    assert "there is no sbatch here" in done.stderr
    assert len(done.stderr.splitlines()) <= 5


def test_a_device_is_checked_where_the_run_will_be(make) -> None:
    config = make("device=cuda:99")
    preflight.check(config, here=False)
    with pytest.raises(UserError, match="cuda:99"):
        preflight.check(config)


NEEDS = {
    **dict.fromkeys(("time", "cpus", "runs_per_job", "slots", "nodes", "tasks"), 1),
    **{"grace_seconds": 30, "gpus": 0, "memory_gb": None, "array_parallelism": None, "freeze_code": True, "wait": True},
    "cluster": {
        **dict.fromkeys(("partition", "account", "qos", "constraint", "python")),
        "setup": [],
        "options": {"exclusive": True, "mail-type": "FAIL", "nice": 5},
    },
}


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("time", 0, "hydra.launcher.time=0 is out of range: expected 1 or more. Nearest valid: hydra.launcher.time=1."),
        ("grace_seconds", 60, "leaves nothing of hydra.launcher.time=1"),
        ("wait", 1, "hydra.launcher.wait=1 is not valid"),
        ("cluster", {**NEEDS["cluster"], "acount": "x"}, "Did you mean cluster.account=...?"),
        ("cluster", {**NEEDS["cluster"], "setup": "module load cuda"}, "cluster.setup=module load cuda is not valid"),
    ],
)
def test_a_wrong_setting_is_refused_in_a_sentence(setting, value, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        slurm.parse({**NEEDS, setting: value})


def test_a_job_s_script_has_the_needs_and_the_cluster_s_options_first() -> None:
    needs = {"time": 90, "gpus": 2, "cpus": 3, "memory_gb": 1.5, "array_parallelism": 2, "tasks": 4}
    options = {"exclusive": True, "requeue": False, "mail_type": "FAIL", "nodes": 7}
    cluster = {**NEEDS["cluster"], "partition": "gpu", "setup": ["module load ${CUDA}"], "options": options}
    parsed = slurm.parse({**NEEDS, **needs, "cluster": cluster})
    script = slurm.job_script(parsed, "my study", Path("/a {folder}/order.json"), 5)
    assert {line for line in script.splitlines() if line.startswith("#SBATCH")} == {
        "#SBATCH --job-name='my study'",
        "#SBATCH --comment='normlab /a {folder}/order.json'",
        "#SBATCH --output='/a {folder}/%A_%a_0_log.out'",
        "#SBATCH --open-mode=append",
        "#SBATCH --array=0-4%2",
        "#SBATCH --signal=USR2@30",
        "#SBATCH --time=90",
        "#SBATCH --nodes=7",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --cpus-per-task=3",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --mem=1536M",
        "#SBATCH --partition=gpu",
        "#SBATCH --exclusive",
        "#SBATCH --mail-type=FAIL",
    }
    setup, command = re.search(r"\n\n(.*)\n(srun .*)\n", script).groups()
    assert setup == "module load ${CUDA}"
    assert "--output='/a {folder}/%A_%a_%t_log.out' --cpus-per-task=3" in command
    assert command.endswith("-u -m normlab.launchers.slurm_task '/a {folder}/order.json'")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    from_a_copy = slurm.job_script(parsed, "my study", Path("/order.json"), 5, Path("/a {folder}/code"))
    assert " -u '/a {folder}/code/start.py' /order.json\n" in from_a_copy


def test_a_little_memory_is_not_all_of_a_node() -> None:
    """Of --mem=0 SLURM makes all memory."""
    script = slurm.job_script(slurm.parse({**NEEDS, "memory_gb": 1e-4}), "study", Path("/order.json"), 1)
    assert "#SBATCH --mem=1M\n" in script


def test_options_of_sbatch_may_be_words_numbers_or_flags() -> None:
    assert slurm.parse(NEEDS).cluster.options == {"exclusive": True, "mail-type": "FAIL", "nice": "5"}
