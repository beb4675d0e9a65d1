"""The tables of a report, each as full-precision tidy data and as texts for a reader.

A tidy frame has one row per setting, arm, batch and quantity, with the columns
mean, low, high (the t-interval over seeds; nan for one seed), n (runs that the mean is over),
done, diverged, missing (runs of the cell in these states; missing is every other state).
That of `overall` is described there, that of the verdicts in `verdict_texts`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from normlab.report.analysis.cells import (
    NOTHING,
    Cell,
    Row,
    Table,
    grids,
    lists,
    named_rows,
    with_counts,
    with_interval,
    with_test,
)
from normlab.report.analysis.highlight import rule
from normlab.report.analysis.measures import chance
from normlab.report.analysis.metric import BEST, Measure
from normlab.report.analysis.statistics import (
    ENOUGH,
    RESAMPLES,
    TOO_FEW,
    Interval,
    bootstrap_mean,
    effect_size,
    holm,
    paired,
    probability_of_improvement,
    t_interval,
    tails,
)
from normlab.report.study.arms import in_order, natural
from normlab.report.study.load import Study
from normlab.runs.states import FINISHED

CELL = ["setting", "arm", "batch"]


def outcomes(study: Study, measure: Measure, thresholds: Sequence[float] = ()) -> pd.DataFrame:
    """What each done run came to. One row per run: run, setting, arm, batch, seed, and

    final, best, train, gap (in the measure's unit; a gap above 0: worse than on the training images),
    best being that of the epoch that is best on the validation images, or by the measure itself where there are none;
    epochs_to_<t> and seconds_to_<t> per threshold (nan where never reached), wall_seconds,
    images_per_second (median over evaluations), peak_memory_mib, parameters.
    """
    done = study.runs[study.runs["state"] == "done"].reset_index(drop=True)
    run = pd.Index(done["run"]).get_indexer(pd.Index(study.evaluations["run"]))  # its row in `done`, else -1
    curves = study.evaluations.drop(columns=["run", *CELL, "seed", "state"])[run >= 0].set_axis(run[run >= 0])
    test, train = (_column(curves, name) * measure.scale for name in (measure.column, measure.train_column))
    last = ~curves.index.duplicated(keep="last")
    higher = measure.higher_is_better
    values = done[["run", *CELL, "seed"]].astype({"batch": int, "seed": int})
    values["final"] = test[last]
    values["best"] = _at_best_epoch(test, _column(curves, measure.chooser), higher)
    values["train"] = train[last]
    values["gap"] = (train - test if higher else test - train)[last]
    values["wall_seconds"] = (curves[last] if "wall_seconds" in curves else done)["wall_seconds"]
    values["images_per_second"] = _column(curves, "images_per_second").groupby(level=0).median()
    values["peak_memory_mib"] = done["peak_memory_bytes"] / 2**20
    values["parameters"] = done["parameters"]
    for threshold in thresholds:
        reached = np.flatnonzero(test >= threshold * measure.scale)
        first = curves.iloc[reached[~curves.index[reached].duplicated()]]
        for name, column in (("epochs", "epoch"), ("seconds", "wall_seconds")):
            values[f"{name}_to_{threshold:g}"] = _column(first, column)
    quantities = _quantities(thresholds)
    return values[["run", *CELL, "seed", *quantities]].astype(dict.fromkeys(quantities, float))


def _at_best_epoch(curves: pd.Series, chooser: pd.Series, higher_is_better: bool) -> pd.Series:
    """Per run (the index) its value at the first epoch that is best by the chooser, or by itself without one."""
    chosen = chooser.groupby(level=0).transform("count") > 0
    by = chooser.where(chosen, curves).reset_index(drop=True).dropna()
    of_runs = by.groupby(curves.index[by.index])
    return curves.iloc[of_runs.idxmax() if higher_is_better else of_runs.idxmin()]


def _column(rows: pd.DataFrame, name: str) -> pd.Series:
    """nan where it was not measured."""
    return rows[name] if name in rows else pd.Series(math.nan, index=rows.index)


def _quantities(thresholds: Sequence[float]) -> list[str]:
    reached = [f"{kind}_to_{threshold:g}" for kind in ("epochs", "seconds") for threshold in thresholds]
    cost = ["wall_seconds", "images_per_second", "peak_memory_mib", "parameters"]
    return ["final", "best", "train", "gap", *cost, *reached]


def counts(runs: pd.DataFrame) -> pd.DataFrame:
    """Per cell, in the order of the tables: done, diverged, missing (every state that is neither)."""
    placed = runs.dropna(subset=["arm"])
    ranked = [*sorted(placed["setting"].unique(), key=natural), *in_order(placed["arm"])]
    rank = {name: position for position, name in enumerate(ranked)}
    state = placed["state"].where(placed["state"].isin(FINISHED), "missing")
    found = pd.crosstab([placed[key] for key in CELL], state)
    found = found.reindex(columns=["done", "diverged", "missing"], fill_value=0).reset_index()
    found.columns.name = None
    return found.sort_values(
        CELL, key=lambda column: column if column.name == "batch" else column.map(rank), ignore_index=True
    )


def summarise(runs: pd.DataFrame, values: pd.DataFrame, quantities: Sequence[str], confidence: float) -> pd.DataFrame:
    """A tidy frame of the quantities' means over the seeds of each cell."""
    samples: dict[Any, pd.DataFrame] = dict(iter(values.groupby(CELL)))
    rows = []
    for cell in counts(runs).to_dict("records"):
        sample = samples.get(tuple(cell[key] for key in CELL))
        for quantity in quantities:
            interval = t_interval([] if sample is None else sample[quantity], confidence)
            rows.append(_tidy_row(cell, quantity, interval))
    return pd.DataFrame(rows)


def _tidy_row(cell: Mapping[Any, Any], quantity: str, interval: Interval, **more: Any) -> dict[str, Any]:
    place = {key: cell[key] for key in CELL}
    states = {key: cell[key] for key in ("done", "diverged", "missing")}
    return {**place, **more, "quantity": quantity, **interval._asdict(), **states}


def differences(
    runs: pd.DataFrame, values: pd.DataFrame, quantity: str, baseline: str, confidence: float
) -> pd.DataFrame:
    """A tidy frame of each arm minus the baseline, paired by seed.

    Here n, done, diverged and missing count pairs: a pair is done if both its runs are, diverged if
    one of them is, and missing otherwise. Settings without the baseline have no rows. p is that of the paired
    t-test, p_holm with Holm's correction over the whole frame, d_z the effect size; nan for fewer than 3 pairs.
    """
    placed = runs.dropna(subset=["arm"])
    by_seed = {cell: dict(zip(g["seed"], g[quantity], strict=True)) for cell, g in values.groupby(CELL)}
    states = {cell: dict(zip(g["seed"], g["state"], strict=True)) for cell, g in placed.groupby(CELL)}
    rows = []
    for cell in counts(runs).to_dict("records"):
        own = (cell["setting"], cell["arm"], cell["batch"])
        other = (cell["setting"], baseline, cell["batch"])
        if cell["arm"] == baseline or other not in states:
            continue
        pairs = [{states[own].get(seed), states[other].get(seed)} for seed in states[own] | states[other]]
        done, diverged = pairs.count({"done"}), sum("diverged" in pair for pair in pairs)
        cell = {**cell, "done": done, "diverged": diverged, "missing": len(pairs) - done - diverged}
        found = paired(by_seed.get(own, {}), by_seed.get(other, {}))
        row = _tidy_row(cell, f"{quantity}_minus_baseline", t_interval(found, confidence), baseline=baseline)
        p = tails(found).two_sided if len(found) >= ENOUGH else math.nan
        rows.append({**row, "p": p, "d_z": effect_size(found) if len(found) >= ENOUGH else math.nan})
    adjusted = holm([row["p"] for row in rows])
    return pd.DataFrame([{**row, "p_holm": p_holm} for row, p_holm in zip(rows, adjusted, strict=True)])


def overall(
    study: Study, values: pd.DataFrame, value: str, baseline: str | None, confidence: float
) -> tuple[pd.DataFrame, dict[str, list[Row]]]:
    """Each arm over many cells at once: per setting over its batch sizes, and over all settings.

    A tidy frame with the quantities mean, minus_baseline and beats_baseline (a probability) of the column `value`, an
    accuracy, and
    its rows for a reader. cells: how many of the of_cells of the setting the arm, or the arm and the baseline, have;
    n: the seeds of the cell that has fewest. A diverged run's accuracy is chance. Settings with a single cell have no
    rows.
    """
    cells = _by_cell(study, values, value)
    scopes = {setting: [cell for cell in cells if cell[0] == setting] for setting in dict.fromkeys(c[0] for c in cells)}
    if len(scopes) > 1:
        scopes["all settings"] = list(cells)
    rows = []
    for scope, inside in scopes.items():
        for arm in in_order({arm for cell in inside for arm in cells[cell]}) if len(inside) > 1 else ():
            own = [cells[cell][arm] for cell in inside if arm in cells[cell]]
            both = [(cells[cell][arm], cells[cell].get(baseline or "", {})) for cell in inside if arm in cells[cell]]
            pairs = [[(a[seed], b[seed]) for seed in sorted(a) if seed in b] for a, b in both]
            pairs = [pair for pair in pairs if pair] if arm != baseline else []
            found: dict[str, tuple[int, int, Interval]] = {}
            found["mean"] = (
                len(own),
                min(map(len, own)),
                bootstrap_mean([[*seeds.values()] for seeds in own], confidence),
            )
            if pairs:
                arms, baselines = ([[pair[side] for pair in cell] for cell in pairs] for side in (0, 1))
                minus = bootstrap_mean([[a - b for a, b in cell] for cell in pairs], confidence)
                beats = probability_of_improvement(arms, baselines, confidence)
                least = min(map(len, pairs))
                found |= {"minus_baseline": (len(pairs), least, minus), "beats_baseline": (len(pairs), least, beats)}
            for quantity, (number, n, (mean, low, high, _)) in found.items():
                ends = (low, high) if n >= ENOUGH else (math.nan, math.nan)
                interval = Interval(mean, *ends, n)
                place = {"setting": scope, "arm": arm, "quantity": quantity, "cells": number, "of_cells": len(inside)}
                rows.append({**place, **interval._asdict()})
    frame = pd.DataFrame(rows)
    return frame, _overall_rows(frame, baseline) if rows else {}


def _by_cell(study: Study, values: pd.DataFrame, value: str) -> dict[tuple[str, int], dict[str, dict[int, float]]]:
    """Per setting and batch size, per arm: the accuracy of each seed, in per cent, chance if it diverged."""
    found: dict[Any, Any] = {}
    for cell in counts(study.runs).to_dict("records"):
        found.setdefault((cell["setting"], cell["batch"]), {})
    for run in named_rows(study.runs[study.runs["state"] == "diverged"]):
        cell = found[run.setting, run.batch].setdefault(run.arm, {})
        cell[run.seed] = chance(study.configs[run.run], run.classes)
    for run in values.dropna(subset=[value]).to_dict("records"):
        found[run["setting"], run["batch"]].setdefault(run["arm"], {})[run["seed"]] = run[value]
    return {cell: arms for cell, arms in found.items() if arms}


def _overall_rows(frame: pd.DataFrame, baseline: str | None) -> dict[str, list[Row]]:
    headings = {
        "mean": ("mean (%)", ".1f"),
        "minus_baseline": (f"minus {baseline}", "+.2f"),
        "beats_baseline": (f"P(beats {baseline})", ".2f"),
    }
    found: dict[str, list[Row]] = defaultdict(list)
    for (setting, _), rows in frame.groupby(["setting", "arm"], sort=False):
        first = rows.iloc[0]
        line = {
            "arm": Cell(first["arm"]),
            "cells": Cell(f"{first['cells']} of {first['of_cells']}", first["cells"]),
            "seeds": Cell(str(first["n"]), first["n"]),
        }
        for row in named_rows(rows):
            heading, shown = headings[row.quantity]
            partly = f", over {row.cells} cells" if row.cells < first["cells"] else ""
            ends = "" if math.isnan(row.low) else f" ({row.low:{shown}} to {row.high:{shown}})"
            line[heading] = Cell(f"{row.mean:{shown}}{ends}{partly}", row.mean)
        found[str(setting)].append(line)
    return dict(found)


def build_tables(
    study: Study, measure: Measure, baseline: str | None, thresholds: Sequence[float], confidence: float
) -> list[Table]:
    """Every table that the study's measurements allow."""
    an_accuracy = measure.unit == "%"
    thresholds = thresholds if an_accuracy else ()
    values = outcomes(study, measure, thresholds)
    unit = f", in {measure.unit}" if measure.unit else ""
    points = f", in {measure.points}" if measure.points else ""

    every = summarise(study.runs, values, _quantities(thresholds), confidence)

    def tidy(*quantities: str) -> pd.DataFrame:
        return every[every["quantity"].isin(quantities)].reset_index(drop=True)

    name, better = measure.value, measure.higher_is_better
    epoch, best = _epoch(study, measure)
    accuracy = tidy(name)
    complete = accuracy["n"].eq(accuracy[["done", "diverged", "missing"]].sum(axis=1)).all()
    over = f"mean over {'seeds' if complete else 'the n seeds whose run is done'}"
    over += f", ± half of the {100 * confidence:g} % t-interval"
    found = [
        Table(
            name=measure.column.removeprefix("test_"),
            title=(f"best {measure.label}" if name == BEST else measure.label).capitalize(),
            caption=f"{measure.compared.capitalize()} ({epoch}){unit}: {over}.{_not_counted(accuracy)}",
            tidy=accuracy,
            rows=grids(accuracy, lambda row: with_counts(row, measure.decimals), {name: better}),
            rule=rule("mean", accuracy),
        )
    ]
    if baseline is not None:
        finer = None if measure.decimals is None else measure.decimals + 1
        minus = differences(study.runs, values, name, baseline, confidence)
        if len(minus):
            found.append(
                Table(
                    name="difference",
                    title=f"Difference to {baseline}",
                    caption=f"{measure.compared.capitalize()} minus that of {baseline}{points}, paired by seed: mean"
                    f" over the pairs of done runs, ± half of the paired {100 * confidence:g} % t-interval,"
                    " uncorrected. n counts pairs; a pair counts as diverged if either run diverged. p: two-sided"
                    " paired t-test, with Holm's correction over all comparisons of this table; d_z: mean over standard"
                    f" deviation of the differences.{_told_of_few(minus)}",
                    tidy=minus,
                    rows=grids(minus, lambda row: with_test(row, finer)),
                )
            )
    if an_accuracy:
        together, rows = overall(study, values, name, baseline, confidence)
        against = (
            f"; difference to {baseline}, paired by seed; probability that an arm's run beats one of {baseline}, ties"
            " as one half, averaged over cells"
            if baseline
            else ""
        )
        if rows:
            found.append(
                Table(
                    name="overall",
                    title="Overall",
                    caption=f"{measure.compared.capitalize()} over several cells (batch sizes, settings) at once: mean"
                    f" over cells of the mean over seeds{against}. In brackets:"
                    f" {100 * confidence:g} % stratified bootstrap interval ({RESAMPLES:,} resamples of the seeds"
                    " within each cell), where every cell has 3 seeds; with so few it is rather too narrow. A diverged"
                    " run counts as chance. cells: how many have the arm; means over different cells do not compare.",
                    tidy=together,
                    rows=rows,
                )
            )

    def plain(decimals: int | None, sign: str = "") -> Callable[[Any], str]:
        return lambda row: with_interval(row, decimals, sign)

    in_unit = f" ({measure.unit})" if measure.unit else ""
    shown = {
        "final": (f"final{in_unit}", plain(measure.decimals)),
        "best": (f"best{in_unit}", plain(measure.decimals)),
    }
    told = ""
    if measure.column != measure.train_column:
        images = measure.column.partition("_")[0]
        shown["train"] = (f"train{in_unit}", plain(measure.decimals))
        shown["gap"] = (f"train-{images} gap" if better else f"{images}-train gap", plain(measure.decimals, "+"))
        told = f", and the final gap between training and {measure.images} images{points}"
    convergence = tidy(*shown)
    found.append(
        Table(
            name="convergence",
            title="Convergence",
            caption=f"{measure.label.capitalize()} after the last epoch (final) and at its best epoch (best:"
            f" {best}){told}: {over}. Training values are as recorded during the last epoch."
            f"{'' if complete else ' runs: done runs; others are not part of the means.'}",
            tidy=convergence,
            rows=lists(convergence, shown, {"final": better, "best": better}),
            rule=rule("means of final and of best", convergence),
        )
    )
    for kind, decimals in (("epochs", 1), ("seconds", 0)):
        if not thresholds:
            break
        reached = tidy(*(f"{kind}_to_{t:g}" for t in thresholds))
        seconds = " Seconds count training and evaluation." if kind == "seconds" else ""
        found.append(
            Table(
                name=f"{kind}_to_accuracy",
                title=f"{kind.capitalize()} to reach a {measure.label}",
                caption=f"{kind.capitalize()} until an evaluation first shows the accuracy: mean over the done runs"
                f" that reach it, ± half of the {100 * confidence:g} % t-interval over seeds; in brackets how many"
                f" of the done runs do, where not all.{seconds}",
                tidy=reached,
                rows=lists(
                    reached,
                    {f"{kind}_to_{t:g}": (f"{100 * t:g} %", _reached(decimals)) for t in thresholds},
                    {f"{kind}_to_{t:g}": False for t in thresholds},
                ),
                rule=rule("(lowest) mean of each column", reached),
            )
        )
    cost = tidy("wall_seconds", "images_per_second", "peak_memory_mib", "parameters")
    found.append(
        Table(
            name="cost",
            title="Cost of a run",
            caption=f"Seconds of training and evaluation, training images per second (median over epochs), peak"
            f" memory and trainable parameters: {over}. Runs that shared a machine slowed each other down.",
            tidy=cost,
            rows=lists(
                cost,
                {
                    "wall_seconds": ("seconds", plain(0)),
                    "images_per_second": ("images/s", plain(0)),
                    "peak_memory_mib": ("peak MiB", plain(0)),
                    "parameters": ("parameters", lambda row: f"{row.mean:,.0f}" if row.n else NOTHING),
                },
            ),
        )
    )
    return found


def _epoch(study: Study, measure: Measure) -> tuple[str, str]:
    """In words: of which epoch the values are that are compared, and how the best one is chosen."""
    done = study.evaluations[study.evaluations["state"] == "done"]
    validated = done[_column(done, measure.chooser).notna()]["run"].nunique()
    own = f"chosen on the {measure.images} images, hence optimistic"
    best = "that with the best value on the validation images"
    if not validated:
        best = own
    elif validated < done["run"].nunique():
        best += f"; in runs without any {own}"
    elif measure.column == measure.chooser:
        best += ", hence optimistic"
    return (f"at the best epoch: {best}" if measure.value == BEST else "after the last epoch"), best


def _not_counted(tidy: pd.DataFrame) -> str:
    """What a reader has to know of cells whose runs are not all part of the mean, and of single ones."""
    told = {
        " Diverged runs have no final value: they are counted in the cell and are not part of the mean.": "diverged",
        " Missing: not started, running, interrupted, failed or unreadable.": "missing",
    }
    found = "".join(sentence for sentence, column in told.items() if tidy[column].any())
    return found + (" No ± where n = 1." if (tidy["n"] == 1).any() else "")


def _told_of_few(differences: pd.DataFrame) -> str:
    few = sorted({n for n in differences["n"] if 0 < n < ENOUGH})
    return "".join(f" n = {n}: {TOO_FEW}." for n in few)


def _reached(decimals: int) -> Callable[[Any], str]:
    def text(row: Any) -> str:
        if not row.done:
            return NOTHING
        if not row.n:
            return "not reached"
        return with_interval(row, decimals) + (f" ({row.n} of {row.done})" if row.n < row.done else "")

    return text
