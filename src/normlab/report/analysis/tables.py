"""The tables of a report: a study's numbers as tidy frames, as cells for a reader, with the texts of captions.yaml."""

import math
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from normlab.common.errors import exact, per_cent
from normlab.report.analysis import cells, frames
from normlab.report.analysis.cells import NOTHING, Row, Table, TableCell, grids, lists, note_on_cut
from normlab.report.analysis.frames import CELL, COUNTS, named_rows
from normlab.report.analysis.highlight import highlight_rule
from normlab.report.analysis.metrics import BEST, METRICS, Metric, task_metrics
from normlab.report.analysis.statistics import ENOUGH, RESAMPLES, TOO_FEW
from normlab.report.study.load import Study
from normlab.runs import reading

_CAPTIONS: dict[str, dict[str, str]] = reading.read_yaml(Path(__file__).with_name("captions.yaml"))


def _texts(name: str, **words: object) -> dict[str, str]:
    """Return title and caption of a table."""
    return {part: text.format(**words) for part, text in _CAPTIONS[name].items()}


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

    def complete(self) -> bool:
        """Return whether all runs are part of the means."""
        compared = self.of(self.metric.epoch)
        return bool(compared["n"].eq(compared[COUNTS].sum(axis=1)).all())

    def texts(self, name: str, **words: object) -> dict[str, str]:
        """Return title and caption of a table."""
        metric, percent = self.metric, f"{per_cent(self.confidence)} %"
        seeds = "seeds" if self.complete() else "the n seeds whose run is done"
        return _texts(
            name,
            label=metric.label,
            Label=metric.label.capitalize(),
            Full=metric.full_label.capitalize(),
            percent=percent,
            unit=f", in {metric.unit}" if metric.unit else "",
            points=f", in {metric.points}" if metric.points else "",
            over=f"mean over {seeds}, ± half of the {percent} t-interval",
            **words,
        )

    def directions(self, *quantities: str) -> dict[str, bool]:
        """Return whether higher is better, by quantity, as highlights take it."""
        return dict.fromkeys(quantities, bool(self.metric.higher_is_better))


def build_tables(
    study: Study, metric: Metric, baseline: str | None, thresholds: Sequence[float], confidence: float
) -> list[Table]:
    """Return every table that the study's evaluations allow, that of the metric first."""
    an_accuracy = metric.unit == "%"
    thresholds = thresholds if an_accuracy else ()
    values = frames.outcomes(study, metric, thresholds)
    means = frames.summarize(study.runs, values, frames.quantities(thresholds), confidence, frames.bounds_of(metric))
    summary = _Summary(study, metric, thresholds, confidence, values, means)
    tables = [_metric_table(summary)]
    if baseline is not None:
        tables += _difference_table(summary, baseline)
    if an_accuracy:
        tables += _overall_table(summary, baseline)
    tables.append(_convergence_table(summary))
    if thresholds:
        tables += [_reached_table(summary, "epochs", 1), _reached_table(summary, "seconds", 0)]
    return [*tables, _cost_table(summary)]


def _metric_table(summary: _Summary) -> Table:
    metric = summary.metric
    tidy = summary.of(metric.epoch)
    title, epoch = metric.label, "after the last epoch"
    if metric.epoch == BEST:
        title, epoch = metric.full_label, f"at the best epoch: {_best_epoch(summary)}"
    return Table(
        metric.name.removeprefix("test_"),
        **summary.texts(
            "metric", title=title.capitalize(), epoch=epoch, notes=_not_counted(tidy) + note_on_cut(tidy, "0 and 100 %")
        ),
        tidy=tidy,
        rows=grids(tidy, lambda row: cells.with_counts(row, metric.decimals), summary.directions(metric.epoch)),
        rule=highlight_rule("mean", tidy),
    )


