"""The statistics of the report, from numbers to numbers. docs/statistics.md explains which is used where, and why.

Means with Student's t-intervals, plain and paired by seed; tests of paired differences against a bound; Holm's
correction for several of them; and, over many cells at once, stratified bootstrap intervals of a mean and of the
probability of improvement (Agarwal et al. 2021, "Deep RL at the edge of the statistical precipice").
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

ENOUGH = 3  # seeds: with fewer, a difference cannot be told from chance
TOO_FEW = "no interval worth the name; a difference cannot be told from chance"
RESAMPLES = 2_000
SEED = 0  # of the bootstrap: a report of the same runs is the same to the byte

Cells = Sequence[Sequence[float]]
Bounds = tuple[float, float]  # the lowest and the highest value that a quantity can have
UNBOUNDED: Bounds = (-math.inf, math.inf)


class Interval(NamedTuple):
    """A mean and its two-sided interval; `low` and `high` are nan where too few values allow none."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def is_cut(self) -> bool:
        """Return whether an end was cut at a bound, so that the mean is not in the middle."""
        below, above = self.mean - self.low, self.high - self.mean
        return not math.isnan(below) and not math.isclose(below, above, rel_tol=1e-6, abs_tol=1e-9 * abs(self.mean))


class Tails(NamedTuple):
    """One-sided p-values against a bound: small `above` speaks for a mean above it, small `below` for one below."""

    above: float
    below: float

    @property
    def two_sided(self) -> float:
        """Return the two-sided p-value."""
        return min(1.0, 2 * min(self))


def t_interval(values: Iterable[float], confidence: float = 0.95, bounds: Bounds = UNBOUNDED) -> Interval:
    """Return the mean of the values that are not nan, plus or minus t(n-1) * s / sqrt(n), cut at the bounds.

    The true mean lies within the bounds, so what is cut off covers nothing: the level stays as it is.
    """
    sample = np.asarray(list(values), dtype=float)
    sample = sample[~np.isnan(sample)]
    n = len(sample)
    with np.errstate(invalid="ignore", over="ignore"):
        mean, deviation = float(sample.mean()) if n else math.nan, float(sample.std(ddof=1)) if n > 1 else math.nan
    if n < 2 or not math.isfinite(deviation):
        return Interval(mean, math.nan, math.nan, n)
    from scipy.special import stdtrit  # here: a report of single seeds is quicker without scipy

    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * deviation / math.sqrt(n)
    return Interval(mean, min(mean, max(mean - half, bounds[0])), max(mean, min(mean + half, bounds[1])), n)


def contrast_bounds(weights: Iterable[float], bounds: Bounds) -> Bounds:
    """Return the bounds of a weighted sum of values within `bounds`: of a difference of accuracies -100 and 100."""
    if math.inf in map(abs, bounds):
        return UNBOUNDED
    ends = [sorted((weight * bounds[0], weight * bounds[1])) for weight in weights]
    return sum(low for low, _ in ends), sum(high for _, high in ends)


def paired(arm: Mapping[int, float], baseline: Mapping[int, float]) -> list[float]:
    """Return arm minus baseline, per seed (the keys) that both have a value of."""
    differences = [arm[seed] - baseline[seed] for seed in sorted(arm) if seed in baseline]
    return [difference for difference in differences if not math.isnan(difference)]


def spread(differences: Sequence[float]) -> float:
    """Return the standard deviation; 0 where all are the same up to rounding, nan where it does not exist."""
    sample = np.asarray(differences, dtype=float)
    if len(sample) < 2 or not np.isfinite(sample).all():
        return math.nan
    with np.errstate(over="ignore"):
        deviation = float(sample.std(ddof=1))
    return deviation if deviation > 1e-9 * float(np.abs(sample).max()) else 0.0


