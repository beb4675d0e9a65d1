"""The statistics of the report: means with Student's t-intervals, plain and paired by seed."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and its two-sided t-interval; `low` and `high` are nan for fewer than two values."""

    mean: float
    low: float
    high: float
    n: int


def t_interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
    """Mean of the values that are not nan, plus or minus t(n-1) * s / sqrt(n)."""
    sample = np.asarray(list(values), dtype=float)
    sample = sample[~np.isnan(sample)]
    n = len(sample)
    mean = float(sample.mean()) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    from scipy.special import stdtrit  # here: a report of single seeds is quicker without scipy

    half = float(stdtrit(n - 1, (1 + confidence) / 2) * sample.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def paired_t_interval(arm: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95) -> Interval:
    """The t-interval of arm minus baseline over the seeds (the keys) that both have; n counts pairs."""
    return t_interval([arm[seed] - baseline[seed] for seed in arm if seed in baseline], confidence)
