"""Does pairing by image sharpen the comparison of two arms? scripts/images.py [STUDY [OUTPUT_DIR]]

Without a study it is simulated, with one it is measured on its runs. Compared are the report's paired t-test over seeds
and McNemar's test of the images that only one arm gets right, pooled over seeds, both two-sided at 5 %. McNemar's
counts images, n counts seeds: where networks of one arm differ, images of one network are no independent evidence.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from normlab.report.analysis.statistics import tails
from normlab.report.study.load import Study, load

Bits = NDArray[np.bool_]  # (seeds, images)
SEEDS, IMAGES, STUDIES = (3, 5, 10), 2_000, 2_000
DIFFERENCES = (0.0, 0.001, 0.002, 0.005, 0.01)  # standard deviation of the networks' accuracy, as a fraction
EFFECT = 0.01


def paired_t(arm: Bits, other: Bits) -> float:
    """Return the p-value of the paired t-test of accuracies over seeds."""
    return tails(list(arm.mean(1) - other.mean(1))).two_sided


def mcnemar(arm: Bits, other: Bits) -> float:
    """Return the p-value of McNemar's (1947) test, pooled over seeds: z = (b - c) / sqrt(b + c), with correction.

    b and c are the numbers of images, over all pairs of networks, that only the arm and only the other gets right.
    """
    b, c = int((arm & ~other).sum()), int((~arm & other).sum())
    return float(2 * ndtr(-max(abs(b - c) - 1, 0) / sqrt(b + c))) if b + c else 1.0


TESTS: dict[str, Callable[[Bits, Bits], float]] = {"paired t": paired_t, "McNemar": mcnemar}


def networks(generator: np.random.Generator, chances: NDArray[np.float64], n: int, deviation: float) -> Bits:
    """Return the bits of n networks whose accuracies on unlimited images have that standard deviation.

    Args:
        generator: draws each network's skill, which all of its images share, and then its bits.
        chances: of each image to be right in an average network, (images,).
        n: number of networks.
        deviation: of accuracy.
    """
    room = np.minimum(chances, 1 - chances)  # where a network has room to be better or worse
    skill = generator.normal(0, deviation, (n, 1)) / room.mean()
    return np.asarray(generator.random((n, len(chances))) < chances + skill * room)


def rates(n: int, deviation: float, effect: float, studies: int) -> dict[str, float]:
    """Return, by test, the share of simulated studies of n seeds in which it calls the arms different.

    Images are easy or hard as those of a classifier of 92 %: a Beta(1.2, 0.1) chance each.
    """
    generator, called = np.random.default_rng(2026), dict.fromkeys(TESTS, 0)
    for _ in range(studies):
        chances = np.clip(generator.beta(1.2, 0.1, IMAGES), 0.02, 0.98)
        better = chances + effect * np.minimum(chances, 1 - chances) / np.minimum(chances, 1 - chances).mean()
        arm, other = (networks(generator, each, n, deviation) for each in (better, chances))
        for name, test in TESTS.items():
            called[name] += test(arm, other) <= 0.05
    return {name: number / studies for name, number in called.items()}


def simulated(studies: int) -> Iterator[str]:
    """Yield the lines of the simulation's table."""
    yield f"{studies:,} studies each of {IMAGES:,} images; called different, paired t / McNemar"
    yield f"{'effect, networks differ by':<30}" + "".join(f"{f'n = {n}':>18}" for n in SEEDS)
    for effect, deviation in itertools.product((0.0, EFFECT), DIFFERENCES):
        shares = (rates(n, deviation, effect, studies) for n in SEEDS)
        name = f"{100 * effect:g} points, {100 * deviation:g} points"
        yield f"{name:<30}" + "".join(f"{' / '.join(f'{each:.1%}' for each in found.values()):>18}" for found in shares)


def arms_of(study: Study) -> dict[tuple[str, int], dict[str, dict[int, NDArray[np.bool_]]]]:
    """Return the bits of each done run by setting and batch size, arm, and seed."""
    found: dict[tuple[str, int], dict[str, dict[int, NDArray[np.bool_]]]] = {}
    for run in study.runs[study.runs["run"].isin(study.correct)].itertuples():
        cell = found.setdefault((str(run.setting), int(run.batch)), {})
        cell.setdefault(str(run.arm), {})[int(run.seed)] = study.correct[str(run.run)].bits()
    return found


def same_arm(bits: Bits, size: int) -> Iterator[tuple[Bits, Bits]]:
    """Yield two groups of so many seeds of one arm, which no test should call different; each split once."""
    for chosen in itertools.combinations(range(len(bits)), 2 * size):
        for one in itertools.combinations(chosen[1:], size - 1):
            first = (chosen[0], *one)
            yield bits[list(first)], bits[[each for each in chosen if each not in first]]


def measured(study: Study, size: int = 3) -> Iterator[str]:
    """Yield the lines about a study: p-values of its arms, and how often seeds of one arm are called different."""
    for (setting, batch), arms in arms_of(study).items():
        yield f"{setting}, batch {batch}"
        for one, other in itertools.combinations(arms, 2):
            seeds = sorted(arms[one].keys() & arms[other].keys())
            pair = (np.stack([arms[name][seed] for seed in seeds]) for name in (one, other))
            yield f"  {one} against {other}, n = {len(seeds)}: {_p_values(*pair)}"
        for arm, by_seed in arms.items():
            groups = list(same_arm(np.stack(list(by_seed.values())), size))
            for name, test in TESTS.items() if groups else ():
                wrong = sum(test(*pair) <= 0.05 for pair in groups)
                yield f"  {arm} against itself, {size} seeds each: {name} calls {wrong} of {len(groups)} different"


def _p_values(arm: Bits, other: Bits) -> str:
    return ", ".join(f"{name} p = {test(arm, other):.2g}" for name, test in TESTS.items())


if __name__ == "__main__":
    print("\n".join(measured(load(*sys.argv[1:3])) if len(sys.argv) > 1 else simulated(STUDIES)))