def _difference_table(summary: _Summary, baseline: str) -> Iterator[Table]:
    metric = summary.metric
    values, bounds = summary.values, metric.difference_bounds
    tidy = frames.differences(summary.study.runs, values, metric.epoch, baseline, summary.confidence, bounds)
    if tidy.empty:
        return
    decimals = None if metric.decimals is None else metric.decimals + 1
    few = "".join(f" n = {n}: {TOO_FEW}." for n in sorted(set(tidy["n"])) if 0 < n < ENOUGH)
    if (tidy["diverged"].gt(0) & tidy["p_holm"].notna()).any():
        few += f" {_CAPTIONS['words']['survivors']}"
    few += note_on_cut(tidy, "-100 and 100 points")
    rows = grids(tidy, lambda row: cells.with_test(row, decimals))
    yield Table("difference", **summary.texts("difference", baseline=baseline, notes=few), tidy=tidy, rows=rows)


def _overall_table(summary: _Summary, baseline: str | None) -> Iterator[Table]:
    tidy = frames.overall(summary.study, summary.values, summary.metric.epoch, baseline, summary.confidence)
    if tidy.empty:
        return
    against = (
        f"; difference to {baseline}, paired by seed; probability that an arm's run beats one of {baseline}, ties as"
        " one half, averaged over cells"
    )
    texts = summary.texts("overall", notes=against if baseline else "", resamples=RESAMPLES)
    yield Table("overall", **texts, tidy=tidy, rows=_overall_rows(tidy, baseline))


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
            number = TableCell(f"{row.cells} of {row.of_cells}", row.cells)
            rows[row.setting].append(
                {"arm": TableCell(row.arm), "cells": number, "seeds": TableCell(str(row.n), row.n)}
            )
        line = rows[row.setting][-1]
        partly = f", over {row.cells} cells" if row.cells < line["cells"].value else ""
        line[heading] = TableCell(f"{row.mean:{shown}}{ends}{partly}", row.mean)
    return dict(rows)


def _convergence_table(summary: _Summary) -> Table:
    metric = summary.metric
    unit = f" ({metric.unit})" if metric.unit else ""
    headings, gap = {"final": f"final{unit}", "best": f"best{unit}"}, ""
    if metric.name != metric.train_column:
        images = metric.name.partition("_")[0]
        headings["train"] = f"train{unit}"
        headings["gap"] = f"train-{images} gap" if metric.higher_is_better else f"{images}-train gap"
        gap = f", and the final gap between training and {metric.images} images"
        gap += f", in {metric.points}" if metric.points else ""

    def text(row: Any) -> str:
        return cells.with_interval(row, metric.decimals, "+" if row.quantity == "gap" else "")

    tidy = summary.of(*headings)
    notes = "" if summary.complete() else " runs: done runs; others are not part of the means."
    notes += note_on_cut(tidy, "0 and 100 % (a gap: at -100 and 100 points)")
    return Table(
        "convergence",
        **summary.texts("convergence", best=_best_epoch(summary), gap=gap, notes=notes),
        tidy=tidy,
        rows=lists(tidy, headings, text, summary.directions("final", "best")),
        rule=highlight_rule("means of final and of best", tidy),
    )


def _reached_table(summary: _Summary, kind: str, decimals: int) -> Table:
    """Return the table of the epochs, or the seconds, until each threshold is reached."""

    def text(row: Any) -> str:
        if not row.done or not row.n:
            return "not reached" if row.done else NOTHING
        return cells.with_interval(row, decimals)

    headings = {f"{kind}_to_{exact(t)}": f"{per_cent(t)} %" for t in summary.thresholds}
    tidy = summary.of(*headings)
    name = f"{kind}_to_accuracy"
    rows = lists(tidy, headings, text, dict.fromkeys(headings, False))
    rule = highlight_rule("(lowest) mean of each column", tidy)
    return Table(name, **summary.texts(name), tidy=tidy, rows=rows, rule=rule)


