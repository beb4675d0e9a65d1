"""The tidy frames that tables and figures are made from: from a study's runs to numbers, without a word for a reader.

A tidy frame has one row per setting, arm, batch and quantity, with the columns mean, low, high (the t-interval over
seeds; nan for one seed), n (runs that the mean is over), done, diverged, missing (runs of the cell in these states;
missing is every other state). That of `overall` is described there.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from normlab.common.errors import exact
from normlab.report.analysis import statistics
from normlab.report.analysis.metrics import Metric, chance
from normlab.report.analysis.statistics import ENOUGH, UNBOUNDED, Bounds, Interval
from normlab.report.study.arms import in_order, natural
from normlab.report.study.load import Study
from normlab.runs import FINISHED

CELL = ["setting", "arm", "batch"]
COUNTS = ["done", "diverged", "missing"]
COST = ["wall_seconds", "images_per_second", "peak_memory_mib", "parameters"]
_Seeds = dict[int, float]  # a value per seed


def named_rows(frame: pd.DataFrame) -> Iterator[Any]:
    """Yield the rows as named tuples."""
    return frame.itertuples(index=False)


def outcomes(study: Study, metric: Metric, thresholds: Sequence[float] = ()) -> pd.DataFrame:
    """Return one row per done run: run, setting, arm, batch, seed and, as float64, `quantities(thresholds)`.

    final, best, train, gap are in the metric's unit (a gap above 0: worse than on the training images), best being that
    of the epoch that is best on the validation images, or by the metric itself where there are none; epochs_to_<t> and
    seconds_to_<t> are nan where a threshold was never reached; images_per_second is the median over evaluations.
    """
    done = study.runs[study.runs["state"] == "done"].reset_index(drop=True)
    run = pd.Index(done["run"]).get_indexer(pd.Index(study.evaluations["run"]))  # its row in `done`, else -1
    curves = study.evaluations.drop(columns=["run", *CELL, "seed", "state"])[run >= 0].set_axis(run[run >= 0])
    test, train = (column_of(curves, name) * metric.scale for name in (metric.name, metric.train_column))
    last = ~curves.index.duplicated(keep="last")
    higher = bool(metric.higher_is_better)
    values = done[["run", *CELL, "seed"]].astype({"batch": int, "seed": int})
    values["final"] = test[last]
    values["best"] = _at_best_epoch(test, column_of(curves, metric.validation_column), higher)
    values["train"] = train[last]
    values["gap"] = (train - test if higher else test - train)[last]
    values["wall_seconds"] = (curves[last] if "wall_seconds" in curves else done)["wall_seconds"]
    values["images_per_second"] = column_of(curves, "images_per_second").groupby(level=0).median()
    values["peak_memory_mib"] = done["peak_memory_bytes"] / 2**20
    values["parameters"] = done["parameters"]
    for threshold in thresholds:
        reached = np.flatnonzero(test >= threshold * metric.scale)
        first = curves.iloc[reached[~curves.index[reached].duplicated()]]
        values[f"epochs_to_{exact(threshold)}"] = column_of(first, "epoch")
        values[f"seconds_to_{exact(threshold)}"] = column_of(first, "wall_seconds")
    names = quantities(thresholds)
    return values[["run", *CELL, "seed", *names]].astype(dict.fromkeys(names, float))


def quantities(thresholds: Sequence[float]) -> list[str]:
    """Return the names of what `outcomes` gives of each run."""
    reached = [f"{kind}_to_{exact(threshold)}" for kind in ("epochs", "seconds") for threshold in thresholds]
    return ["final", "best", "train", "gap", *COST, *reached]


def evenly(number: int, most: int) -> NDArray[np.int64]:
    """Return at most so many of the positions 0 to `number` - 1, evenly from the first to the last."""
    return np.unique(np.linspace(0, number - 1, min(most, number)).round().astype(int))


def column_of(rows: pd.DataFrame, name: str) -> pd.Series:
    """Return a column, nan where it was not measured."""
    return rows[name] if name in rows else pd.Series(math.nan, index=rows.index)


def _at_best_epoch(curves: pd.Series, chooser: pd.Series, higher_is_better: bool) -> pd.Series:
    """Return the value of each run (the index) at the first epoch that is best by the chooser, or by itself."""
    chosen = chooser.groupby(level=0).transform("count") > 0
    by = chooser.where(chosen, curves).reset_index(drop=True).dropna()
    of_runs = by.groupby(curves.index[by.index])
    return curves.iloc[of_runs.idxmax() if higher_is_better else of_runs.idxmin()]


def probe_outcomes(rows: pd.DataFrame, metrics: Sequence[Metric]) -> pd.DataFrame:
    """Return one row per done run that has rows of a probe: run, setting, arm, batch, seed and the metrics."""
    names = [metric.name for metric in metrics]
    outcomes = [
        {key: run[key].iloc[0] for key in ("run", *CELL, "seed")}
        | {metric.name: metric.read(run) for metric in metrics}
        for _, run in rows[rows["state"] == "done"].groupby("run")
    ]
    return pd.DataFrame(outcomes, columns=["run", *CELL, "seed", *names]).astype(dict.fromkeys(names, float))


def counts(runs: pd.DataFrame) -> pd.DataFrame:
    """Return per cell, in the order of the tables: done, diverged, missing (every state that is neither)."""
    placed = runs.dropna(subset=["arm"])
    ranked = [*sorted(placed["setting"].unique(), key=natural), *in_order(placed["arm"])]
    rank = {name: position for position, name in enumerate(ranked)}
    state = placed["state"].where(placed["state"].isin(FINISHED), "missing")
    table = placed.groupby([*CELL, state]).size().unstack(fill_value=0).reindex(columns=COUNTS, fill_value=0)
    table = table.sort_index(key=lambda level: level if level.name == "batch" else level.map(rank))
    return table.rename_axis(columns=None).reset_index()


def summarize(
    runs: pd.DataFrame,
    values: pd.DataFrame,
    names: Sequence[str],
    confidence: float,
    bounds: Mapping[str, Bounds] | None = None,
) -> pd.DataFrame:
    """Return the tidy frame of these quantities' means over the seeds of each cell.

    Args:
        runs: those that the cells and the counts are of.
        values: one row per done run, with the quantities.
        names: of the quantities.
        confidence: of the t-intervals.
        bounds: where the intervals of a quantity are cut; of others nowhere.
    """
    bounds = bounds or {}
    samples: dict[Any, pd.DataFrame] = dict(iter(values.groupby(CELL)))
    rows = []
    for cell in counts(runs).to_dict("records"):
        sample = samples.get(_key(cell), values.iloc[:0])
        rows += [
            _tidy_row(cell, name, statistics.t_interval(sample[name], confidence, bounds.get(name, UNBOUNDED)))
            for name in names
        ]
    return pd.DataFrame(rows)


def bounds_of(metric: Metric) -> dict[str, Bounds]:
    """Return the bounds of those `quantities` that are in the metric's unit."""
    return dict.fromkeys(("final", "best", "train"), metric.bounds) | {"gap": metric.difference_bounds}


