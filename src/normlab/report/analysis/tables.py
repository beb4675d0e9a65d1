"""The tables of a report: a study's numbers as tidy frames, in `cells` for a reader, and with captions."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from normlab.report.analysis import frames
from normlab.report.analysis.cells import (
    NOTHING,
    Cell,
    Row,
    Table,
    grids,
    lists,
    with_counts,
    with_geometric_interval,
    with_interval,
    with_test,
)
from normlab.report.analysis.frames import CELL, COUNTS, named_rows
from normlab.report.analysis.highlight import highlight_rule
from normlab.report.analysis.metrics import BEST, METRICS, Metric
from normlab.report.analysis.statistics import ENOUGH, RESAMPLES, TOO_FEW
from normlab.report.study.load import Study

_PROBES = {  # title and the beginning of the caption
    "ics": (
        "Internal covariate shift",
        "A layer's gradient G, and G' after the layers before it took their step (Santurkar et al. 2018, definition"
        " 2.1): means over measured steps and layers where there is a shift (a first layer has none).",
    ),
    "landscape": (
        "Loss landscape",
        "Along the gradient, over the probed step lengths (Santurkar et al. 2018, section 3.1): width of the bands of"
        " the loss and of the gradient's change, and effective beta-smoothness; medians over measured steps.",
    ),
    "activations": (
        "Activations",
        "Outputs of the norms: change of their mean and variance from one step to the next, skewness, share beyond 3 in"
        " absolute value; share of the norms' inputs beyond 3 standard deviations of their channel: means over measured"
        " steps and layers. Growth: root mean square of the convolutions' outputs, last site over first, at the last"
        " measured step.",
    ),
    "affine": (
        "Drift of gamma and beta",
        "At the last measured step, means over layers: gamma and beta themselves, and their drift, the root mean square"
        " over channels of the distance from the start, gamma's in units of its start.",
    ),
    "gradients": (
        "Gradients",
        "Gradients of the convolutions' and linear layers' weights: means over measured steps and layers; last over"
        " first layer: at the last measured step.",
    ),
    "sharpness": (
        "Sharpness",
        "Largest eigenvalue of the loss's Hessian on the step's batch at the last measured step, if its iteration"
        " converged, and the norm of all weights there; converged: share of all measurements whose iteration did.",
    ),
}


@dataclass(frozen=True)
class _Summary:
    """A study summarized for its tables.

    Attributes:
        values: `frames.outcomes`, one row per done run.
        means: the tidy frame of all their quantities.
    """

    study: Study
    metric: Metric
    thresholds: Sequence[float]
    confidence: float
    values: pd.DataFrame
    means: pd.DataFrame

    def of(self, *quantities: str) -> pd.DataFrame:
        """Return the rows of these quantities."""
        return self.means[self.means["quantity"].isin(quantities)].reset_index(drop=True)

    @property
    def complete(self) -> bool:
        """Return whether all runs are part of the means."""
        compared = self.of(self.metric.epoch)
        return bool(compared["n"].eq(compared[COUNTS].sum(axis=1)).all())

    @property
    def over(self) -> str:
        """Return in words what the means are over, and what stands behind the ±."""
        seeds = "seeds" if self.complete else "the n seeds whose run is done"
        return f"mean over {seeds}, ± half of the {100 * self.confidence:g} % t-interval"

    def plain(self, sign: str = "") -> Callable[[Any], str]:
        """Return the function that formats a row's mean and interval in the metric's decimals."""
        return lambda row: with_interval(row, self.metric.decimals, sign)


def build_tables(
    study: Study, metric: Metric, baseline: str | None, thresholds: Sequence[float], confidence: float
) -> list[Table]:
    """Return every table that the study's evaluations allow, that of the metric first."""
    an_accuracy = metric.unit == "%"
    thresholds = thresholds if an_accuracy else ()
    values = frames.outcomes(study, metric, thresholds)
    means = frames.summarize(study.runs, values, frames.quantities(thresholds), confidence)
    summary = _Summary(study, metric, thresholds, confidence, values, means)
    tables = [_metric_table(summary)]
    if baseline is not None:
        tables += _difference_table(summary, baseline)
    if an_accuracy:
        tables += _overall_table(summary, baseline)
    tables.append(_convergence_table(summary))
    if thresholds:
        tables += [_reached_table(summary, "epochs", 1, ""), _reached_table(summary, "seconds", 0, _SECONDS)]
    return [*tables, _cost_table(summary)]


