"""The rates that docs/statistics.md gives of skewed differences."""

import pytest
import skewed


@pytest.mark.parametrize("n", [3, 10])
def test_an_arm_that_rarely_collapses_is_called_higher_wherever_no_run_of_the_study_collapsed(n):
    lower, higher = skewed.rates("collapses in 10 % of runs", n, 1000)
    assert higher == pytest.approx(0.9**n, abs=0.05)
    assert lower < 0.01


def test_of_normal_differences_each_side_is_called_in_a_fortieth_of_studies():
    assert skewed.rates("normal", 5, 2000) == pytest.approx((0.025, 0.025), abs=0.012)
