"""Figures of the measure that a study is compared by, its accuracy or its loss: along the training, and at its end.

Frames are those of `panels.arrange`: variant, where, condition beside setting, arm, batch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from normlab.common.errors import exact
from normlab.report.analysis.cells import with_counts
from normlab.report.analysis.frames import CELL, named_rows
from normlab.report.analysis.metrics import Metric
from normlab.report.figures.marks import Mark, mark
from normlab.report.figures.panels import (
    Panel,
    Theme,
    by_variant,
    common,
    grid,
    multiples,
    n_seeds,
    only_cell,
    ordered,
    rows_of,
    ticks,
    trend,
    wrapped,
)  # fmt: skip
from normlab.report.figures.style import BLACK, BLUE, Canvas, Style, legend, limit, styles
from normlab.report.study.arms import in_order
from normlab.report.study.load import Study

BN = "bn, for comparison"  # an entry of a legend
SEEDS = 10  # whose values a mark lists
NUMBER = r"\d[\d.]*(?:e[-+]?\d+)?"


@dataclass(frozen=True)
class Finals:
    """The measure at the end of the done runs: `values` has the columns `on`, by which cells differ, seed and value."""

    metric: Metric
    values: pd.DataFrame
    on: Sequence[str] = tuple(CELL)

    @cached_property
    def of_seeds(self) -> dict[Any, list[str]]:
        """Return the seeds of each cell with their values, as texts."""
        texts: dict[Any, list[str]] = {}
        for run in named_rows(self.values):
            texts.setdefault(self._key(run), []).append(f"{run.seed}: {run.value:.4g}")
        return texts

    def marks(self, rows: pd.DataFrame) -> list[Mark]:
        """Return a mark per row of a tidy frame: the text of the accuracy table's cell, its interval, its seeds."""
        found = []
        for row in named_rows(rows):
            lines = [", ".join(filter(None, (row.arm, row.short, f"batch {row.batch}")))]
            lines += [f"at {row.x}"] if "x" in self.on else []
            lines.append(with_counts(row, self.metric.decimals))
            if row.n > 1:
                lines.append(f"interval: {row.low:.4g} to {row.high:.4g}")
            if seeds := self.of_seeds.get(self._key(row), []):
                lines.append(f"seeds {', '.join(seeds[:SEEDS])}{', ...' if len(seeds) > SEEDS else ''}")
            found.append(Mark("\n".join(lines), (row.setting, row.arm, int(row.batch))))
        return found

    def _key(self, row: Any) -> tuple[Any, ...]:
        return tuple(getattr(row, column) for column in self.on)

    def limit(self, ax: Axes, name: Literal["x", "y"], rows: pd.DataFrame) -> None:
        """Set the limits of one axis around what is drawn of these rows: means, intervals and single seeds."""
        seeds = self.values.merge(rows[[*self.on]].drop_duplicates(), on=[*self.on])["value"]
        shown = pd.concat([rows["mean"], rows["low"], rows["high"], seeds])
        limit(ax, name, shown, share=self.metric.unit == "%")

    def finish(self, figure: Figure, ax: Axes, rows: pd.DataFrame, label: str) -> Figure:
        """Set the vertical limits by these rows of a tidy frame, and the labels of the axes."""
        self.limit(ax, "y", rows)
        figure.supxlabel(label)
        figure.supylabel(self.metric.axis_label)
        return figure


def learning_curves(panels: Sequence[Panel], metric: Metric, theme: Theme, x: str) -> Figure:
    """Draw test (solid) and training values (dashed) along the training: mean and range over seeds.

    A diverged run is a dotted line that ends in a cross, part of no mean.

    Args:
        panels: rows are the evaluations of done and diverged runs (variant, seed, state, epoch, step, ...).
        measure: the measure that is drawn.
        theme: the styles and the canvas.
        x: `step`, as Ioffe 2017 and Santurkar et al. 2018 have it, `epoch`, in which batch sizes compare, or `task`.
    """
    every = rows_of(panels)
    both = dict.fromkeys((metric.train_column, metric.name))
    shown = [column for column in both if column in every and every[column].notna().any()]
    more = [
        Line2D([], [], color="0.4", ls="-", label=metric.images),
        Line2D([], [], color="0.4", ls="--", lw=0.8, label="training"),
    ]
    figure, axes = multiples(panels, theme, more if len(shown) > 1 else [], across=_across(panels, theme.canvas))
    for ax, panel in axes:
        for arm, rows in by_variant(panel.rows):
            if len(shown) > 1:
                done = rows[rows["state"] == "done"]
                trend(ax, done, x, metric.train_column, theme.styles[arm], metric.scale, ls="--", lw=0.8, marker="")
            trend(ax, rows, x, metric.name, theme.styles[arm], metric.scale)
        ticks(ax, panel.rows[x], 5)
    limit(axes[0][0], "y", every[shown].melt()["value"] * metric.scale, share=metric.unit == "%")
    per_epoch = (every["step"] / every["epoch"]).dropna().unique()
    steps = f" ({exact(per_epoch[0])} per epoch)" if len(per_epoch) == 1 and per_epoch[0] > 1 else ""
    figure.supxlabel(f"training step{steps}" if x == "step" else x)
    figure.supylabel(metric.axis_label.removeprefix(f"{metric.images} ") if len(shown) > 1 else metric.axis_label)
    return figure