def _metric_table(summary: _Summary) -> Table:
    metric = summary.metric
    tidy = summary.of(metric.epoch)
    unit = f", in {metric.unit}" if metric.unit else ""
    at = _best_epoch(summary) if metric.epoch == BEST else ""
    epoch = f"at the best epoch: {at}" if at else "after the last epoch"
    return Table(
        name=metric.name.removeprefix("test_"),
        title=(metric.full_label if at else metric.label).capitalize(),
        caption=f"{metric.full_label.capitalize()} ({epoch}){unit}: {summary.over}.{_not_counted(tidy)}",
        tidy=tidy,
        rows=grids(tidy, lambda row: with_counts(row, metric.decimals), _directions(metric, metric.epoch)),
        rule=highlight_rule("mean", tidy),
    )


def _difference_table(summary: _Summary, baseline: str) -> Iterator[Table]:
    metric = summary.metric
    tidy = frames.differences(summary.study.runs, summary.values, metric.epoch, baseline, summary.confidence)
    if tidy.empty:
        return
    points = f", in {metric.points}" if metric.points else ""
    decimals = None if metric.decimals is None else metric.decimals + 1
    few = "".join(f" n = {n}: {TOO_FEW}." for n in sorted(set(tidy["n"])) if 0 < n < ENOUGH)
    yield Table(
        name="difference",
        title=f"Difference to {baseline}",
        caption=f"{metric.full_label.capitalize()} minus that of {baseline}{points}, paired by seed: mean over the"
        f" pairs of done runs, ± half of the paired {100 * summary.confidence:g} % t-interval, uncorrected. n counts"
        " pairs; a pair counts as diverged if either run diverged. p: two-sided paired t-test, with Holm's correction"
        " over all comparisons of this table; d_z: mean over standard deviation of the differences." + few,
        tidy=tidy,
        rows=grids(tidy, lambda row: with_test(row, decimals)),
    )


def _overall_table(summary: _Summary, baseline: str | None) -> Iterator[Table]:
    metric, percent = summary.metric, f"{100 * summary.confidence:g} %"
    tidy = frames.overall(summary.study, summary.values, metric.epoch, baseline, summary.confidence)
    if tidy.empty:
        return
    against = (
        f"; difference to {baseline}, paired by seed; probability that an arm's run beats one of {baseline}, ties as"
        " one half, averaged over cells"
    )
    yield Table(
        name="overall",
        title="Overall",
        caption=f"{metric.full_label.capitalize()} over several cells (batch sizes, settings) at once: mean over cells"
        f" of the mean over seeds{against if baseline else ''}. In brackets: {percent} stratified bootstrap interval"
        f" ({RESAMPLES:,} resamples of the seeds within each cell), where every cell has 3 seeds; with so few it is"
        " rather too narrow. A diverged run counts as chance. cells: how many have the arm; means over different cells"
        " do not compare.",
        tidy=tidy,
        rows=_overall_rows(tidy, baseline),
    )


def _overall_rows(tidy: pd.DataFrame, baseline: str | None) -> dict[str, list[Row]]:
    headings = {
        "mean": ("mean (%)", ".1f"),
        "minus_baseline": (f"minus {baseline}", "+.2f"),
        "beats_baseline": (f"P(beats {baseline})", ".2f"),
    }
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in named_rows(tidy):
        heading, shown = headings[row.quantity]
        ends = "" if math.isnan(row.low) else f" ({row.low:{shown}} to {row.high:{shown}})"
        if row.quantity == "mean":  # an arm's first
            cells, seeds = f"{row.cells} of {row.of_cells}", str(row.n)
            first = {"arm": Cell(row.arm), "cells": Cell(cells, row.cells), "seeds": Cell(seeds, row.n)}
            rows[row.setting].append(first)
        line = rows[row.setting][-1]
        partly = f", over {row.cells} cells" if row.cells < line["cells"].value else ""
        line[heading] = Cell(f"{row.mean:{shown}}{ends}{partly}", row.mean)
    return dict(rows)


def _convergence_table(summary: _Summary) -> Table:
    metric, plain = summary.metric, summary.plain()
    unit = f" ({metric.unit})" if metric.unit else ""
    columns = {"final": (f"final{unit}", plain), "best": (f"best{unit}", plain)}
    gap = ""
    if metric.name != metric.train_column:
        images = metric.name.partition("_")[0]
        heading = f"train-{images} gap" if metric.higher_is_better else f"{images}-train gap"
        columns |= {"train": (f"train{unit}", plain), "gap": (heading, summary.plain("+"))}
        gap = f", and the final gap between training and {metric.images} images"
        gap += f", in {metric.points}" if metric.points else ""
    tidy = summary.of(*columns)
    return Table(
        name="convergence",
        title="Convergence",
        caption=f"{metric.label.capitalize()} after the last epoch (final) and at its best epoch (best:"
        f" {_best_epoch(summary)}){gap}: {summary.over}. Training values are as recorded during the last epoch."
        f"{'' if summary.complete else ' runs: done runs; others are not part of the means.'}",
        tidy=tidy,
        rows=lists(tidy, columns, _directions(metric, "final", "best")),
        rule=highlight_rule("means of final and of best", tidy),
    )