def _key(cell: Mapping[Any, Any]) -> tuple[Any, ...]:
    return tuple(cell[key] for key in CELL)


def _tidy_row(cell: Mapping[Any, Any], quantity: str, interval: Interval) -> dict[str, Any]:
    place, states = ({key: cell[key] for key in keys} for keys in (CELL, COUNTS))
    return {**place, "quantity": quantity, **interval._asdict(), **states}


def differences(
    runs: pd.DataFrame,
    values: pd.DataFrame,
    quantity: str,
    baseline: str,
    confidence: float,
    bounds: Bounds = UNBOUNDED,
) -> pd.DataFrame:
    """Return the tidy frame of each arm minus the baseline, paired by seed.

    Here n, done, diverged and missing count pairs: a pair is done if both its runs are, diverged if one of them is, and
    missing otherwise. Settings without the baseline have no rows. p is that of the paired t-test, p_holm with Holm's
    correction over the whole frame, d_z the effect size; nan for fewer than 3 pairs. Intervals are cut at `bounds`.
    """
    by_seed = {cell: dict(zip(g["seed"], g[quantity], strict=True)) for cell, g in values.groupby(CELL)}
    placed = runs.dropna(subset=["arm"]).groupby(CELL)
    states = {cell: dict(zip(g["seed"], g["state"], strict=True)) for cell, g in placed}
    rows = []
    for cell in counts(runs).to_dict("records"):
        own, other = _key(cell), _key({**cell, "arm": baseline})
        if own == other or other not in states:
            continue
        pairs = [{states[own].get(seed), states[other].get(seed)} for seed in states[own] | states[other]]
        done, diverged = pairs.count({"done"}), sum("diverged" in pair for pair in pairs)
        cell |= {"done": done, "diverged": diverged, "missing": len(pairs) - done - diverged}
        minus = statistics.paired(by_seed.get(own, {}), by_seed.get(other, {}))
        row = _tidy_row(cell, f"{quantity}_minus_baseline", statistics.t_interval(minus, confidence, bounds))
        row |= {"p": math.nan, "d_z": math.nan}
        if len(minus) >= ENOUGH:
            row |= {"p": statistics.tails(minus).two_sided, "d_z": statistics.effect_size(minus)}
        rows.append(row)
    frame = pd.DataFrame(rows)
    if rows:
        frame.insert(len(CELL), "baseline", baseline)
        frame["p_holm"] = statistics.holm(list(frame["p"]))
    return frame


