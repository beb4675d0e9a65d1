"""Measure what choosing an arm's best value does to its accuracy: scripts/selection.py [STUDIES]

All values of an arm are equally good: an accuracy of 90 %. A run's own accuracy differs from that by 0.5 points (one
standard deviation), and what 300 validation and 1,000 test images show of it by their sampling. The value with the best
mean over seeds is chosen on test images, or on validation images. Printed are the mean error of the reported accuracy
in points, which is 0 without a choice, and how often the arm is called higher than another that had one value (paired
t-test, two-sided at 5 %: 2.5 % are right). `fresh seeds`: chosen on validation images, reported of runs that had no
part in the choice.
"""

import sys
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Accuracies = NDArray[np.float64]
TRUE, RUNS, VALIDATION, TEST = 90.0, 0.5, 300, 1000
SEEDS, VALUES = (3, 5, 10), (1, 7, 20)


def shown(generator: np.random.Generator, runs: Accuracies, images: int) -> Accuracies:
    """Return the accuracies in per cent that so many images show of runs."""
    return 100 * generator.binomial(images, np.clip(runs / 100, 0, 1)) / images


def errors(seeds: int, values: int, studies: int) -> Iterator[tuple[str, float, float]]:
    """Yield the way of choosing, the mean error in points, and the share of studies that call the arm higher."""
    generator = np.random.default_rng(2026)
    runs = generator.normal(TRUE, RUNS, (studies, values, seeds))
    on_test, on_validation = shown(generator, runs, TEST), shown(generator, runs, VALIDATION)
    other = shown(generator, generator.normal(TRUE, RUNS, (studies, seeds)), TEST)
    fresh = shown(generator, generator.normal(TRUE, RUNS, (studies, seeds)), TEST)
    every = np.arange(studies)
    for name, reported in (
        ("on test", on_test[every, on_test.mean(2).argmax(1)]),
        ("on validation", on_test[every, on_validation.mean(2).argmax(1)]),
        ("fresh seeds", fresh),
    ):
        difference = reported - other
        half = stdtrit(seeds - 1, 0.975) * difference.std(1, ddof=1) / np.sqrt(seeds)
        yield name, float(reported.mean()) - TRUE, float((difference.mean(1) > half).mean())


def table(studies: int) -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"{studies:,} studies each; error of the reported accuracy in points / called higher"
    yield f"{'chosen':<16}{'values':>7}" + "".join(f"{f'n = {n}':>18}" for n in SEEDS)
    for values in VALUES:
        found = [{name: rest for name, *rest in errors(n, values, studies)} for n in SEEDS]
        for name in found[0]:
            cells = "".join(f"{f'{each[name][0]:+.2f} / {each[name][1]:.1%}':>18}" for each in found)
            yield f"{name:<16}{values:>7}{cells}"


if __name__ == "__main__":
    print("\n".join(table(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)))
