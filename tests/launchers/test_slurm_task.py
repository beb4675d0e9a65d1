"""One task of an array without a SLURM around it, which is sent the signals that SLURM sends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launchers.commands import ROOT, wait_for

from normlab import runs
from normlab.config.schema import RunConfig
from normlab.launchers.slurm import REQUEUE_STATUS
from normlab.runs import files


@contextmanager
def start_task(folder: Path, *configs: RunConfig) -> "Iterator[subprocess.Popen[str]]":
    """The process that SLURM starts for an array's only task, in a session of its own."""
    order = folder / "order.json"
    for config in configs:
        runs.Run(config.as_dict()).freeze()
    files.write_json(order, {"slots": 1, "tasks": [[{"settings": config.as_dict()} for config in configs]]})
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    of_slurm = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "normlab.launchers.slurm_task", str(order)],
        env={**os.environ, "PYTHONPATH": paths, "SLOW_SECONDS": "0.05", **of_slurm},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def status(config: RunConfig) -> dict:
    return runs.read_status(runs.Run(config.as_dict()).folder) or {}


def test_a_task_that_is_sent_signals_again_and_again_writes_its_checkpoint(tiny, tmp_path) -> None:
    """As SLURM does before a time limit: first the signal of the job's choice to all processes, then TERM, repeated."""
    settings = ("model.target=slow.SlowNet", "model.name=slow", "epochs=30", "checkpoint_seconds=null")
    config = tiny(*settings)
    with start_task(tmp_path, config, tiny(*settings, "seed=1")) as process:
        wait_for(lambda: status(config).get("step"), "a step")
        os.killpg(process.pid, signal.SIGUSR2)
        for _ in range(20):
            time.sleep(0.05)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == REQUEUE_STATUS, output
    assert output.count("SLURM sends SIG") == 1
    assert "Traceback" not in output
    assert status(config)["state"] == "interrupted"
    assert (runs.Run(config.as_dict()).folder / "checkpoint.pt").exists()
