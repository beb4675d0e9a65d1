"""Which cells stand out: the rule of bold and underlined means, case by case."""

import math

import pandas as pd
import pytest

from normlab.report.analysis.highlight import highlights
from normlab.report.analysis.metrics import ACCURACY
from normlab.report.analysis.tables import build_tables
from normlab.report.study import load

NAN = math.nan


def cell(mean, low=NAN, high=NAN, n=1, diverged=0, done=None, missing=0, **place):
    place = {"setting": "digits", "arm": "bn", "batch": 8, "quantity": "final", **place}
    return place | {
        "mean": mean, "low": low, "high": high, "n": n,
        "done": n if done is None else done, "diverged": diverged, "missing": missing,
    }  # fmt: skip


def found(*cells, **higher_is_better):
    return highlights(pd.DataFrame(cells), higher_is_better or {"final": True})


def test_the_highest_accuracy_is_best_and_what_lies_in_its_interval_close():
    cells = [cell(90.0, 88.0, 92.0, 3), cell(88.0, 80.0, 96.0, 3), cell(87.9, 87.0, 88.8, 3)]
    assert found(*cells) == ["best", "close", ""]


def test_the_lowest_loss_is_best():
    cells = [cell(1.0, 0.5, 1.5, 3), cell(1.4, 1.0, 1.8, 3), cell(2.0, 1.0, 3.0, 3)]
    assert found(*cells, final=False) == ["best", "close", ""]


def test_one_seed_has_a_best_and_nothing_close_to_it():
    assert found(cell(90.0), cell(89.99)) == ["best", ""]


def test_exact_ties_are_all_best_and_rounding_makes_no_difference():
    assert found(cell(0.1 + 0.2), cell(0.3), cell(0.29)) == ["best", "best", ""]


@pytest.mark.parametrize("survivors", [{"diverged": 1}, {"done": 3}])
def test_a_mean_of_survivors_does_not_compete(survivors):
    assert found(cell(95.0, 94.0, 96.0, 2, **survivors), cell(90.0), cell(80.0)) == ["", "best", ""]


def test_an_arm_with_runs_that_are_missing_competes():
    assert found(cell(95.0, missing=2), cell(90.0)) == ["best", ""]


@pytest.mark.parametrize("other", [cell(NAN, n=0), cell(95.0, diverged=1), cell(math.inf)])
def test_one_arm_alone_is_not_the_best_of_any(other):
    assert found(cell(90.0), other) == ["", ""]


def test_only_what_shares_setting_batch_and_quantity_is_compared():
    pairs = [{"setting": "cifar10"}, {"batch": 32}, {"quantity": "best"}]
    cells = [cell(90.0), cell(80.0)] + [cell(value, **place) for place in pairs for value in (10.0, 20.0)]
    assert found(*cells, final=True, best=False) == ["best", "", "", "best", "", "best", "best", ""]


def test_a_quantity_without_a_direction_has_no_best():
    assert found(cell(90.0, quantity="gap"), cell(80.0, quantity="gap")) == ["", ""]


def test_a_study_has_its_best_cells_marked_in_every_table_that_has_some(add_run, study):
    for batch in (8, 32):
        for seed, noise in enumerate((0.0, 0.01, 0.02)):
            add_run("bn", batch, seed, (0.5, 0.8, 0.9 + noise))
            add_run("none", batch, seed, (0.5, 0.85, 0.6 + noise))
            lost = (batch, seed) == (8, 0)
            add_run("gn", batch, seed, (0.1,) if lost else (0.5, 0.8, 0.97), state="diverged" if lost else "done")
    tables = {t.name: t.rows["digits, resnet18"] for t in build_tables(load(study), ACCURACY, "bn", (0.8,), 0.95)}
    at = {row["arm"].text: (row["batch 8"].highlight, row["batch 32"].highlight) for row in tables["accuracy"]}
    assert at == {"bn": ("best", ""), "none": ("", ""), "gn": ("", "best")}
    convergence = {(r["arm"].text, r["batch"].text): r for r in tables["convergence"]}
    assert convergence["bn", "8"]["final (%)"].highlight == convergence["bn", "8"]["best (%)"].highlight == "best"
    assert {row["train (%)"].highlight for row in tables["convergence"]} == {""}
    epochs = {(r["arm"].text, r["batch"].text): r["80 %"].highlight for r in tables["epochs_to_accuracy"]}
    assert (epochs["bn", "8"], epochs["none", "8"], epochs["gn", "8"]) == ("best", "best", "")
    assert {c.highlight for name in ("difference", "cost") for row in tables[name] for c in row.values()} == {""}
