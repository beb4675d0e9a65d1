"""`hydra/launcher=plan`: states and estimated costs, from planted records and from a few real steps."""

import re
from pathlib import Path

import pytest
from conftest import composed
from launchers.commands import SMALL, command

from normlab import runs
from normlab.training.run import train_run

PLAN = ("-m", "hydra/launcher=plan", *SMALL)


def plant(folder: Path, state: str, seconds: float = 0.0, memory: int = 0, *overrides: str, **facts: object) -> None:
    """The record of a run that ended as `state`."""
    run = runs.Run(composed(*SMALL, *overrides, f"output_dir={folder / 'outputs'}").as_dict())
    run.freeze()
    run.write_status(state, wall_seconds=seconds, peak_memory_bytes=memory, **facts)


def rows(out: str) -> dict[str, str]:
    """The line of each run in the table by what it is called."""
    return {line.split("  ")[0]: line for line in out.splitlines() if re.match(r"\w+ seed=\d+  ", line)}


@pytest.mark.slow
def test_every_run_with_its_state_and_no_folder_made(tmp_path) -> None:
    plant(tmp_path, "done", 10.0, 2**30, "seed=0", "batch=8")
    plant(tmp_path, "diverged", 10.0, 2**30, "seed=1", "batch=8")
    plant(tmp_path, "interrupted", 5.0, 2**30, "seed=2", "batch=8", step=10, steps=40)
    plant(tmp_path, "failed", 5.0, 2**30, "seed=3", "batch=8", step=10, steps=40)
    plant(tmp_path, "running", 5.0, 2**30, "seed=4", "batch=8")  # whose process is gone
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    code, out, error = command(tmp_path, "train.py", *PLAN, "batch=8", "seed=range(0,6)")
    assert code == 0, error
    states = ("done", "done", "to resume", "failed before", "to resume", "new")
    for seed, state in enumerate(states):
        assert state in rows(out)[f"bn seed={seed}"]
    assert "6 runs: 1 new, 2 to resume, 1 failed before, 0 running elsewhere, 2 done" in out
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    after.pop(tmp_path / "outputs" / "default" / "multirun.yaml", None)
    assert after == before


@pytest.mark.slow
def test_time_and_memory_from_runs_like_it(tmp_path) -> None:
    """10 and 14 s for 2 epochs: 12 s expected, twice of that for 4 epochs, and three quarters of it from step 10 of 40.
    Left to do: 24 (norm=bn) + 24 (another norm) = 48 s, one at a time."""
    plant(tmp_path, "done", 10.0, 2**30, "seed=0", "batch=8")
    plant(tmp_path, "done", 14.0, 3 * 2**30, "seed=1", "batch=8")
    planned = (*PLAN, "batch=8", "hydra.launcher.calibrate_seconds=0")
    code, out, error = command(tmp_path, "train.py", *planned, "epochs=4", "norm=bn,none", "hydra.launcher.slots=1")
    assert code == 0, error
    assert "24 s   3.0 GiB   2 runs like it" in rows(out)["bn seed=0"]
    assert "24 s   3.0 GiB   runs with another norm" in rows(out)["none seed=0"]
    assert "about 48 s of training, about 48 s with 1 at a time" in out
    packed = ("hydra.launcher.slots=1", "hydra.launcher.pack=2")
    _, out, _ = command(tmp_path, "train.py", *planned, "epochs=4", "norm=bn,none", "seed=0,1", *packed)
    assert "about 1 min 36 s of training, about 48 s with 2 at a time in one process" in out
    assert "3.0 GiB for the largest run, 6.0 GiB for the largest 2" in out
    plant(tmp_path, "interrupted", 5.0, 2**30, "seed=2", "batch=8", step=10, steps=40)
    _, out, _ = command(tmp_path, "train.py", *planned, "seed=0,1,2")
    assert " 9 s " in rows(out)["bn seed=2"]


@pytest.mark.slow
def test_a_few_steps_tell_what_no_run_does(tmp_path) -> None:
    """Within a factor of 3 of what the run then takes."""
    run = (*SMALL, "batch=8", "epochs=40")
    code, out, error = command(tmp_path, "train.py", "-m", *run, "hydra/launcher=plan", "hydra.launcher.slots=1")
    assert code == 0, error
    assert "a few steps" in out
    assert not runs.find(tmp_path / "outputs" / "default")
    estimate = float(next(word for word in rows(out)["bn seed=0"].split("new")[1].split()))
    status = train_run(composed(*run, f"output_dir={tmp_path / 'outputs'}"))
    assert estimate == pytest.approx(status["wall_seconds"], rel=2, abs=2)


@pytest.mark.slow
def test_nothing_to_go_by_and_nothing_to_do(tmp_path) -> None:
    _, out, _ = command(tmp_path, "train.py", *PLAN, "hydra.launcher.calibrate_seconds=0")
    assert "no finished run of the study to go by" in out
    plant(tmp_path, "done", 10.0, 2**30)
    _, out, _ = command(tmp_path, "train.py", *PLAN)
    assert "Nothing is left to do." in out


@pytest.mark.slow
def test_what_a_sweep_refuses_a_plan_refuses(tmp_path) -> None:
    code, out, error = command(tmp_path, "train.py", *PLAN, "batch=8", "norm=gn,bn", "norm.groups=3")
    assert code == 1
    assert "norm.groups=3 does not divide the 8 channels" in error
    assert "new" not in out