def _across(panels: Sequence[Panel], canvas: Canvas) -> int | None:
    """Return the number of batch sizes, to stand beside each other where every condition has all of them."""
    batches = rows_of(panels)["batch"].nunique()
    return batches if 1 < batches <= max(canvas.across) and len(panels) % batches == 0 else None


def train_against_test(panels: Sequence[Panel], metric: Metric, theme: Theme) -> Figure:
    """Draw test against training values along the training.

    A line is the mean over seeds from epoch to epoch; a marker is where one seed ends. The distance from the diagonal
    is the train-test gap.

    Args:
        panels: rows are the evaluations of done runs.
        measure: the measure that is drawn.
        theme: the styles and the canvas.
    """
    pair = [metric.train_column, metric.name]
    across = _across(panels, theme.canvas) or theme.canvas.columns(len(panels))
    height = 2.6 if across < 3 and theme.canvas.width / across > 2 else 2.0
    figure, axes = multiples(panels, theme, height=height, across=across)
    for ax, panel in axes:
        ax.axline((1, 1), (2, 2), color="0.6", lw=0.7, ls="--", zorder=1)
        for arm, rows in by_variant(panel.rows):
            style = theme.styles[arm]
            path = common(rows, ["epoch"], pair).groupby("epoch")[pair].mean() * metric.scale
            ends = rows[rows["epoch"] == rows["epoch"].max()][pair] * metric.scale
            [line] = ax.plot(*path.to_numpy().T, color=style.color, lw=0.9, alpha=0.8)
            mark(line, arm)
            [markers] = ax.plot(*ends.to_numpy().T, color=style.color, marker=style.marker, ls="none", zorder=3)
            seeds, of_cell = rows.loc[ends.index, "seed"], only_cell(rows)
            pairs = zip(seeds, *ends.to_numpy().T, strict=True)
            texts = [f"{arm}, seed {seed}\ntraining: {x:.4g}, {metric.images}: {y:.4g}" for seed, x, y in pairs]
            mark(markers, arm, [Mark(text, of_cell) for text in texts])
        ax.set_box_aspect(1)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_locator(MaxNLocator(4))
    # The first epochs, far down the diagonal, would leave no room to see the ends apart.
    every = rows_of(panels)
    shown = every[every["epoch"] > every["epoch"].max() / 2][pair].melt()["value"] * metric.scale
    limit(axes[0][0], "x", shown, share=metric.unit == "%")
    limit(axes[0][0], "y", shown, share=metric.unit == "%")
    figure.supxlabel(metric.axis_label.replace(metric.images, "training"))
    figure.supylabel(metric.axis_label)
    return figure


def against_batch(panels: Sequence[Panel], finals: Finals, theme: Theme) -> Figure:
    """Draw the final measure against the batch size.

    Args:
        panels: rows of the accuracy table's tidy frame.
        finals: the measure and the done runs' outcomes.
        theme: the styles and the canvas.
    """
    figure, axes = multiples(panels, theme, height=2.3)
    every = rows_of(panels)
    batches = sorted({int(batch) for batch in every["batch"]})
    for ax, panel in axes:
        # Arms stand side by side at each batch size, so that their intervals do not hide each other.
        apart = min(0.1, 0.4 / len(panel.arms)) if (panel.rows["n"] > 1).any() else 0.0
        for arm, rows, offset in _side_by_side(panel.rows, apart):
            places = {batch: batch * 2**offset for batch in batches}
            estimates(Axis(ax, "batch", places), rows.sort_values("batch"), finals, theme.styles[arm])
    _powers_of_2(axes[0][0], batches)
    return finals.finish(figure, axes[0][0], every, "images per batch")


