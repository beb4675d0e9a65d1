import math

import numpy as np
import pytest
from scipy import stats

from normlab.report.statistics import paired_t_interval, t_interval


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
    interval = paired_t_interval(arm, baseline)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_pairs_are_of_the_same_seed_and_only_of_seeds_that_both_have():
    arm, baseline = {3: 10.0, 1: 5.0, 7: 99.0}, {1: 4.0, 3: 8.0, 5: -99.0}
    interval = paired_t_interval(arm, baseline)
    assert interval.n == 2
    assert interval.mean == pytest.approx(1.5)  # of 10 - 8 and 5 - 4
