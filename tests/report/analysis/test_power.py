"""The number of seeds, against simulated t-tests and published numbers."""

import numpy as np
import pytest
from scipy import stats

from normlab.report.analysis.power import MOST, POWER, power, seeds_needed


@pytest.mark.parametrize(
    ("effect", "expected"), [(2.0, 5), (1.0, 10), (0.8, 15), (0.5, 34), (0.3, 90)], ids=str
)  # matched pairs, two-sided 5 %, power 0.8: G*Power (Faul et al. 2007) gives these
def test_the_number_is_that_of_published_tables(effect, expected) -> None:
    assert seeds_needed((effect,), 0.05) == expected


@pytest.mark.parametrize(
    ("n", "low", "high", "level"), [(6, 1.5, None, 0.05), (12, 1.2, 1.8, 0.01), (9, 1.3, 1.3, 0.05)]
)
def test_power_is_the_share_of_simulated_studies_that_are_called(n, low, high, level) -> None:
    drawn = np.random.default_rng(1).normal(low, 1.0, (100_000, n))
    error, bound = drawn.std(axis=1, ddof=1) / np.sqrt(n), stats.t.ppf(1 - level / 2, n - 1)
    called = drawn.mean(axis=1) / error > bound
    if high is not None:  # equality: the other end of the margin, too
        called &= (low + high - drawn.mean(axis=1)) / error > bound
    effects = (low,) if high is None else (low, high)
    assert power([n], effects, level)[0] == pytest.approx(called.mean(), abs=0.006)


def test_the_number_is_the_least_and_has_an_end() -> None:
    found = seeds_needed((0.7,), 0.01)
    before, here = power([found - 1, found], (0.7,), 0.01)
    assert before < POWER <= here
    assert seeds_needed((0.2,), 0.05) is None  # 199
    assert seeds_needed((0.0,), 0.05) is None
    assert seeds_needed((1e9,), 0.05) == 3
    assert MOST == 100