_SECONDS = " Seconds count training and evaluation."


def _reached_table(summary: _Summary, kind: str, decimals: int, note: str) -> Table:
    """Return the table of the epochs, or the seconds, until each threshold is reached."""

    def text(row: Any) -> str:
        if not row.done:
            return NOTHING
        if not row.n:
            return "not reached"
        return with_interval(row, decimals) + (f" ({row.n} of {row.done})" if row.n < row.done else "")

    columns = {f"{kind}_to_{t:g}": (f"{100 * t:g} %", text) for t in summary.thresholds}
    tidy = summary.of(*columns)
    return Table(
        name=f"{kind}_to_accuracy",
        title=f"{kind.capitalize()} to reach a {summary.metric.label}",
        caption=f"{kind.capitalize()} until an evaluation first shows the accuracy: mean over the done runs that reach"
        f" it, ± half of the {100 * summary.confidence:g} % t-interval over seeds; in brackets how many of the done"
        f" runs do, where not all.{note}",
        tidy=tidy,
        rows=lists(tidy, columns, dict.fromkeys(columns, False)),
        rule=highlight_rule("(lowest) mean of each column", tidy),
    )


def _cost_table(summary: _Summary) -> Table:
    def whole(row: Any) -> str:
        return with_interval(row, 0)

    tidy = summary.of(*frames.COST)
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "wall_seconds": ("seconds", whole),
        "images_per_second": ("images/s", whole),
        "peak_memory_mib": ("peak MiB", whole),
        "parameters": ("parameters", lambda row: f"{row.mean:,.0f}" if row.n else NOTHING),
    }
    return Table(
        name="cost",
        title="Cost of a run",
        caption="Seconds of training and evaluation, training images per second (median over epochs), peak memory and"
        f" trainable parameters: {summary.over}. Runs that shared a machine slowed each other down.",
        tidy=tidy,
        rows=lists(tidy, columns),
    )


def _directions(metric: Metric, *quantities: str) -> dict[str, bool]:
    return dict.fromkeys(quantities, bool(metric.higher_is_better))


def _best_epoch(summary: _Summary) -> str:
    """Return in words how the best epoch is chosen."""
    metric, evaluations = summary.metric, summary.study.evaluations
    done = evaluations[evaluations["state"] == "done"]
    validated = done[frames.column_of(done, metric.validation_column).notna()]["run"].nunique()
    own = f"chosen on the {metric.images} images, hence optimistic"
    best = "that with the best value on the validation images"
    if not validated:
        return own
    if validated < done["run"].nunique():
        return f"{best}; in runs without any {own}"
    return f"{best}, hence optimistic" if metric.name == metric.validation_column else best


def _not_counted(tidy: pd.DataFrame) -> str:
    """Return sentences on cells whose runs are not all part of the mean, and on single ones."""
    sentences = {
        "diverged": " Diverged runs have no final value: they are counted in the cell and are not part of the mean.",
        "missing": " Missing: not started, running, interrupted, failed or unreadable.",
    }
    notes = "".join(sentence for column, sentence in sentences.items() if tidy[column].any())
    return notes + (" No ± where n = 1." if (tidy["n"] == 1).any() else "")


def probe_tables(study: Study, confidence: float) -> list[Table]:
    """Return one table per probe that a done run has measurements of."""
    return [table for probe in _PROBES if probe in study.probes for table in _probe_table(study, probe, confidence)]


def _probe_table(study: Study, probe: str, confidence: float) -> Iterator[Table]:
    metrics = [metric for metric in METRICS.values() if metric.probe == probe and metric.heading]
    values = frames.probe_outcomes(study.probes[probe], metrics)
    if values.empty:
        return
    here = study.runs.merge(values[CELL].drop_duplicates(), on=CELL)
    # Of a cell's runs some may have had the probe: a done one without it is no gap.
    measured = here[(here["state"] != "done") | here["run"].isin(values["run"])]
    tidy = frames.summarize(measured, values, [metric.name for metric in metrics], confidence)
    logs = tidy["quantity"].isin([metric.name for metric in metrics if metric.log])
    tidy.loc[logs, ["mean", "low", "high"]] = np.exp(tidy.loc[logs, ["mean", "low", "high"]])
    title, caption = _PROBES[probe]
    yield Table(
        name=f"probe_{probe}",
        title=title,
        caption=f"{caption} Then the mean over the seeds whose run is done, ± half of the {100 * confidence:g} %"
        " t-interval; geometric, with the interval in brackets, for positive quantities of any size. No interval where"
        " n = 1.",
        tidy=tidy,
        rows=lists(
            tidy,
            {
                metric.name: (metric.heading, with_geometric_interval if metric.log else _three_digits)
                for metric in metrics
            },
        ),
        runs=list(measured["run"]),
    )


def _three_digits(row: Any) -> str:
    return with_interval(row, None)
