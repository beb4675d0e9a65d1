"""One task of an array without a SLURM around it, which is sent the signals that SLURM sends."""

import os
import signal
import time

import pytest
from launchers.commands import python, wait_for
from outcome import folder, status

from normlab import runs
from normlab.launchers.slurm import REQUEUE_STATUS
from normlab.runs import files


@pytest.mark.slow
def test_a_task_that_is_sent_signals_again_and_again_writes_its_checkpoint(tiny, tmp_path) -> None:
    """As SLURM does before a time limit: first the signal of the job's choice to all processes, then TERM, repeated."""
    settings = ("model.target=slow_net.SlowNet", "model.name=slow", "epochs=30", "checkpoint_seconds=null")
    config, order = tiny(*settings), tmp_path / "order.json"
    configs = [each.as_dict() for each in (config, tiny(*settings, "seed=1"))]
    for each in configs:
        runs.Run(each).freeze()
    entries = [{"name": "first of all", "settings": configs[0]}, *({"settings": each} for each in configs[1:])]
    files.write_json(order, {"slots": 1, "tasks": [entries]})
    of_slurm = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLOW_SECONDS": "0.05"}
    task = ("-u", "-m", "normlab.launchers.slurm_task", order)
    with python(tmp_path, *task, new_session=True, **of_slurm) as process:
        wait_for(lambda: status(config).get("step"), "a step")
        os.killpg(process.pid, signal.SIGUSR2)
        for _ in range(20):
            time.sleep(0.05)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        output = "".join(process.communicate(timeout=60))
    assert process.returncode == REQUEUE_STATUS, output
    assert "Runs of this job: first of all, bn seed=1\n" in output  # an order of before version 0.5 has no names
    assert output.count("SLURM sends SIG") == 1
    assert "Traceback" not in output
    assert status(config)["state"] == "interrupted"
    assert (folder(config) / "checkpoint.pt").exists()
