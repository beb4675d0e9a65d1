"""The best arm under each condition of a study, and its lead over every other arm, tested by seed."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from normlab.report.analysis.frames import CELL, named_rows, outcomes
from normlab.report.analysis.highlight import complete
from normlab.report.analysis.metrics import Metric
from normlab.report.analysis.statistics import ENOUGH, Interval, holm, t_interval, tails
from normlab.report.study.arms import without_norm_batch
from normlab.report.study.load import Study

_NOT_COMPARED_BY_IT = -1


class Rival(NamedTuple):
    """Another arm and the leader's lead over it, above 0 whichever direction is better, on the seeds that both have.

    Attributes:
        p_holm: of the two-sided paired t-test, with Holm's correction over all pairs of arms under all conditions of
            the study, because the pair is chosen by its results; nan for fewer than 3 seeds.
    """

    arm: str
    lead: Interval
    p_holm: float
    seeds: tuple[int, ...]


class Out(NamedTuple):
    """An arm that has runs and does not compete: some diverged or lack the value, or none is done.

    Attributes:
        mean: of those runs that have the value.
        states: the number of its runs in each state.
    """

    arm: str
    mean: Interval
    states: Mapping[str, int]


class Leader(NamedTuple):
    """The arm with the best mean under one condition.

    Attributes:
        norm_batch: how many images are normalized together, where the arms of a batch size are compared by it.
        arm: "" where none competes.
        mean: its mean and interval.
        rivals: the other arms that compete, the nearest first.
        out: arms that do not.
        absent: arms without a run here, of those that have one in this setting or lead under another condition.
    """

    setting: str
    batch: int
    norm_batch: int | None
    arm: str
    mean: Interval
    rivals: tuple[Rival, ...]
    out: tuple[Out, ...] = ()
    absent: tuple[str, ...] = ()


def leaders(study: Study, metric: Metric, tidy: pd.DataFrame, confidence: float) -> list[Leader]:
    """Return the leader under each condition (setting, batch size) that has a run, also where fewer than two compete.

    Args:
        study: the study.
        metric: that it is compared by.
        tidy: the frame of the metric's means.
        confidence: of the intervals.
    """
    if tidy.empty:
        return []
    values = outcomes(study, metric).dropna(subset=[metric.epoch])
    samples = {cell: dict(zip(g["seed"], g[metric.epoch], strict=True)) for cell, g in values.groupby(CELL)}
    rows = tidy.assign(competes=complete(tidy), norm_batch=_norm_batches(study, tidy))
    states = _states(study)
    rows = rows[[cell in states for cell in zip(*(rows[key] for key in CELL), strict=True)]]
    sign = 1.0 if metric.higher_is_better else -1.0
    places, here, tested = [], [], []
    for place, group in rows.groupby(["setting", "batch", "norm_batch"], sort=False):
        arms = group[group["competes"]]
        by_seed = pd.DataFrame({arm: pd.Series(samples[place[0], arm, place[1]]) for arm in arms["arm"]}).sort_index()
        by_seed *= sign  # so that more is better
        first, second = np.triu_indices(len(arms), 1)
        matrix = by_seed.to_numpy(dtype=float).T
        places.append(place)
        here.append((group, arms, by_seed))
        tested.append(paired_p(matrix[first] - matrix[second]))
    adjusted = np.split(np.array(holm([p for ps in tested for p in ps])), np.cumsum([len(ps) for ps in tested])[:-1])
    found = [
        _leader(place, compared, p, metric, confidence)
        for place, (_, *compared), p in zip(places, here, adjusted[: len(here)], strict=True)
    ]
    leading = pd.Series([leader.arm for leader in found if leader.rivals], dtype=object)
    told = []
    for leader, place, (group, *_) in zip(found, places, here, strict=True):
        expected = pd.concat([rows["arm"][rows["setting"] == leader.setting], leading])
        told.append(leader._replace(**_others(place, group, expected, states)))
    settings = {setting: i for i, setting in enumerate(dict.fromkeys(rows["setting"]))}
    return sorted(told, key=lambda leader: (settings[leader.setting], leader.batch, leader.norm_batch or 0))


def _leader(
    place: Any,
    compared: Sequence[pd.DataFrame],
    p: NDArray[np.float64],
    metric: Metric,
    confidence: float,
) -> Leader:
    arms, by_seed = compared
    own = (place[0], int(place[1]), None if place[2] == _NOT_COMPARED_BY_IT else int(place[2]))
    if arms.empty:
        return Leader(*own, "", Interval(math.nan, math.nan, math.nan, 0), ())
    of_pair = np.full((len(arms), len(arms)), math.nan)
    of_pair[np.triu_indices(len(arms), 1)] = p
    means = arms["mean"].to_numpy()
    best = int(means.argmax() if metric.higher_is_better else means.argmin())
    row = next(named_rows(arms.iloc[[best]]))
    rivals = []
    for i, arm in enumerate(arms["arm"]):
        if i == best:
            continue
        minus = (by_seed[row.arm] - by_seed[arm]).dropna()
        lead = t_interval(minus, confidence, metric.difference_bounds)
        rivals.append(Rival(arm, lead, float(of_pair[min(i, best), max(i, best)]), tuple(map(int, minus.index))))
    nearest = sorted(rivals, key=lambda rival: (math.isnan(rival.lead.mean), rival.lead.mean))
    return Leader(*own, row.arm, Interval(row.mean, row.low, row.high, row.n), tuple(nearest))


def _others(
    place: Any, group: pd.DataFrame, expected: pd.Series, states: Mapping[tuple[Any, ...], Mapping[str, int]]
) -> dict[str, Any]:
    """Return the arms that do not compete under a condition, and those of the expected ones that have no run there."""
    out = tuple(
        Out(row.arm, Interval(row.mean, row.low, row.high, row.n), states[row.setting, row.arm, row.batch])
        for row in named_rows(group[~group["competes"]])
    )
    by_norm_batch = place[2] != _NOT_COMPARED_BY_IT
    here, everywhere = (
        list(dict.fromkeys(without_norm_batch(arm) if by_norm_batch else arm for arm in arms))
        for arms in (group["arm"], expected)
    )
    return {"out": out, "absent": tuple(arm for arm in everywhere if arm not in here)}


def _states(study: Study) -> dict[tuple[Any, ...], Counter[str]]:
    """Return the states of the runs of each cell that has any."""
    found: dict[tuple[Any, ...], Counter[str]] = defaultdict(Counter)
    for run in named_rows(study.placed):
        if run.run:
            found[run.setting, run.arm, int(run.batch)][str(run.state)] += 1
    return found


def paired_p(differences: NDArray[np.float64]) -> list[float]:
    """Return the two-sided p-value of Student's t of each row, as `statistics.tails` has it; nan below 3 values.

    Args:
        differences: one row per pair of arms, one column per seed, nan where one of both has no value.
    """
    from scipy.special import stdtr  # slow to import

    n = np.isfinite(differences).sum(axis=1)
    found = np.full(len(n), math.nan)
    enough = np.flatnonzero(n >= ENOUGH)
    rows, n = differences[enough], n[enough]
    if not len(enough):
        return list(found)
    deviation = np.nanstd(rows, axis=1, ddof=1)
    spread = deviation > 1e-9 * np.nanmax(np.abs(rows), axis=1)
    t = np.nanmean(rows[spread], axis=1) / (deviation[spread] / np.sqrt(n[spread]))
    found[enough[spread]] = 2 * stdtr(n[spread] - 1, -np.abs(t))
    for i in np.flatnonzero(~spread):
        found[enough[i]] = tails(rows[i][np.isfinite(rows[i])].tolist()).two_sided
    return list(found)


def _norm_batches(study: Study, tidy: pd.DataFrame) -> Sequence[int]:
    """Return how many images are normalized together in each row's cell, if several arms share each number."""
    of_cells: Mapping[tuple[Any, ...], Any] = {
        (run.setting, run.arm, int(run.batch)): (study.configs.get(run.run) or {}).get("norm_batch") or run.batch
        for run in named_rows(study.placed)
        if run.run
    }
    found = [int(of_cells.get((row.setting, row.arm, int(row.batch)), row.batch)) for row in named_rows(tidy)]
    together = tidy.assign(norm_batch=found).groupby(["setting", "batch"])["norm_batch"]
    shared = together.transform(lambda numbers: numbers.nunique() > 1 and numbers.value_counts().min() > 1)
    return [number if split else _NOT_COMPARED_BY_IT for number, split in zip(found, shared, strict=True)]
