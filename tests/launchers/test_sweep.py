"""The real commands, end to end: a sweep of small runs on digits, its repetition, its report."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from launchers.commands import LONG, SMALL, command, start, wait_for_progress

from normlab import runs


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """A folder in which the README's sweep was run, with a small budget."""
    folder = tmp_path_factory.mktemp("sweep")
    status, _, error = command(folder, "train.py", "-m", "norm=bn,affine,bnminus,none", "batch=8,32,128", *SMALL)
    assert status == 0, error
    assert "12 of 12 runs finished" in error
    assert "[12/12]" in error
    return folder


def test_every_run_of_a_sweep_has_its_record(sweep) -> None:
    found = runs.find(sweep / "outputs" / "default")
    assert len(found) == 12
    for folder in found:
        status = runs.read_status(folder)
        assert status is not None
        assert status["state"] == "done"
        rows, warnings = runs.read_metrics(folder)
        assert [row["epoch"] for row in rows] == [1, 2]
        assert not warnings
        assert sorted(path.name for path in folder.iterdir()) == [
            "config.yaml",
            "metrics.jsonl",
            "provenance.json",
            "run.log",
            "status.json",
        ]


def test_a_repeated_sweep_skips_what_is_finished(sweep) -> None:
    before = {path: path.stat().st_mtime_ns for path in sweep.glob("outputs/default/*/*")}
    status, out, error = command(sweep, "train.py", "-m", "norm=bn,affine,bnminus,none", "batch=8,32,128", *SMALL)
    assert status == 0, error
    assert "12 of 12 runs are finished and skipped." in out
    assert {path: path.stat().st_mtime_ns for path in sweep.glob("outputs/default/*/*")} == before


def test_a_single_run_lands_in_the_same_place(sweep) -> None:
    status, out, error = command(sweep, "train.py", "norm=bn", "batch=32", *SMALL)
    assert status == 0, error
    assert "is finished" in out
    assert len(runs.find(sweep / "outputs" / "default")) == 12


def test_the_report_of_a_sweep_has_its_tables_and_figures(sweep) -> None:
    status, out, error = command(sweep, "report.py")
    assert status == 0, error
    assert "12 done" in out
    assert "index.html" in out
    folder = sweep / "outputs" / "default" / "report"
    accuracy = (folder / "accuracy.md").read_text()
    for word in ("bn", "affine", "bnminus", "none", "batch 8", "batch 32", "batch 128", "digits, small"):
        assert word in accuracy
    assert (folder / "accuracy_against_batch.png").read_bytes().startswith(b"\x89PNG")


def test_hydras_own_launcher_gives_the_same_runs(sweep) -> None:
    arguments = ("-m", "norm=bn,none", "batch=32", "hydra/launcher=basic", "study=basic", *SMALL)
    status, _, error = command(sweep, "train.py", *arguments)
    assert status == 0, error
    for folder in runs.find(sweep / "outputs" / "basic"):
        twin = runs.read_status(sweep / "outputs" / "default" / folder.name)
        status_here = runs.read_status(folder)
        assert twin is not None
        assert status_here is not None
        assert status_here["weights_sha256"] == twin["weights_sha256"]


def test_one_failing_run_leaves_the_others_alone_and_is_listed(tmp_path) -> None:
    """ResNet's last maps of a digit are 1x1: batch statistics of one image cannot be taken."""
    arguments = ("-m", "norm=bn,affine", "batch=1", "dataset.train_size=10", "dataset.test_size=10", "epochs=1")
    status, _, error = command(tmp_path, "train.py", *arguments, "device=cpu")
    assert status == 1
    assert "1 of 2 runs failed." in error
    assert re.search(r"^  \S+-bn-b1-s0-\w+/run\.log: ", error, re.M)
    assert "does not fit" in error
    assert "Traceback" not in error
    states = {folder.name.split("-")[2]: runs.read_status(folder) for folder in runs.find(tmp_path / "outputs/default")}
    assert states["bn"] is not None
    assert states["bn"]["state"] == "failed"
    assert states["affine"] is not None
    assert states["affine"]["state"] == "done"


@pytest.mark.parametrize("mode", [(), ("-m",)])
def test_interrupting_a_command_leaves_a_run_that_can_go_on(tmp_path, mode) -> None:
    with start(tmp_path, "train.py", *mode, *LONG) as process:
        run = wait_for_progress(tmp_path)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "goes on from the last checkpoint" in error
    assert "Traceback" not in error
    status = runs.read_status(run)
    assert status is not None
    assert status["state"] == "interrupted"
    assert (run / "checkpoint.pt").exists()


def test_interrupting_a_sweep_before_its_first_step_stops_it(tmp_path) -> None:
    with start(tmp_path, "train.py", "-m", *LONG) as process:
        for _ in range(600):
            if runs.find(tmp_path / "outputs" / "default"):
                break
            time.sleep(0.05)
        time.sleep(0.7)  # the worker is importing torch
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    (run,) = runs.find(tmp_path / "outputs" / "default")
    status = runs.read_status(run)
    assert status is None or status["state"] == "interrupted"


def test_a_killed_launcher_leaves_no_worker_behind(tmp_path) -> None:
    with start(tmp_path, "train.py", "-m", *LONG) as process:
        run = wait_for_progress(tmp_path)
        worker = json.loads((run / "status.json").read_text())["pid"]
        process.kill()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or "zombie" in Path(f"/proc/{worker}/status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError("the worker goes on")


def test_a_killed_worker_costs_its_run_only(tmp_path) -> None:
    with start(tmp_path, "train.py", "-m", "norm=bn", *LONG, "seed=0,1", "hydra.launcher.slots=1") as process:
        first = wait_for_progress(tmp_path)
        os.kill(json.loads((first / "status.json").read_text())["pid"], signal.SIGKILL)
        for _ in range(600):
            second = next(run for run in runs.find(tmp_path / "outputs" / "default") if run != first)
            status = runs.read_status(second)
            if status and status.get("step", 0) > 0:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    status = runs.read_status(first)
    assert status is not None
    assert status["state"] == "failed"
    assert "killed" in status["error"]


def test_of_two_commands_started_together_one_trains(tmp_path) -> None:
    with start(tmp_path, "train.py", *LONG[:-1], "batch=8") as one, start(tmp_path, "train.py", *LONG) as other:
        run = wait_for_progress(tmp_path)
        loser = one if json.loads((run / "status.json").read_text())["pid"] == other.pid else other
        _, error = loser.communicate(timeout=60)
        assert loser.returncode == 1
        assert "is already being trained by" in error
        winner = other if loser is one else one
        winner.send_signal(signal.SIGINT)
        winner.communicate(timeout=60)
    assert len(runs.find(tmp_path / "outputs" / "default")) == 1


def test_of_two_commands_on_one_run_one_trains_and_the_other_reports_it(tmp_path) -> None:
    with start(tmp_path, "train.py", *LONG) as one:
        wait_for_progress(tmp_path)
        status, _, error = command(tmp_path, "train.py", *LONG)
        assert status == 1
        assert f"is already being trained by process {one.pid}" in error
        status, _, error = command(tmp_path, "train.py", "-m", *LONG)
        assert status == 0
        assert f"is already being trained by process {one.pid}" in error
        one.send_signal(signal.SIGINT)
        one.communicate(timeout=60)
