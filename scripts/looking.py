"""Measure what looking again after adding seeds does to the rate of false verdicts: scripts/looking.py [STUDIES]

A study has one comparison and 5 seeds, whose paired differences are normal with standard deviation 1, tested two-sided.
Where that is inconclusive, seeds are added by a rule and it is tested again. Printed is, per rule, the share of studies
that call the arms different at any look: of arms that are alike (5 % are right), and of arms that are 1 apart.
"""

import sys
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

from normlab.report.analysis.power import seeds_needed

Values = NDArray[np.float64]
FIRST, MOST, ALPHA = 5, 105, 0.05
Rule = Callable[
    [Values], int
]  # from the differences of a study that has MOST seeds: 1, 2: the look that calls; 0: none


def p_value(values: Values) -> float:
    """Return the two-sided p-value of Student's t-test."""
    t = values.mean() / (values.std(ddof=1) / np.sqrt(len(values)))
    return float(2 * stdtr(len(values) - 1, -abs(t)))


def once(values: Values) -> int:
    """Look at the first seeds."""
    return int(p_value(values[:FIRST]) <= ALPHA)


def again(step: int, looks: int) -> Rule:
    """Add so many seeds at a time and test all of them, at most so many looks in all."""

    def rule(values: Values) -> int:
        called = (p_value(values[: FIRST + step * look]) <= ALPHA for look in range(looks))
        return next((1 + (look > 0) for look, found in enumerate(called) if found), 0)

    return rule


def advised(values: Values) -> int:
    """Return how many seeds `report.py next` asks for, 0 where it says that more are hopeless."""
    first = values[:FIRST]
    return seeds_needed((abs(float(first.mean())) / float(first.std(ddof=1)),), ALPHA / 2) or 0


def pooled(values: Values) -> int:
    """Add as many seeds as advised, and test all together."""
    number = 0 if once(values) else advised(values)
    return 1 if once(values) else 2 * int(number > 0 and p_value(values[: FIRST + number]) <= ALPHA)


def alone(first_level: float) -> Rule:
    """Add as many seeds as advised, and test them by themselves at half the level."""

    def rule(values: Values) -> int:
        if p_value(values[:FIRST]) <= first_level:
            return 1
        number = advised(values)
        return 2 * int(number > 0 and p_value(values[FIRST : FIRST + number]) <= ALPHA / 2)

    return rule


RULES: dict[str, Rule] = {
    "5 seeds, one look": once,
    "5 more, all 10 tested": again(5, 2),
    "5 more up to four times, all tested": again(5, 5),
    "one more at a time up to 50, all tested": again(1, 46),
    "as many as `next` says, all tested": pooled,
    "as many as `next` says, these alone at 2.5 %": alone(ALPHA),
    "the same, the first look at 2.5 %, too": alone(ALPHA / 2),
}


def rates(name: str, effect: float, studies: int) -> tuple[float, float]:
    """Return the share of studies that a rule calls different at any look, and at a look after the first."""
    drawn = np.random.default_rng(2026).normal(effect, 1.0, (studies, MOST))
    looks = np.array([RULES[name](values) for values in drawn])
    return float((looks > 0).mean()), float((looks > 1).mean())


def table(studies: int) -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"{studies:,} studies each; called different (after the first look)"
    yield f"{'rule':<46}{'alike':>18}{'1 sd apart':>18}"
    for name in RULES:
        shares = (rates(name, effect, studies) for effect in (0.0, 1.0))
        yield f"{name:<46}" + "".join(f"{f'{every:.1%} ({later:.1%})':>18}" for every, later in shares)


if __name__ == "__main__":
    print("\n".join(table(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)))
