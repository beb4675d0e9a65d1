"""The leader of each condition, against SciPy's and statsmodels' tests and against what was planted."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from normlab.report.analysis.frames import outcomes, summarize
from normlab.report.analysis.leaders import leaders, paired_p
from normlab.report.analysis.metrics import METRICS
from normlab.report.study.load import load

ACCURACY = METRICS["test_accuracy"]


def leaders_of(folder: Path):
    study = load("study", folder)
    values = outcomes(study, ACCURACY)
    return leaders(study, ACCURACY, summarize(study.runs, values, ["final"], 0.95), 0.95)


@pytest.fixture
def plant(add_run):
    """Write runs with these accuracies in per cent by arm, one per seed; None: a run that diverged."""

    def plant(accuracies, batch=8, **settings):
        for arm, values in accuracies.items():
            for seed, value in enumerate(values):
                state = "diverged" if value is None else "done"
                add_run(arm, batch, seed, (0.1, 0.2) + ((value / 100,) if value else ()), state, **settings)

    return plant


@pytest.fixture
def outputs(tmp_path):
    return tmp_path / "outputs"


def test_the_leads_and_p_values_are_those_of_paired_tests_with_holm_over_all_pairs_of_all_conditions(plant, outputs):
    generator = np.random.default_rng(3)
    cells = {
        batch: {
            arm: list(60 + shift + 2 * generator.normal(size=5)) for arm, shift in (("bn", 6), ("gn", 3), ("in", 0))
        }
        for batch in (8, 32)
    }
    for batch, cell in cells.items():
        plant(cell, batch)
    found = leaders_of(outputs)
    pairs = [(batch, *pair) for batch in cells for pair in itertools.combinations(cells[batch], 2)]
    p = [stats.ttest_rel(cells[batch][a], cells[batch][b]).pvalue for batch, a, b in pairs]
    expected = {
        (batch, frozenset((a, b))): adjusted
        for (batch, a, b), adjusted in zip(pairs, multipletests(p, method="holm")[1], strict=True)
    }
    assert [leader.batch for leader in found] == [8, 32]
    for leader in found:
        cell = cells[leader.batch]
        assert leader.arm == max(cell, key=lambda arm: np.mean(cell[arm]))
        leads = {rival.arm: rival.lead.mean for rival in leader.rivals}
        assert leads == pytest.approx({arm: np.mean(cell[leader.arm]) - np.mean(cell[arm]) for arm in leads})
        assert list(leads.values()) == sorted(leads.values())
        for rival in leader.rivals:
            assert rival.p_holm == pytest.approx(expected[leader.batch, frozenset((leader.arm, rival.arm))])
            assert rival.seeds == (0, 1, 2, 3, 4)


def test_an_arm_that_diverged_does_not_compete_and_one_alone_leads_nothing(plant, tmp_path):
    plant({"bn": [60, 61], "gn": [90, None], "none": [50, 52]})
    plant({"bn": [60, 61], "gn": [90, None]}, batch=32)
    leader, alone = leaders_of(tmp_path / "outputs")
    assert (leader.batch, leader.arm) == (8, "bn")
    [out] = leader.out
    assert (out.arm, out.mean.mean, out.mean.n, out.states) == ("gn", 90, 1, {"done": 1, "diverged": 1})
    assert (alone.arm, alone.rivals, alone.absent) == ("bn", (), ("none",))
    assert [rival.arm for rival in leader.rivals] == ["none"]
    assert math.isnan(leader.rivals[0].p_holm)  # two seeds


def test_arms_are_compared_by_the_images_that_are_normalized_together_where_several_share_each_number(plant, tmp_path):
    plant({"bn": [60, 61], "gn": [50, 51]})
    plant({"bn": [70, 71]}, norm_batch=2)
    [leader] = leaders_of(tmp_path / "outputs")
    assert (leader.norm_batch, leader.arm) == (None, "bn (norm_batch=2)")
    plant({"gn": [72, 73]}, norm_batch=2)
    assert [(leader.norm_batch, leader.arm) for leader in leaders_of(tmp_path / "outputs")] == [
        (2, "gn (norm_batch=2)"),
        (8, "bn"),
    ]


def test_rows_without_spread_or_with_gaps_have_the_p_values_of_their_values():
    rows = np.array([[1.0, 2.0, 4.0, math.nan], [2.0, 2.0, 2.0, 2.0], [1.0, 2.0, math.nan, math.nan]])
    p = paired_p(rows)
    assert p[0] == pytest.approx(stats.ttest_1samp(rows[0, :3], 0).pvalue)
    assert p[1] == 2 / 2**4  # the sign test
    assert math.isnan(p[2])
