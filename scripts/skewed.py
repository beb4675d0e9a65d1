"""Measure how often the report's t-test calls arms of equal means different: scripts/skewed.py [STUDIES]

Each study has n paired differences whose mean is 0, tested as verdicts are: two-sided at 5 %. It is one comparison, so
there is no correction. Printed is the share of studies in which the arm is called lower and higher; 2.5 % are right.
"""

import sys
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from normlab.report.analysis.statistics import tails

Values = NDArray[np.float64]
SEEDS = (3, 5, 10, 15)
COLLAPSES = 0.1  # share of runs that end at 10 % where the others end at 90 ± 0.5 %


def collapsing(generator: np.random.Generator, size: tuple[int, int]) -> Values:
    """Return the differences of an arm that rarely collapses from a baseline that always ends at its mean."""
    fallen = generator.random(size) < COLLAPSES
    return np.where(fallen, 10.0, 90.0) + generator.normal(0, 0.5, size) - (10 * COLLAPSES + 90 * (1 - COLLAPSES))


ARMS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Values]] = {
    "normal": lambda generator, size: generator.normal(0, 1, size),
    "exponential": lambda generator, size: generator.exponential(1, size) - 1,
    "exponential, baseline too": lambda g, size: g.exponential(1, size) - g.exponential(1, size),
    "collapses in 10 % of runs": collapsing,
}


def rates(arm: str, n: int, studies: int) -> tuple[float, float]:
    """Return the shares of studies in which the arm is called lower and higher than the baseline."""
    drawn = ARMS[arm](np.random.default_rng(2026), (studies, n))
    found = [tails(list(differences)) for differences in drawn]
    wrong = [each for each in found if each.two_sided <= 0.05]
    lower = sum(each.below < each.above for each in wrong)
    return lower / studies, (len(wrong) - lower) / studies


def table(studies: int) -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"{studies:,} studies each; called lower / higher"
    yield f"{'arm':<28}" + "".join(f"{f'n = {n}':>18}" for n in SEEDS)
    for arm in ARMS:
        shares = (rates(arm, n, studies) for n in SEEDS)
        yield f"{arm:<28}" + "".join(f"{f'{lower:.1%} / {higher:.1%}':>18}" for lower, higher in shares)


if __name__ == "__main__":
    print("\n".join(table(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)))