def tails(differences: Sequence[float], bound: float = 0.0, exact: bool = False) -> Tails:
    """Test whether the mean of paired differences is above or below the bound: Student's t, n-1 degrees of freedom.

    Where t has no spread to go by, because all differences are the same or some are infinite (a loss after a
    divergence), the exact sign test takes its place: differences above against below, those at the bound left out.
    `exact`: they are those of one computation with itself; then, if all are exactly 0, nothing is left to chance.
    """
    n, s = len(differences), spread(differences)
    if exact and n and not any(differences):
        return Tails(float(bound >= 0), float(bound <= 0))
    if s > 0:
        from scipy.special import stdtr

        t = (float(np.mean(differences)) - bound) / (s / math.sqrt(n))
        return Tails(float(stdtr(n - 1, -t)), float(stdtr(n - 1, t)))
    above = sum(difference > bound for difference in differences)
    below = sum(difference < bound for difference in differences)
    return Tails(_at_least(above, above + below), _at_least(below, above + below))


def _at_least(k: int, n: int) -> float:
    """Return the probability of k or more heads in n throws of a coin."""
    return float(sum(math.comb(n, i) for i in range(k, n + 1)) / 2**n)


def effect_size(differences: Sequence[float], reference: float = 0.0) -> float:
    """Return Cohen's d_z = (mean - reference) / standard deviation of the differences, without Hedges' correction."""
    s = spread(differences)
    return (float(np.mean(differences)) - reference) / s if s > 0 else math.nan


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's (1979) step-down adjustment of the p-values that are not nan; nan stays nan."""
    adjusted = [math.nan] * len(p_values)
    ranked = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    largest = 0.0
    for rank, (p, i) in enumerate(ranked):
        largest = max(largest, min(1.0, (len(ranked) - rank) * p))
        adjusted[i] = largest
    return adjusted


def bootstrap_mean(cells: Cells, confidence: float = 0.95) -> Interval:
    """Return the mean over cells of each cell's mean, with its stratified percentile bootstrap interval.

    Seeds are drawn with replacement within each cell; the cells stay. For the interval of a difference, give the cells'
    paired differences: a pair is then drawn as one. n counts values.
    """
    samples = [np.asarray(cell, dtype=float) for cell in cells]
    return _percentiles(samples, [sample[drawn].mean(1) for sample, drawn in _resamples(samples)], confidence)


def probability_of_improvement(arm: Cells, baseline: Cells, confidence: float = 0.95) -> Interval:
    """Return P(arm > baseline), averaged over cells, with its stratified percentile bootstrap interval; n counts pairs.

    In each cell the Mann-Whitney form: the share of all (arm, baseline) pairs of runs in which the arm is
    ahead, ties as one half (Agarwal et al. 2021). The two lists of a cell are paired by seed and seeds are
    drawn for both at once: arms share what a seed brings.
    """
    pairs = [np.asarray(pair, dtype=float) for pair in zip(arm, baseline, strict=True)]
    wins = [(x[:, None] > y) + 0.5 * (x[:, None] == y) for x, y in pairs]
    draws = []
    for win, drawn in _resamples(wins):
        n = len(win)
        apart = drawn + n * np.arange(RESAMPLES)[:, None]
        # How often each seed is drawn in each resample; all pairs of drawn ones would take n² numbers a resample.
        times = np.bincount(apart.ravel(), minlength=n * RESAMPLES).reshape(RESAMPLES, n).astype(float)
        draws.append((times @ win * times).sum(1) / n**2)
    return _percentiles(wins, draws, confidence)


def _resamples(samples: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield each sample with the indices of its resamples, one row per resample."""
    for sample, generator in zip(samples, np.random.default_rng(SEED).spawn(len(samples)), strict=True):
        yield sample, generator.integers(len(sample), size=(RESAMPLES, len(sample)))


def _percentiles(samples: Sequence[Any], draws: Sequence[Any], confidence: float) -> Interval:
    """Return the mean over samples with the percentiles of the mean over their draws."""
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = np.quantile(np.mean(draws, axis=0), [(1 - confidence) / 2, (1 + confidence) / 2])
        mean = float(np.mean([sample.mean() for sample in samples]))
    return Interval(mean, float(low), float(high), sum(map(len, samples)))
