"""The figures of a report: DataFrame in, Figure out. A figure is drawn for any study that has the data for it.

`style` has colors and sizes, `panels` divides the rows into panels, `accuracy` and `probe_figures` draw; `marks` keeps
what artists show, and `svg` writes it into a page.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from normlab.common.errors import per_cent
from normlab.report.analysis.cells import Table
from normlab.report.analysis.frames import outcomes
from normlab.report.analysis.metrics import Metric, ends_of_tasks
from normlab.report.figures import accuracy, probe_figures, sensitivity
from normlab.report.figures.panels import SINGLE_SEED, Drawing, Panel, Theme, arrange, common_setting, paged, split
from normlab.report.figures.style import CROWD, PAPER, Canvas, encode, missing_glyphs, styles
from normlab.report.figures.svg import as_svg
from normlab.report.study.load import Study
from normlab.runs import FINISHED, reading

__all__ = ["Canvas", "NamedFigure", "as_svg", "draw", "encode", "missing_glyphs", "styles"]

_CAPTIONS = reading.read_yaml(Path(__file__).with_name("captions.yaml"))


class NamedFigure(NamedTuple):
    """A figure with its name and caption, and the rows that it shows (setting, arm, batch and, of single runs, run)."""

    name: str
    caption: str
    figure: Figure
    rows: pd.DataFrame


def draw(
    study: Study, table: Table, metric: Metric, confidence: float, canvas: Canvas = PAPER
) -> Iterator[NamedFigure]:
    """Yield every figure that the study's measurements allow."""
    figures = _draw(study, table, metric, confidence, canvas)
    while True:
        with canvas.context():  # for our own work only, not for what is done with a figure
            named = next(figures, None)
        if named is None:
            return
        yield named._replace(figure=canvas.shape(named.figure))


def _draw(study: Study, table: Table, metric: Metric, confidence: float, canvas: Canvas) -> Iterator[NamedFigure]:
    common = "".join(
        f"{sentence} " for sentence in (f"{common_setting(study)}.".lstrip("."), *study.caveats) if sentence
    )
    theme = Theme(styles(arrange(study, study.placed)["variant"]), canvas)
    finished = {probe: arrange(study, _finished(rows)) for probe, rows in study.probes.items()}
    words: dict[str, Any] = {"percent": per_cent(confidence), "label": metric.label}
    words |= {"compared": metric.full_label.capitalize(), "images": metric.images.capitalize()}
    parts = {name: part.format(**words) for name, part in _CAPTIONS["parts"].items()}
    for prefix, kinds in (
        (f"{table.name}_", _of_ends(study, table, metric, theme)),
        ("", _of_training(study, metric, theme)),
        ("", iter([("sensitivity", sensitivity.figures(study, metric, confidence, theme))])),
        ("", probe_figures.figures(finished, theme)),
    ):
        for kind, drawings in kinds:
            caption = common + _CAPTIONS["captions"][kind].format(**words, **parts)
            for i, drawing in enumerate(drawings):
                name = f"{prefix}{kind}_{i + 1}" if i else f"{prefix}{kind}"
                yield NamedFigure(name, caption + _of_single_seeds(drawing[0]), *drawing)


def _of_single_seeds(figure: Figure) -> str:
    """Return the sentence on lines of single seeds, "" where there are none."""
    lines = (line for ax in figure.axes for line in ax.lines)
    return f" {_CAPTIONS['single_seeds']}" if any(line.get_gid() == SINGLE_SEED for line in lines) else ""


def _finished(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["state"].isin(FINISHED)]


Kinds = Iterator[tuple[str, Iterator[Drawing]]]  # each kind of figure with its pages


def _of_ends(study: Study, table: Table, metric: Metric, theme: Theme) -> Kinds:
    """Yield the final values, against what the study varies."""
    tidy = arrange(study, table.tidy[table.tidy.groupby("setting")["n"].transform("sum") > 0])
    if tidy.empty:
        return
    finals = accuracy.Finals(metric, outcomes(study, metric).rename(columns={metric.epoch: "value"}))
    several_batches = tidy["batch"].nunique() > 1
    tidy["images"] = tidy["norm_batch"].fillna(tidy["batch"].astype(float))
    tidy["batch_title"] = [f"batch {batch}" if several_batches else "" for batch in tidy["batch"]]
    tidy["place"] = [", ".join(filter(None, pair)) for pair in zip(tidy["short"], tidy["batch_title"], strict=True)]

    def split_by(column: str, draw: Callable[[Sequence[Panel], accuracy.Finals, Theme], Figure]) -> Iterator[Drawing]:
        return paged(split(tidy, column), theme.canvas.panels, lambda page: draw(page, finals, theme))

    options = accuracy.option_panels(study, tidy)
    if several_batches:
        yield "against_batch", split_by("where", accuracy.against_batch)
    if tidy["norm_batch"].notna().any() and tidy.groupby("place")["images"].nunique().max() > 2:
        yield "against_norm_batch", split_by("place", accuracy.against_norm_batch)
    elif len(tidy) == max(1, sum(len(panel.rows) for panel in options)):
        pass  # one cell, or cells that are all in the figure of options
    elif not several_batches and (tidy["where"].nunique() == 1 or tidy["variant"].nunique() > CROWD):
        yield "by_arm", iter([(accuracy.by_arm(tidy, finals, theme.canvas), tidy)])
    elif tidy["where"].nunique() > 1:
        yield "by_condition", split_by("batch_title", accuracy.by_condition)
    draw = partial(accuracy.against_option, finals=finals, canvas=theme.canvas)
    yield "against_option", paged(options, theme.canvas.panels, draw)


def _of_training(study: Study, metric: Metric, theme: Theme) -> Kinds:
    """Yield the measure along the training."""
    curves = _finished(study.evaluations)
    if metric.name not in curves:
        return
    curves = arrange(study, curves[curves.groupby("setting")[metric.name].transform("count") > 0])
    if curves.empty:
        return
    # Batch sizes compare in epochs; the papers that have one count steps.
    x = "epoch" if curves["batch"].nunique() > 1 or "step" not in curves else "step"
    draw = partial(accuracy.learning_curves, metric=metric, theme=theme, x=x)
    yield "learning_curves", paged(split(curves), theme.canvas.panels, draw)
    ends = ends_of_tasks(curves)
    if len(ends):
        ends = ends.drop(columns=[metric.train_column] if metric.train_column != metric.name else [], errors="ignore")
        draw = partial(accuracy.learning_curves, metric=metric, theme=theme, x="task")
        yield "tasks", paged(split(ends), theme.canvas.panels, draw)
    if metric.train_column in curves and metric.train_column != metric.name:
        panels = split(curves[curves["state"] == "done"].dropna(subset=[metric.name, metric.train_column]))
        if any(panel.crowded for panel in panels):  # so many ends lie on each other
            return
        draw = partial(accuracy.train_against_test, metric=metric, theme=theme)
        yield "train_against_test", paged(panels, theme.canvas.panels, draw)