def _side_by_side(rows: pd.DataFrame, apart: float) -> Iterator[tuple[str, pd.DataFrame, float]]:
    """Yield each arm with its rows and its offset, which are `apart` from each other around 0."""
    last = rows["variant"].nunique() - 1
    for position, (arm, of_arm) in enumerate(by_variant(rows)):
        yield arm, of_arm, apart * (position - last / 2)


def against_norm_batch(panels: Sequence[Panel], finals: Finals, theme: Theme) -> Figure:
    """Draw the final measure against the images that the statistics are of, as Wu & He 2018 (GroupNorm) do.

    An arm that ran with the whole batch only, as those whose statistics do not see the batch need to, is a horizontal
    line with its interval as a band. Panels of a family show BN as a thin line beside them.

    Args:
        panels: rows of the accuracy table's tidy frame, of one batch size each, with the column `images`.
        finals: the measure and the done runs' outcomes.
        theme: the styles and the canvas.
    """
    crowded = any(panel.crowded for panel in panels)
    bn = [Line2D([], [], color=BLUE, lw=0.7, label=BN)] if crowded else []
    figure, axes = multiples(panels, theme, bn, height=2.3)
    every = rows_of(panels)
    sizes = sorted({int(images) for images in every["images"]})
    for ax, panel in axes:
        lost = 0
        for arm, rows, offset in _side_by_side(panel.rows, 0.06):
            if rows["norm_batch"].notna().any():
                places = {size: size * 2**offset for size in sizes}
                estimates(Axis(ax, "images", places), rows.sort_values("images"), finals, theme.styles[arm])
            else:
                lost += bool(rows.sort_values("images").iloc[0]["diverged"])
                _constant(ax, rows.sort_values("images")[:1], finals, theme.styles[arm], lost)
        reference = every[(every["variant"] == "bn") & every["place"].isin(panel.rows["place"])]
        if panel.crowded and "bn" not in set(panel.rows["variant"]):
            reference = reference.sort_values("images")
            [line] = ax.plot(reference["images"], reference["mean"], color=BLUE, lw=0.7, zorder=1)
            mark(line, BN)
    _powers_of_2(axes[0][0], sizes)
    return finals.finish(figure, axes[0][0], every, "images per normalization")


def _constant(ax: Axes, rows: pd.DataFrame, finals: Finals, style: Style, lost: int) -> None:
    """Draw one row as a horizontal line, its interval as a band, a cross in place `lost` from the right: divergence."""
    row, [of_cell] = rows.iloc[0], finals.marks(rows)
    line = ax.axhline(row["mean"], color=style.color, marker=style.marker, markevery=[0, 1], lw=0.9, ls="-.")
    mark(line, row["variant"], [of_cell, of_cell])
    if row["n"] > 1:
        mark(ax.axhspan(row["low"], row["high"], color=style.color, alpha=0.1, lw=0), row["variant"])
    if row["diverged"]:
        [cross] = ax.plot([1 - 0.04 * lost], [0.04], "x", color=style.color, transform=ax.transAxes)
        mark(cross, row["variant"], [of_cell])