def overall(study: Study, values: pd.DataFrame, quantity: str, baseline: str | None, confidence: float) -> pd.DataFrame:
    """Return each arm's accuracy over many cells at once: per setting over its batch sizes, and over all settings.

    A tidy frame with the quantities mean, minus_baseline and beats_baseline (a probability), and in place of the counts
    of runs: cells, how many of the of_cells of the setting the arm, or the arm and the baseline, have; n: the seeds of
    the cell that has fewest. A diverged run's accuracy is chance. Settings with a single cell have no rows.

    Args:
        study: the study.
        values: its `outcomes`.
        quantity: column of the values, an accuracy in per cent.
        baseline: arm that the others are compared with.
        confidence: of the bootstrap intervals.
    """
    cells = _accuracies(study, values, quantity)
    scopes: dict[str, list[dict[str, _Seeds]]] = defaultdict(list)
    for (setting, _), arms in cells.items():
        scopes[setting].append(arms)
    if len(scopes) > 1:
        scopes["all settings"] = list(cells.values())
    return pd.DataFrame(
        [
            {"setting": scope, "arm": arm, "quantity": name, "cells": number, "of_cells": len(inside)}
            | interval._asdict()
            for scope, inside in scopes.items()
            if len(inside) > 1
            for arm in in_order({arm for cell in inside for arm in cell})
            for name, number, interval in _over_cells(inside, arm, baseline, confidence)
        ]
    )


def _over_cells(
    cells: Iterable[Mapping[str, _Seeds]], arm: str, baseline: str | None, confidence: float
) -> Iterator[tuple[str, int, Interval]]:
    """Yield quantity, number of cells, and interval of an arm."""
    here = [cell for cell in cells if arm in cell]
    own = [list(cell[arm].values()) for cell in here]
    yield "mean", len(own), _with_fewest_seeds(statistics.bootstrap_mean(own, confidence), own)
    if baseline is None or arm == baseline:
        return
    seeds = [sorted(set(cell[arm]) & set(cell.get(baseline, {}))) for cell in here]
    shared = [(cell, common) for cell, common in zip(here, seeds, strict=True) if common]
    if not shared:
        return
    arms, baselines = ([[cell[name][seed] for seed in common] for cell, common in shared] for name in (arm, baseline))
    minus = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(arms, baselines, strict=True)]
    yield "minus_baseline", len(arms), _with_fewest_seeds(statistics.bootstrap_mean(minus, confidence), arms)
    beats = statistics.probability_of_improvement(arms, baselines, confidence)
    yield "beats_baseline", len(arms), _with_fewest_seeds(beats, arms)


def _with_fewest_seeds(interval: Interval, cells: Sequence[Sequence[float]]) -> Interval:
    """Return the interval with n as the seeds of the cell that has fewest; without ends if these are too few."""
    n = min(map(len, cells))
    return interval._replace(n=n) if n >= ENOUGH else Interval(interval.mean, math.nan, math.nan, n)


def _accuracies(study: Study, values: pd.DataFrame, quantity: str) -> dict[tuple[str, int], dict[str, _Seeds]]:
    """Return per setting and batch size, per arm: the accuracy of each seed, in per cent, chance if it diverged."""
    cells: dict[tuple[str, int], dict[str, _Seeds]] = {
        (cell.setting, cell.batch): defaultdict(dict) for cell in named_rows(counts(study.runs))
    }
    for run in named_rows(study.runs[study.runs["state"] == "diverged"]):
        cells[run.setting, run.batch][run.arm][run.seed] = chance(study.configs[run.run], run.classes)
    for row in values.dropna(subset=[quantity]).to_dict("records"):
        cells[row["setting"], row["batch"]][row["arm"]][row["seed"]] = row[quantity]
    return {cell: arms for cell, arms in cells.items() if arms}
