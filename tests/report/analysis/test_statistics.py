import itertools
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from normlab.report.analysis.statistics import (
    RESAMPLES,
    SEED,
    bootstrap_mean,
    effect_size,
    holm,
    paired,
    probability_of_improvement,
    t_interval,
    tails,
)


@pytest.mark.parametrize("n", [2, 3, 15])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_t_interval_equals_scipy_stats(n, confidence):
    sample = np.random.default_rng(n).normal(90, 2, n)
    low, high = stats.t.interval(confidence, n - 1, sample.mean(), stats.sem(sample))
    assert t_interval(sample, confidence) == pytest.approx((sample.mean(), low, high, n))


def test_too_few_values_have_no_interval_and_equal_ones_one_of_zero_width():
    assert t_interval([4.0]) == pytest.approx((4.0, math.nan, math.nan, 1), nan_ok=True)
    for nothing in ([], [math.nan]):
        assert t_interval(nothing) == pytest.approx((math.nan, math.nan, math.nan, 0), nan_ok=True)
    assert t_interval([0.5, 0.5]) == (0.5, 0.5, 0.5, 2)


def test_pairs_are_of_the_same_seed_and_only_of_seeds_that_both_have():
    arm, baseline = {3: 10.0, 1: 5.0, 7: 99.0}, {1: 4.0, 3: 8.0, 5: -99.0}
    interval = t_interval(paired(arm, baseline))
    assert interval.n == 2
    assert interval.mean == pytest.approx(1.5)  # of 10 - 8 and 5 - 4


@pytest.mark.parametrize("n", [3, 5, 15])
@pytest.mark.parametrize("bound", [0.0, 1.0, -2.5])
def test_tails_equal_scipys_one_sample_t_tests(n, bound):
    differences = np.random.default_rng(n).normal(1, 2, n)
    found = tails(list(differences), bound)
    assert found.above == pytest.approx(stats.ttest_1samp(differences, bound, alternative="greater").pvalue)
    assert found.below == pytest.approx(stats.ttest_1samp(differences, bound, alternative="less").pvalue)
    assert found.two_sided == pytest.approx(stats.ttest_1samp(differences, bound).pvalue)


@pytest.mark.parametrize("differences", [[0.1 + 0.2] * 5 + [0.3], [math.inf, 1.0, math.inf, -2.0, math.inf, 3.0]])
def test_without_a_spread_the_exact_sign_test_takes_the_place_of_t(differences):
    above, below = (np.array(differences) > 0).sum(), (np.array(differences) < 0).sum()
    found = tails(differences)
    assert found.above == pytest.approx(stats.binomtest(above, above + below, alternative="greater").pvalue)
    assert found.below == pytest.approx(stats.binomtest(below, above + below, alternative="greater").pvalue)
    assert found.two_sided == pytest.approx(stats.binomtest(above, above + below).pvalue)


def test_the_sign_test_leaves_out_ties():
    assert tails([math.inf, 0.0, math.inf, 0.0]).above == 0.25


def test_differences_of_one_computation_that_are_all_0_are_between_any_bounds_around_0_and_on_no_side_of_it():
    assert tails([0.0] * 3, -1, exact=True).above == tails([0.0] * 3, 1, exact=True).below == 0
    assert tails([0.0] * 3, exact=True).two_sided == 1
    assert tails([0.0] * 3, -1, exact=True).below == 1


def test_other_differences_that_are_all_0_are_judged_by_the_sign_test():
    assert tails([0.0] * 5, -1).above == tails([0.0] * 5, 1).below == 2**-5
    assert tails([0.0] * 5).two_sided == 1


def test_effect_size_is_the_mean_in_standard_deviations():
    assert effect_size([1.0, 2.0, 3.0]) == 2
    assert effect_size([1.0, 2.0, 3.0], reference=1) == 1
    assert math.isnan(effect_size([1.0, 1.0, 1.0]))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3, 12])
def test_holm_equals_statsmodels(n):
    for seed in range(5):
        p_values = np.random.default_rng(seed).beta(0.3, 1, n)
        assert holm(list(p_values)) == pytest.approx(multipletests(p_values, method="holm")[1])


def test_holm_passes_over_what_was_not_tested():
    first, nothing, second = holm([0.01, math.nan, 0.04])
    assert (first, second) == (0.02, 0.04)
    assert math.isnan(nothing)


CELLS = [[1.0, 2.0, 4.0], [10.0, 10.5, 13.0]]


def test_the_bootstrap_of_a_mean_approaches_the_enumeration_of_every_resample():
    every = [
        np.mean([np.mean([cell[i] for i in drawn]) for cell, drawn in zip(CELLS, both, strict=True)])
        for both in itertools.product(itertools.product(range(3), repeat=3), repeat=2)
    ]
    found = bootstrap_mean(CELLS, 0.9)
    assert found.mean == pytest.approx(np.mean([7 / 3, 33.5 / 3]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(every, [0.05, 0.95])), abs=0.1)
    assert found.n == 6


def test_cells_weigh_the_same_whatever_their_number_of_seeds():
    assert bootstrap_mean([[1.0], [4.0, 4.0, 4.0]]).mean == 2.5


def test_the_interval_of_a_probability_of_improvement_is_that_of_all_pairs_of_drawn_seeds():
    generator = np.random.default_rng(1)
    x, y = generator.integers(5, size=(2, 7)).astype(float)  # with ties
    drawn = np.random.default_rng(SEED).spawn(1)[0].integers(7, size=(RESAMPLES, 7))
    ahead = [np.mean([(x[i] > y[j]) + 0.5 * (x[i] == y[j]) for i in row for j in row]) for row in drawn]
    found = probability_of_improvement([x], [y], 0.9)
    assert (found.low, found.high) == tuple(np.quantile(ahead, [(1 - 0.9) / 2, (1 + 0.9) / 2]))


def test_the_probability_of_improvement_is_mann_whitneys_averaged_over_cells():
    arm, baseline = [[3.0, 5.0, 7.0], [1.0, 1.0, 2.0]], [[4.0, 5.0, 6.0], [2.0, 1.0, 0.0]]
    by_scipy = [stats.mannwhitneyu(x, y).statistic / 9 for x, y in zip(arm, baseline, strict=True)]
    assert probability_of_improvement(arm, baseline).mean == pytest.approx(np.mean(by_scipy))


def test_the_bootstrap_is_the_same_every_time():
    assert bootstrap_mean(CELLS) == bootstrap_mean(CELLS)
    assert probability_of_improvement(CELLS, CELLS) == probability_of_improvement(CELLS, CELLS)


def test_cells_are_resampled_independently_of_each_other():
    # Were one draw used for both, these two cells would cancel and the interval have no width.
    assert bootstrap_mean([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]]).high > 0.2
