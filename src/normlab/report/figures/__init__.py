"""The figures of a report: DataFrame in, Figure out. A figure is drawn for any study that has the data for it.

`style` says how they look, `panels` what stands in which panel, `accuracy` and `probes` draw.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from normlab.report.analysis.cells import Table
from normlab.report.analysis.metric import Measure
from normlab.report.analysis.tables import outcomes
from normlab.report.figures import accuracy as accuracies
from normlab.report.figures import probe_figures as probes
from normlab.report.figures.panels import Drawn, arrange, common_setting, pages, rows_of, split
from normlab.report.figures.style import CROWD, DOUBLE, PAPER, SINGLE, Canvas, Style, encode, styles
from normlab.report.study.load import Study
from normlab.runs.states import FINISHED

__all__ = ["DOUBLE", "SINGLE", "Canvas", "Named", "draw", "encode", "styles"]

_CAPTIONS = {
    "against_batch": "{compared} against batch size: mean over seeds; bars: {percent:g} % t-interval (where"
    " n > 1); dots: single seeds; crosses at the foot: some runs diverged.",
    "against_norm_batch": "{compared} against the number of images that are normalised together: mean over seeds;"
    " bars: {percent:g} % t-interval (where n > 1); dots: single seeds; dash-dotted, interval as a band: arms that ran"
    " at one value only; crosses at the foot: some runs diverged.",
    "by_condition": "{compared} under each condition: mean over seeds; bars: {percent:g} % t-interval (where n > 1);"
    " dots: single seeds; crosses at the foot: some runs diverged.",
    "by_arm": "{compared} of each arm: mean over seeds; bars: {percent:g} % t-interval (where n > 1); dots: single"
    " seeds; crosses at the left: some runs diverged.",
    "against_option": "{compared} against what the options of a norm vary: mean over seeds; bars: {percent:g} %"
    " t-interval (where n > 1); dots: single seeds; crosses at the foot: some runs diverged.",
    "learning_curves": "The {label} along the training (solid), and that of the training images as recorded while"
    " training (dashed): means over the done seeds; band: lowest to highest seed (where n > 1); dotted: diverged runs.",
    "train_against_test": "{images} against training values (those seen while training) from epoch to epoch, the"
    " second half of the training in view; lines: mean over the done seeds; markers: where each seed ends;"
    " dashed: equal values.",
}


class Named(NamedTuple):
    """A figure with its name and caption, and the rows that it shows (setting, arm, batch and, of single runs, run)."""

    name: str
    caption: str
    figure: Figure
    rows: pd.DataFrame


def draw(study: Study, accuracy: Table, measure: Measure, confidence: float, canvas: Canvas = PAPER) -> Iterator[Named]:
    """Every figure that the study's measurements allow."""
    drawn = _draw(study, accuracy, measure, confidence, canvas)
    while True:
        with canvas.context():  # for our own work only, not for what is done with a figure
            found = next(drawn, None)
        if found is None:
            return
        yield found._replace(figure=canvas.shape(found.figure))


def _draw(study: Study, accuracy: Table, measure: Measure, confidence: float, canvas: Canvas) -> Iterator[Named]:
    common = f"{common_setting(study)}. ".removeprefix(". ")
    looks = styles(arrange(study, study.runs.dropna(subset=["arm"]))["variant"])
    found = [*_ends(study, accuracy, measure, looks, canvas), *_courses(study, measure, looks, canvas)]
    for kind, prefix, figures in found:
        caption = _CAPTIONS[kind].format(
            compared=measure.compared.capitalize(),
            label=measure.label,
            images=measure.images.capitalize(),
            percent=100 * confidence,
        )
        for i, drawn in enumerate(figures):
            yield Named(f"{prefix}{kind}_{i + 1}" if i else f"{prefix}{kind}", common + caption, *drawn)
    finished = {probe: arrange(study, _finished(rows)) for probe, rows in study.probes.items()}
    for name, caption, drawn in probes.figures(finished, looks, canvas):
        yield Named(name, common + caption, *drawn)


def _finished(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["state"].isin(FINISHED)]


Kinds = Iterator[tuple[str, str, Iterator[Drawn]]]  # kind, what comes before it in the name, pages


def _ends(study: Study, accuracy: Table, measure: Measure, looks: dict[str, Style], canvas: Canvas) -> Kinds:
    """The final values, against what the study varies."""
    values, tidy = outcomes(study, measure).rename(columns={measure.value: "value"}), accuracy.tidy
    tidy = arrange(study, tidy[tidy.groupby("setting")["n"].transform("sum") > 0])
    if tidy.empty:
        return
    prefix = f"{accuracy.name}_"
    several_batches = tidy["batch"].nunique() > 1
    tidy["images"] = tidy["norm_batch"].fillna(tidy["batch"].astype(float))
    tidy["told_batch"] = [f"batch {batch}" if several_batches else "" for batch in tidy["batch"]]
    tidy["place"] = [", ".join(filter(None, pair)) for pair in zip(tidy["short"], tidy["told_batch"], strict=True)]

    def paged(draw: Callable[..., Figure], by: str) -> Iterator[Drawn]:
        for page in pages(split(tidy, by), canvas.panels):
            yield draw(page, values, measure, looks, canvas), rows_of(page)

    options = accuracies.option_panels(study, tidy)
    if several_batches:
        yield "against_batch", prefix, paged(accuracies.against_batch, "where")
    if tidy["norm_batch"].notna().any() and tidy.groupby("place")["images"].nunique().max() > 2:
        yield "against_norm_batch", prefix, paged(accuracies.against_norm_batch, "place")
    elif len(tidy) == max(1, sum(len(rows) for _, rows in options)):
        pass  # one cell, or cells that are all in the figure of options
    elif not several_batches and (tidy["where"].nunique() == 1 or tidy["variant"].nunique() > CROWD):
        yield "by_arm", prefix, iter([(accuracies.by_arm(tidy, values, measure, canvas), tidy)])
    elif tidy["where"].nunique() > 1:
        yield "by_condition", prefix, paged(accuracies.by_condition, "told_batch")
    if options:
        found = ((page, pd.concat([rows for _, rows in page])) for page in pages(options, canvas.panels))
        drawn = ((accuracies.against_option(page, values, measure, canvas), rows) for page, rows in found)
        yield "against_option", prefix, drawn


def _courses(study: Study, measure: Measure, looks: dict[str, Style], canvas: Canvas) -> Kinds:
    """The measure along the training."""
    curves = _finished(study.evaluations)
    if measure.column not in curves:
        return
    curves = arrange(study, curves[curves.groupby("setting")[measure.column].transform("count") > 0])
    if curves.empty:
        return
    # Batch sizes compare in epochs; the papers that have one count steps.
    x = "epoch" if curves["batch"].nunique() > 1 or "step" not in curves else "step"
    found = pages(split(curves), canvas.panels)
    drawn = ((accuracies.learning_curves(page, measure, looks, canvas, x), rows_of(page)) for page in found)
    yield "learning_curves", "", drawn
    if measure.train_column in curves and measure.train_column != measure.column:
        done = curves[curves["state"] == "done"].dropna(subset=[measure.column, measure.train_column])
        panels = split(done)
        if any(panel.crowded for panel in panels):  # so many ends lie on each other
            return
        found = pages(panels, canvas.panels)
        drawn = ((accuracies.train_against_test(page, measure, looks, canvas), rows_of(page)) for page in found)
        yield "train_against_test", "", drawn