def by_condition(panels: Sequence[Panel], finals: Finals, theme: Theme) -> Figure:
    """Draw the final measure of each arm under each of the study's conditions, with a panel per batch size.

    Conditions are depths, initializations, learning rates, samplers; those that differ by a number only are joined by
    lines.

    Args:
        panels: rows of the accuracy table's tidy frame, of one batch size each.
        finals: the measure and the done runs' outcomes.
        theme: the styles and the canvas.
    """
    every, canvas = rows_of(panels), theme.canvas
    conditions = ordered(every["where"])
    across = max(1, min(len(panels), canvas.across[0], int(12 * canvas.width / 7) // len(conditions)))
    longest = max(len(word) for condition in conditions for word in condition.split(", "))
    labels = 0.6 + 0.065 * longest * len(conditions) * across  # inches that they need beside each other
    wide = across > 1 or len(conditions) > 3 or labels > canvas.narrow
    width = canvas.width if wide else canvas.narrow
    figure, axes = multiples(panels, theme, height=2.4, across=across, width=width)
    line = "-" if _differ_by_a_number(conditions) else ""
    for ax, panel in axes:
        for arm, rows, offset in _side_by_side(panel.rows, min(0.12, 0.7 / len(panel.arms))):
            places = {condition: i + offset for i, condition in enumerate(conditions)}
            in_place = rows.iloc[rows["where"].map(places).argsort(kind="stable")]
            estimates(Axis(ax, "where", places), in_place, finals, theme.styles[arm], ls=line)
        ax.grid(visible=False, axis="x")
        if labels > width:
            ax.tick_params(axis="x", rotation=90)
    first = axes[0][0]
    first.set_xticks(range(len(conditions)), labels=[condition.replace(", ", "\n") for condition in conditions])
    first.set_xlim(-0.5, len(conditions) - 0.5)
    return finals.finish(figure, first, every, "")


def _differ_by_a_number(conditions: Sequence[str]) -> bool:
    """Return whether they differ in one number only, as the depths of a network do."""
    alike = len({re.sub(NUMBER, "0", condition) for condition in conditions}) == 1
    numbers = zip(*(re.findall(NUMBER, condition) for condition in conditions), strict=False)
    return alike and sum(len(set(values)) > 1 for values in numbers) == 1


def by_arm(tidy: pd.DataFrame, finals: Finals, canvas: Canvas) -> Figure:
    """Draw the final measure of every arm, one row each, a block per condition: for more arms than colors.

    Args:
        tidy: the accuracy table's tidy frame, of one batch size.
        finals: the measure and the done runs' outcomes.
        canvas: the size of the figure.
    """
    blocks = [(condition, tidy[tidy["condition"] == condition]) for condition in ordered(tidy["condition"])]
    titles = [wrapped(f"{condition} ({n_seeds(block)})", 2.4) for condition, block in blocks]
    width = canvas.narrow if max(map(len, tidy["variant"])) < 20 else canvas.width
    label = {arm: wrapped(arm, 0.4 * width) for arm in tidy["variant"].unique()}
    lines = max(text.count("\n") + 1 for text in label.values())
    heights = [block["variant"].nunique() * (0.25 + 0.75 * lines) + 0.4 for _, block in blocks]
    room = sum(title.count("\n") + 2 for title in titles)  # lines of titles, and the space around
    figure = Figure(figsize=(width, 0.14 * (sum(heights) + room) + 0.4), layout="constrained")
    axes = figure.subplots(len(blocks), 1, sharex=True, squeeze=False, height_ratios=heights).ravel()
    for ax, title, (_, block) in zip(axes, titles, blocks, strict=True):
        arms = in_order(block["variant"])
        for i, (arm, rows) in enumerate(by_variant(block)):
            estimates(Axis(ax, "variant", {arm: i}, upright=False), rows, finals, Style(BLACK, "o"))
        ax.set_yticks(range(len(arms)), labels=[label[arm] for arm in arms])
        ax.set_ylim(len(arms) - 0.4, -0.6)
        ax.set_title(title, loc="left")
    finals.limit(axes[0], "x", tidy)
    axes[-1].set_xlabel(finals.metric.axis_label)
    return figure


def against_option(panels: Sequence[Panel], finals: Finals, canvas: Canvas) -> Figure:
    """Draw the final measure against a number that a norm's options vary, one line per value of a second one.

    As gamma's start and the divisor of its learning rate in Davis & Frank 2021.

    Args:
        panels: rows of the accuracy table's tidy frame with the columns x, line (texts, or ""), x_name.
        finals: the measure and the done runs' outcomes.
        canvas: the size of the figure.
    """
    across = canvas.columns(len(panels))
    figure, axes = grid(len(panels), across, canvas, height=2.3, sharex=False)
    every = rows_of(panels)
    names = ordered(every["line"])
    of_lines = dict(zip(names, styles(f"{i}" for i in range(len(names))).values(), strict=True))
    for ax, panel in zip(axes, panels, strict=True):
        rows = panel.rows
        places = sorted(rows["x"].unique())
        logarithmic = places[0] > 0 and places[-1] >= 10 * places[0]
        for i, name in enumerate(names):
            offset = 0.03 * (i - (len(names) - 1) / 2)
            span = places[-1] - places[0]
            at = {x: x * 10**offset if logarithmic else x + offset * span for x in places}
            of_line = rows[rows["line"] == name].sort_values("x")
            estimates(Axis(ax, "x", at, series="line"), of_line, finals, of_lines[name])
        ax.set_xscale("log" if logarithmic else "linear")
        ax.set_xticks(places, labels=[exact(x) for x in places])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel(rows["x_name"].iloc[0])
        ax.set_title(wrapped(panel.title, figure.get_figwidth() / across - 0.2))
    if any(names):
        lines = [Line2D([], [], color=style.color, marker=style.marker, label=name) for name, style in of_lines.items()]
        legend(figure, lines, canvas)
    return finals.finish(figure, axes[0], every, "")


def option_panels(study: Study, tidy: pd.DataFrame) -> list[Panel]:
    """Return the arms that differ in one or two numbers of their norm's options, with three values of one or more."""
    panels = []
    runs = study.runs[study.runs["run"].isin(study.configs)]
    of_arms = {arm: study.configs[run]["norm"] for arm, run in zip(runs["arm"], runs["run"], strict=True)}
    norms, names = tidy["arm"].map(of_arms), tidy["variant"].str.split(" ").str[0]
    for condition in ordered(tidy["condition"]):
        for name in in_order(names):
            chosen = (tidy["condition"] == condition) & (names == name)
            rows, options = tidy[chosen], norms[chosen].dropna()
            table = pd.DataFrame(list(options), index=options.index)
            counts = table.select_dtypes("number").nunique().sort_values(ascending=False, kind="stable")
            varied = list(counts[counts > 1].index)
            if not 1 <= len(varied) <= 2 or counts.iloc[0] < 3:
                continue
            table = table.dropna(subset=varied)
            line = [f"{varied[1]}={exact(value)}" for value in table[varied[1]]] if len(varied) > 1 else ""
            placed = rows.loc[table.index].assign(x=table[varied[0]], line=line, x_name=varied[0])
            panels.append(Panel(f"{name}, {condition} ({n_seeds(rows)})", placed))
    return panels


@dataclass(frozen=True)
class Axis:
    """The places of a column's values on an axis.

    Attributes:
        upright: whether the measure is on the vertical axis.
        series: the column that names the entry of the legend.
    """

    ax: Axes
    column: str
    places: Mapping[Any, float]
    upright: bool = True
    series: str = "variant"

    def plot(self, places: Sequence[float], values: Sequence[float], *form: Any, **style: Any) -> Line2D:
        """Plot values of the measure at these places."""
        [line] = self.ax.plot(*((places, values) if self.upright else (values, places)), *form, **style)
        return line


def estimates(axis: Axis, rows: pd.DataFrame, finals: Finals, style: Style, **line: Any) -> None:
    """Draw means with t-intervals, single seeds as faint dots, and a cross at the foot where runs diverged.

    Args:
        axis: the places of the rows.
        rows: of the tidy frame, one arm's.
        finals: the measure and the done runs' outcomes; those of the rows' cells are drawn.
        style: the arm's color and marker.
        line: more properties of the line through the means.
    """
    if rows.empty:
        return
    series, marks = str(rows[axis.series].iloc[0]), finals.marks(rows)
    at = [axis.places[value] for value in rows[axis.column]]
    mark(axis.plot(at, list(rows["mean"]), color=style.color, marker=style.marker, zorder=3, **line), series, marks)
    several = rows.assign(at=at)[rows["n"] > 1]
    if len(several):
        mean = several["mean"]
        ends = [mean - several["low"], several["high"] - mean]
        bars: dict[str, Any] = {"fmt": "none", "ecolor": style.color, "elinewidth": 0.9, "capsize": 2}
        if axis.upright:
            mark(axis.ax.errorbar(several["at"], mean, yerr=ends, **bars), series)
        else:
            mark(axis.ax.errorbar(mean, several["at"], xerr=ends, **bars), series)
        dots = finals.values.merge(several[[*finals.on, "at"]], on=[*finals.on])
        mark(axis.plot(list(dots["at"]), list(dots["value"]), ".", color=style.color, alpha=0.45, ms=3), series)
    lost = [(place, of_cell) for place, of_cell, d in zip(at, marks, rows["diverged"], strict=True) if d]
    if lost:
        places, of_lost = zip(*lost, strict=True)
        foot = axis.ax.get_xaxis_transform() if axis.upright else axis.ax.get_yaxis_transform()
        mark(axis.plot(places, [0.04] * len(lost), "x", color=style.color, transform=foot), series, of_lost)


def _powers_of_2(ax: Axes, sizes: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, labels=[str(size) for size in sizes])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
