import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

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


def test_t_interval_of_1_2_3_worked_by_hand():
    # s = 1, t(2 degrees of freedom, 97.5 %) = 4.302653
    assert t_interval([1, 2, 3]) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5, 3))


def test_one_value_has_a_mean_and_no_interval():
    interval = t_interval([4.0])
    assert interval.mean == 4.0
    assert interval.n == 1
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_no_values_have_no_mean():
    assert math.isnan(t_interval([]).mean)
    assert t_interval([math.nan]).n == 0


def test_equal_values_have_an_interval_of_zero_width():
    assert t_interval([0.5, 0.5]) == (0.5, 0.5, 0.5, 2)


def test_paired_interval_equals_scipys_paired_t_test():
    arm, baseline = {0: 91.0, 1: 92.5, 2: 90.0}, {0: 90.0, 1: 92.0, 2: 88.0}
    expected = stats.ttest_rel(list(arm.values()), list(baseline.values())).confidence_interval(0.95)
    interval = t_interval(paired(arm, baseline))
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


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


def test_two_sided_p_equals_scipys_paired_t_test():
    generator = np.random.default_rng(0)
    arm, baseline = generator.normal(91, 1, 7), generator.normal(90, 1, 7)
    found = tails(paired(dict(enumerate(arm)), dict(enumerate(baseline)))).two_sided
    assert found == pytest.approx(stats.ttest_rel(arm, baseline).pvalue)


def test_tails_at_two_bounds_equal_statsmodels_equivalence_test():
    differences = np.random.default_rng(1).normal(0.2, 0.5, 6)
    p, above, below = DescrStatsW(differences).ttost_mean(-1, 1)
    assert tails(list(differences), -1).above == pytest.approx(above[1])
    assert tails(list(differences), 1).below == pytest.approx(below[1])
    assert max(above[1], below[1]) == p


@pytest.mark.parametrize("differences", [[0.1 + 0.2] * 5 + [0.3], [math.inf, 1.0, math.inf, -2.0, math.inf, 3.0]])
def test_without_a_spread_the_exact_sign_test_takes_the_place_of_t(differences):
    above, below = (np.array(differences) > 0).sum(), (np.array(differences) < 0).sum()
    found = tails(differences)
    assert found.above == pytest.approx(stats.binomtest(above, above + below, alternative="greater").pvalue)
    assert found.below == pytest.approx(stats.binomtest(below, above + below, alternative="greater").pvalue)
    assert found.two_sided == pytest.approx(stats.binomtest(above, above + below).pvalue)


def test_the_sign_test_leaves_out_ties():
    assert tails([math.inf, 0.0, math.inf, 0.0]).above == 0.25


def test_five_infinite_differences_are_too_few_for_two_sided_five_per_cent():
    assert tails([math.inf] * 5).two_sided == 0.0625


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


@pytest.mark.parametrize("n", [1, 2, 3, 12])
def test_holm_equals_statsmodels(n):
    for seed in range(20):
        p_values = np.random.default_rng(seed).beta(0.3, 1, n)
        assert holm(list(p_values)) == pytest.approx(multipletests(p_values, method="holm")[1])


def test_holm_passes_over_what_was_not_tested():
    first, nothing, second = holm([0.01, math.nan, 0.04])
    assert (first, second) == (0.02, 0.04)
    assert math.isnan(nothing)


CELLS = [[1.0, 2.0, 4.0], [10.0, 10.5, 13.0]]


def every_resample(n):
    return list(itertools.product(range(n), repeat=n))


def test_the_bootstrap_of_a_mean_approaches_the_enumeration_of_every_resample():
    every = [
        np.mean([np.mean([cell[i] for i in drawn]) for cell, drawn in zip(CELLS, both, strict=True)])
        for both in itertools.product(every_resample(3), repeat=2)
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


def test_the_bootstrap_of_a_probability_approaches_the_enumeration_of_every_resample_of_pairs():
    x, y = [3.0, 5.0, 7.0], [4.0, 5.0, 6.0]
    every = []
    for drawn in every_resample(3):
        wins = [Fraction(1 + (x[i] > y[j]) - (x[i] < y[j]), 2) for i in drawn for j in drawn]
        every.append(float(sum(wins) / 9))
    found = probability_of_improvement([x], [y], 0.8)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(every, [0.1, 0.9])), abs=1e-9)


def test_the_bootstrap_is_the_same_every_time():
    assert bootstrap_mean(CELLS) == bootstrap_mean(CELLS)
    assert probability_of_improvement(CELLS, CELLS) == probability_of_improvement(CELLS, CELLS)


def test_cells_are_resampled_independently_of_each_other():
    # Were one draw used for both, these two cells would cancel and the interval have no width.
    assert bootstrap_mean([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]]).high > 0.2
