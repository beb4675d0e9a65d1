"""How many seeds the report's paired t-test needs, by the noncentral t distribution."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from normlab.report.analysis.statistics import ENOUGH

POWER = 0.8  # chance that the seeds settle a comparison, if its effect and standard deviation are as planned with
MOST = 100  # seeds; more are never advised


def power(seeds: Sequence[int], effects: Sequence[float], level: float) -> NDArray[np.float64]:
    """Return the chance, per number of seeds, that tests at a two-sided level find all of these effects.

    Args:
        seeds: numbers of paired differences.
        effects: each in standard deviations of the differences, above 0. One: the test of a difference. Two: the tests
            against both ends of a margin (TOST), by the distances from them. The chance that either fails is at most
            the sum of both, and nearly that, so the power is at most a little too low.
        level: of the tests, both sides together; only a find on the side of the effect counts.
    """
    from scipy.special import nctdtr, stdtrit  # here: a report that plans nothing is quicker without scipy

    n = np.asarray(seeds, dtype=float)
    bound = -stdtrit(n - 1, level / 2)
    failed = sum(nctdtr(n - 1, effect * np.sqrt(n), bound) for effect in effects)
    return np.maximum(0.0, 1.0 - np.asarray(failed, dtype=float))


def seeds_needed(effects: Sequence[float], level: float) -> int | None:
    """Return the number of seeds for a `POWER` to find these effects; None for more than `MOST`.

    Args:
        effects: as of `power`; one that is not above 0 is never found.
        level: as of `power`.
    """
    if not all(effect > 0 for effect in effects):
        return None
    numbers = range(ENOUGH, MOST + 1)
    enough = np.flatnonzero(power(numbers, np.minimum(effects, 1e3).tolist(), level) >= POWER)
    return numbers[int(enough[0])] if len(enough) else None