def _cost_table(summary: _Summary) -> Table:
    def text(row: Any) -> str:
        if row.quantity == "parameters" and row.n:  # the same for all seeds
            return f"{row.mean:,.0f}"
        return cells.with_interval(row, 0)

    tidy = summary.of(*frames.COST)
    headings = dict(zip(frames.COST, ("seconds", "images/s", "peak MiB", "parameters"), strict=True))
    return Table("cost", **summary.texts("cost"), tidy=tidy, rows=lists(tidy, headings, text))


def _best_epoch(summary: _Summary) -> str:
    """Return in words how the best epoch is chosen."""
    metric, evaluations = summary.metric, summary.study.evaluations
    done = evaluations[evaluations["state"] == "done"]
    if frames.column_of(done, "task").notna().any():
        return "as a rule that of the first task, whose classes are fewest"
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


def task_tables(study: Study, confidence: float) -> Iterator[Table]:
    """Yield the table of the tasks, of runs whose classes come task after task."""
    rows = study.evaluations
    if "task" in rows:
        metrics = {metric.name: metric for metric in task_metrics(rows)}
        tasked = {run for run, config in study.configs.items() if _sampler(config) == "class_incremental"}
        rows = rows[rows["task"].notna()]
        yield from _measured_table(study, "tasks", rows, metrics, tasked, confidence)


def _sampler(config: Mapping[str, Any]) -> object:
    return (config.get("sampler") or {}).get("name")


def probe_tables(study: Study, confidence: float) -> list[Table]:
    """Return one table per probe that a done run has measurements of."""
    probes = [probe for probe in dict.fromkeys(m.probe for m in METRICS.values()) if probe in study.probes]
    return [table for probe in probes for table in _probe_table(study, str(probe), confidence)]


def _probe_table(study: Study, probe: str, confidence: float) -> Iterator[Table]:
    metrics = {metric.name: metric for metric in METRICS.values() if metric.probe == probe and metric.heading}
    probed = {run for run, config in study.configs.items() if probe in (config.get("probe") or {})}
    yield from _measured_table(study, f"probe_{probe}", study.probes[probe], metrics, probed, confidence)


def _measured_table(
    study: Study,
    name: str,
    rows: pd.DataFrame,
    metrics: Mapping[str, Metric],
    measuring: Container[str],
    confidence: float,
) -> Iterator[Table]:
    """Yield the table of some metrics of the done runs that have these rows; `measuring`: those that were to."""
    values = frames.probe_outcomes(rows, list(metrics.values()))
    if values.empty:
        return
    metrics = {name: metric for name, metric in metrics.items() if values[name].notna().any()}  # records may be older
    lost = study.runs[study.runs["state"] == "diverged"]
    lost = lost[lost["run"].map(lambda run: run in measuring).astype(bool)]
    here = study.runs.merge(pd.concat([values[CELL], lost[CELL]]).drop_duplicates(), on=CELL)
    # Of a cell's runs some may have had the probe: a done one without it is no gap.
    measured = here[(here["state"] != "done") | here["run"].isin(values["run"])]
    tidy = frames.summarize(
        measured, values, list(metrics), confidence, {name: m.bounds for name, m in metrics.items()}
    )
    logs = tidy["quantity"].isin([name for name, metric in metrics.items() if metric.log])
    with np.errstate(over="ignore"):  # a wide interval's end: infinite
        tidy.loc[logs, ["mean", "low", "high"]] = np.exp(tidy.loc[logs, ["mean", "low", "high"]])
    shown = lists(
        tidy,
        {name: metric.heading for name, metric in metrics.items()},
        lambda row: (
            cells.with_geometric_interval(row)
            if metrics[row.quantity].log
            else cells.with_interval(row, metrics[row.quantity].decimals)
        ),
    )
    words = _texts("words", percent=f"{per_cent(confidence)} %")
    texts = _texts(name, **words)
    texts["caption"] += note_on_cut(tidy[~logs], "what a share can be")
    yield Table(name, **texts, tidy=tidy, rows=shown, runs=list(measured["run"]))
