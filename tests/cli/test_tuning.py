"""Each arm at its own best learning rate, from the command to the report."""

import csv

import pytest
from commands import run_command

SMALL = ("model=custom", "model.target=small.SmallNet", "dataset.train_size=32", "dataset.test_size=32")


@pytest.mark.slow
def test_a_sweep_with_a_grid_is_reported_at_the_best_rates(tmp_path):
    sweep = (
        "-m",
        "+tuning=lr",
        "norm=bn,none",
        "optimizer.lr=1e-9,0.003,100",
        "epochs=1",
        "batch=16",
        *SMALL,
    )
    code, out, error = run_command(
        tmp_path, "train.py", *sweep, "dataset.val_size=30", "hydra/launcher=basic", "threads=1"
    )
    assert code == 0, out + error
    code, out, error = run_command(tmp_path, "report.py", "figures=false")
    assert code == 0, out + error
    sentence = "each arm at its best of 3 values of optimizer.lr, chosen on validation images"
    assert sentence in out
    folder = tmp_path / "outputs" / "default" / "report"
    chosen = {row["arm"]: row for row in csv.DictReader((folder / "tuned.csv").read_text().splitlines())}
    assert set(chosen) == {"bn", "none"}
    assert all(row["tuned"] == sentence and row["tried"] == "3" for row in chosen.values())
    code, out, _ = run_command(tmp_path, "report.py", "figures=false", "tuned=[]")
    assert code == 0
    assert sentence not in out
    assert not (folder / "tuned.csv").exists()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("+tuning=lrr",), "+tuning=lrr: there is no such option of tuning.\nDid you mean +tuning=lr?"),
        (("tuning=lr",), "Write +tuning=lr"),
        (("tuned=[optimizer.rate]",), "there is no setting optimizer.rate that a report could choose"),
    ],
)
def test_a_wrong_word_gets_a_hint(tmp_path, words, hint):
    code, _, error = run_command(tmp_path, "train.py", *words)
    assert code
    assert hint in error
