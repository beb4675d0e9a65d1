"""The real commands, end to end: a sweep of small runs on digits, its repetition, its report."""

import os
import signal
import time
from pathlib import Path

import pytest
from launchers.commands import LONG, SMALL, command, start, status_of, wait_for, wait_for_progress

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
        assert status_of(folder)["state"] == "done"
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
        twin = sweep / "outputs" / "default" / folder.name
        assert status_of(folder)["weights_sha256"] == status_of(twin)["weights_sha256"]


def test_failing_runs_leave_the_others_alone_and_are_listed_with_error_and_log(tmp_path) -> None:
    """ResNet's last maps of a digit are 1x1: batch statistics of one image cannot be taken."""
    sizes = ("batch=1", "dataset.train_size=10", "dataset.test_size=10", "epochs=1", "device=cpu")
    status, _, error = command(tmp_path, "train.py", "-m", "norm=bn,affine", "seed=0,1", *sizes)
    assert status == 1
    assert "2 of 4 runs failed." in error
    assert "Traceback" not in error
    states = {folder.name: status_of(folder)["state"] for folder in runs.find(tmp_path / "outputs" / "default")}
    assert len(states) == 4
    for name, state in states.items():
        fails = "-bn-" in name
        assert state == ("failed" if fails else "done")
        assert (f"\n  outputs/default/{name}/run.log: A batch of 1 images" in error) is fails


@pytest.mark.parametrize("mode", [(), ("-m",)])
def test_interrupting_a_command_leaves_a_run_that_can_go_on(tmp_path, mode) -> None:
    with start(tmp_path, "train.py", *mode, *LONG) as process:
        run = wait_for_progress(tmp_path)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "goes on from the last checkpoint" in error
    assert "Traceback" not in error
    assert status_of(run)["state"] == "interrupted"
    assert (run / "checkpoint.pt").exists()


def test_interrupting_a_sweep_before_its_first_step_stops_it(tmp_path) -> None:
    with start(tmp_path, "train.py", "-m", *LONG) as process:
        wait_for(lambda: runs.find(tmp_path / "outputs" / "default"), "the run's folder")
        time.sleep(0.7)  # the worker is importing torch
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    (run,) = runs.find(tmp_path / "outputs" / "default")
    assert status_of(run).get("state", "interrupted") == "interrupted"


def test_a_killed_launcher_leaves_no_worker_behind(tmp_path) -> None:
    with start(tmp_path, "train.py", "-m", *LONG) as process:
        run = wait_for_progress(tmp_path)
        worker = Path("/proc") / str(status_of(run)["pid"])
        process.kill()
    wait_for(lambda: not worker.exists() or "zombie" in (worker / "status").read_text(), "the end of its worker")


def test_a_killed_worker_costs_its_run_only(tmp_path) -> None:
    with start(tmp_path, "train.py", "-m", "norm=bn", *LONG, "seed=0,1", "hydra.launcher.slots=1") as process:
        first = wait_for_progress(tmp_path)
        os.kill(status_of(first)["pid"], signal.SIGKILL)
        [second] = (run for run in runs.find(tmp_path / "outputs" / "default") if run != first)
        wait_for(lambda: status_of(second).get("step"), "a step of the other run")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert status_of(first)["state"] == "failed"
    assert "killed" in status_of(first)["error"]


def test_of_two_commands_started_together_one_trains(tmp_path) -> None:
    with start(tmp_path, "train.py", *LONG[:-1], "batch=8") as one, start(tmp_path, "train.py", *LONG) as other:
        run = wait_for_progress(tmp_path)
        loser = one if status_of(run)["pid"] == other.pid else other
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
