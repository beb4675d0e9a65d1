"""The commands with a network that is small enough: real ones to disturb, and forks of what is not disturbed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from commands import run_command

from normlab import runs

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
SMALL = (
    "model=custom",
    "model.target=small.SmallNet",
    "model.name=small",
    "dataset.train_size=160",
    "dataset.test_size=40",
    "epochs=2",
    "device=cpu",
    "memory_format=contiguous",
    "threads=1",
)
LONG = (*SMALL, "model.target=slow_net.SlowNet", "epochs=2000", "batch=8")  # and asleep most of the time


class Command(subprocess.Popen[str]):
    """A command that a test which fails does not wait for."""

    def __exit__(self, *error: Any) -> None:
        if error[0]:
            self.kill()
        super().__exit__(*error)


def python(folder: Path, *words: object, new_session: bool = False, **more: str) -> Command:
    """`python *words` in a folder, with the tests' networks, and with more in its environment."""
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return Command(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=new_session,
        preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),  # even if the tests run under nohup
    )


def start(folder: Path, script: str, *arguments: str, new_session: bool = False) -> Command:
    return python(folder, ROOT / script, *arguments, new_session=new_session, SLOW_SECONDS="0.02")


def command(folder: Path, script: str, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command that nobody disturbs: of a fork, where joblib starts no processes."""
    if "hydra/launcher=joblib" in arguments:
        with start(folder, script, *arguments) as process:
            out, error = process.communicate(timeout=300)
        return process.returncode, out, error
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return run_command(folder, script, *arguments, SLOW_SECONDS="0.02", PYTHONPATH=paths)


def by_two_tasks(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """`srun --ntasks=2 python train.py ...`, as far as a process can see.

    Returns:
        The exit status, which is that of all, and the output of the first one; the others print nothing.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        python(folder, ROOT / "train.py", *arguments, **slurm, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        for rank in ("0", "1")
    ]
    (out, error), *others = [process.communicate(timeout=120) for process in processes]
    assert others == [("", "")], others
    exited, other = (process.returncode for process in processes)
    assert exited == other, error
    return exited, out, error


def status_of(run: Path) -> dict[str, Any]:
    """The status of a run's folder, empty before it has one."""
    return runs.read_status(run) or {}


def wait_for_progress(folder: Path, study: str = "default") -> Path:
    """The first run of the study that has made a step."""

    def progress() -> Path | None:
        for run in runs.find(folder / "outputs" / study):
            status = status_of(run)
            if status.get("state") == "running" and status.get("step", 0) > 0:
                return run
        return None

    return wait_for(progress, "a run under way")


def wait_for(look: Callable[[], T | None], what: str, seconds: float = 60.0) -> T:
    patience = time.monotonic() + seconds
    while time.monotonic() < patience:
        found = look()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"no sign of {what} after {seconds:.0f} s")
