"""The real commands, end to end: a sweep of small runs on digits, its repetition, its report."""

import pytest
from conftest import composed
from launchers.commands import SMALL, command, status_of

from normlab import runs
from normlab.training.run import train_run

SWEEP = ("train.py", "-m", "norm=bn,affine,bnminus,none", "batch=8,32,128", *SMALL)


@pytest.mark.slow
def test_a_sweep_leaves_records_and_is_skipped_when_it_is_repeated(tmp_path) -> None:
    code, _, error = command(tmp_path, *SWEEP, "hydra.launcher.slots=1")
    assert code == 0, error
    assert "12 of 12 runs finished" in error
    assert "[12/12]" in error
    found = runs.find(tmp_path / "outputs" / "default")
    assert len(found) == 12
    for folder in found:
        assert status_of(folder)["state"] == "done"
        rows, warnings = runs.read_metrics(folder)
        assert [row["epoch"] for row in rows] == [1, 2]
        assert not warnings
        record = {"config.yaml", "metrics.jsonl", "provenance.json", "run.log", "status.json"}
        assert {path.name for path in folder.iterdir()} == record
    assert len({status_of(folder)["pid"] for folder in found}) == 1, "a worker does one run after the other"

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("outputs/default/*/*")}
    code, out, error = command(tmp_path, *SWEEP)
    assert code == 0, error
    assert "12 of 12 runs are finished and skipped." in out
    code, out, error = command(tmp_path, "train.py", "norm=bn", "batch=32", *SMALL)  # the same place
    assert code == 0, error
    assert "is finished" in out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("outputs/default/*/*")} == before


@pytest.mark.slow
def test_hydras_own_launcher_gives_the_same_runs_and_they_have_a_report(tmp_path) -> None:
    norms = ("bn", "none")
    arguments = ("norm=bn,none", "batch=16,32", "hydra/launcher=basic", *SMALL)
    code, _, error = command(tmp_path, "train.py", "-m", *arguments)
    assert code == 0, error
    for norm in norms:
        config = composed(f"norm={norm}", "batch=32", *SMALL, f"output_dir={tmp_path / 'here'}")
        twin = tmp_path / "outputs" / "default" / runs.Run(config.as_dict()).name
        assert train_run(config)["weights_sha256"] == status_of(twin)["weights_sha256"]
    code, out, error = command(tmp_path, "report.py")
    assert code == 0, error
    assert "4 done" in out
    assert "index.html" in out
    report = tmp_path / "outputs" / "default" / "report"
    accuracy = (report / "accuracy.md").read_text()
    assert all(word in accuracy for word in (*norms, "batch 16", "batch 32", "digits, small"))
    assert (report / "accuracy_against_batch.png").read_bytes().startswith(b"\x89PNG")
