"""Figures of what a study is compared by, its accuracy or its loss: along the training, and at its end.

Frames are those of `panels.arrange`: variant, where, condition beside setting, arm, batch.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from normlab.report.analysis.metrics import Metric
from normlab.report.figures.panels import Panel, grid, multiples, ordered, rows_of, ticks, trend, wrapped
from normlab.report.figures.style import BLACK, BLUE, Canvas, Style, legend, limit, seeds, styles
from normlab.report.study.arms import in_order
from normlab.report.study.load import Study

NUMBER = r"\d[\d.]*(?:e[-+]?\d+)?"


def learning_curves(
    found: Sequence[Panel], metric: Metric, looks: Mapping[str, Style], canvas: Canvas, x: str
) -> Figure:
    """Test (solid) and training values (dashed) along the training: mean over seeds, band from lowest to highest seed.

    A diverged run is a dotted line that ends in a cross, part of no mean.

    Args:
        found: rows are the evaluations of done and diverged runs (variant, seed, state, epoch, step, ...).
        x: `step`, as Ioffe 2017 and Santurkar et al. 2018 have it, or `epoch`, in which batch sizes compare.
    """
    both = dict.fromkeys((metric.train_column, metric.name))
    shown = [column for column in both if _known(found, column)]
    more = [
        Line2D([], [], color="0.4", ls="-", label=metric.images),
        Line2D([], [], color="0.4", ls="--", lw=0.8, label="training"),
    ]
    figure, drawn = multiples(found, looks, canvas, more if len(shown) > 1 else [], across=_across(found, canvas))
    for ax, panel in drawn:
        for arm in in_order(panel.rows["variant"]):
            rows = panel.rows[panel.rows["variant"] == arm]
            if len(shown) > 1:
                done = rows[rows["state"] == "done"]
                trend(ax, done, x, metric.train_column, looks[arm], metric.scale, ls="--", lw=0.8, marker="")
            trend(ax, rows, x, metric.name, looks[arm], metric.scale)
        ticks(ax, panel.rows[x], 5)
    every = rows_of(found)
    limit(drawn[0][0], "y", every[shown].melt()["value"] * metric.scale, share=metric.unit == "%")
    figure.supxlabel(_steps(every) if x == "step" else x)
    figure.supylabel(metric.axis_label.removeprefix(f"{metric.images} ") if len(shown) > 1 else metric.axis_label)
    return figure


def _across(found: Sequence[Panel], canvas: Canvas) -> int | None:
    """Batch sizes beside each other where every condition has all of them."""
    batches = len({batch for panel in found for batch in panel.rows["batch"]})
    return batches if 1 < batches <= max(canvas.across) and len(found) % batches == 0 else None


def _known(found: Sequence[Panel], column: str) -> bool:
    return any(column in panel.rows and panel.rows[column].notna().any() for panel in found)


def _steps(evaluations: pd.DataFrame) -> str:
    per_epoch = (evaluations["step"] / evaluations["epoch"]).dropna().unique()
    told = f" ({per_epoch[0]:g} per epoch)" if len(per_epoch) == 1 and per_epoch[0] > 1 else ""
    return f"training step{told}"


def train_against_test(found: Sequence[Panel], metric: Metric, looks: Mapping[str, Style], canvas: Canvas) -> Figure:
    """Test against training values along the training.

    A line is the mean over seeds from epoch to epoch; a marker is where one seed ends. The distance from the diagonal
    is the train-test gap.

    Args:
        found: rows are the evaluations of done runs.
    """
    pair = [metric.train_column, metric.name]
    across = _across(found, canvas) or canvas.columns(len(found))
    height = 2.6 if across < 3 and canvas.width / across > 2 else 2.0
    figure, drawn = multiples(found, looks, canvas, height=height, across=across)
    for ax, panel in drawn:
        ax.axline((1, 1), (2, 2), color="0.6", lw=0.7, ls="--", zorder=1)
        for arm in in_order(panel.rows["variant"]):
            look, of_arm = looks[arm], panel.rows[panel.rows["variant"] == arm]
            path = of_arm.groupby("epoch")[pair].mean() * metric.scale
            ends = of_arm[of_arm["epoch"] == of_arm["epoch"].max()][pair] * metric.scale
            ax.plot(*path.to_numpy().T, color=look.color, lw=0.9, alpha=0.8)
            ax.plot(*ends.to_numpy().T, color=look.color, marker=look.marker, ls="none", zorder=3)
        ax.set_box_aspect(1)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_locator(MaxNLocator(4))
    # The first epochs, far down the diagonal, would leave no room to see the ends apart.
    every = rows_of(found)
    late = every[every["epoch"] > every["epoch"].max() / 2]
    shown = late[pair].melt()["value"] * metric.scale
    for name in ("x", "y"):
        limit(drawn[0][0], name, shown, share=metric.unit == "%")
    figure.supxlabel(metric.axis_label.replace(metric.images, "training"))
    figure.supylabel(metric.axis_label)
    return figure


def against_batch(
    found: Sequence[Panel], values: pd.DataFrame, metric: Metric, looks: Mapping[str, Style], canvas: Canvas
) -> Figure:
    """The final measure against the batch size.

    Args:
        found: rows of the accuracy table's tidy frame.
        values: the done runs' outcomes (setting, arm, batch, value).
    """
    figure, drawn = multiples(found, looks, canvas, height=2.3)
    every = rows_of(found)
    batches = sorted({int(batch) for batch in every["batch"]})
    for ax, panel in drawn:
        arms = in_order(panel.rows["variant"])
        # Arms stand side by side at each batch size, so that their intervals do not hide each other.
        apart = min(0.1, 0.4 / len(arms)) if (panel.rows["n"] > 1).any() else 0.0
        for position, arm in enumerate(arms):
            dodge = 2 ** (apart * (position - (len(arms) - 1) / 2))
            rows = panel.rows[panel.rows["variant"] == arm].sort_values("batch")
            estimates(ax, rows, values, looks[arm], {batch: batch * dodge for batch in batches}, "batch")
    _powers_of_2(drawn[0][0], batches)
    _finish(figure, drawn[0][0], every, metric, "images per batch")
    return figure


def against_norm_batch(
    found: Sequence[Panel], values: pd.DataFrame, metric: Metric, looks: Mapping[str, Style], canvas: Canvas
) -> Figure:
    """The final measure against the images that the statistics are of, as Wu & He 2018 (GroupNorm) do.

    An arm that ran with the whole batch only, as those whose statistics do not see the batch need to, is a horizontal
    line with its interval as a band. Panels of a family show BN as a thin line beside them.

    Args:
        found: rows of the accuracy table's tidy frame, of one batch size each, with the column `images`.
        values: the done runs' outcomes, likewise.
    """
    crowded = any(panel.crowded for panel in found)
    bn = [Line2D([], [], color=BLUE, lw=0.7, label="bn, for comparison")] if crowded else []
    figure, drawn = multiples(found, looks, canvas, bn, height=2.3)
    every = rows_of(found)
    sizes = sorted({int(images) for images in every["images"]})
    for ax, panel in drawn:
        arms, lost = in_order(panel.rows["variant"]), 0
        for position, arm in enumerate(arms):
            look, rows = looks[arm], panel.rows[panel.rows["variant"] == arm].sort_values("images")
            if rows["norm_batch"].notna().any():
                dodge = 2 ** (0.06 * (position - (len(arms) - 1) / 2))
                estimates(ax, rows, values, look, {size: size * dodge for size in sizes}, "images")
                continue
            row: Any = next(rows.itertuples(index=False))
            ax.axhline(row.mean, color=look.color, marker=look.marker, markevery=[0, 1], lw=0.9, ls="-.")
            if row.n > 1:
                ax.axhspan(row.low, row.high, color=look.color, alpha=0.1, lw=0)
            if row.diverged:
                lost += 1
                ax.plot([1 - 0.04 * lost], [0.04], "x", color=look.color, transform=ax.transAxes)
        reference = every[(every["variant"] == "bn") & every["place"].isin(panel.rows["place"])]
        if panel.crowded and "bn" not in set(panel.rows["variant"]):
            reference = reference.sort_values("images")
            ax.plot(reference["images"], reference["mean"], color=BLUE, lw=0.7, zorder=1)
    _powers_of_2(drawn[0][0], sizes)
    _finish(figure, drawn[0][0], every, metric, "images per normalisation")
    return figure


def by_condition(
    found: Sequence[Panel], values: pd.DataFrame, metric: Metric, looks: Mapping[str, Style], canvas: Canvas
) -> Figure:
    """The final measure of each arm under each of the study's conditions but the batch size, which has panels: depths,
    starts, learning rates, samplers. Conditions that differ by a number only are joined by lines.

    Args:
        found: rows of the accuracy table's tidy frame, of one batch size each.
        values: the done runs' outcomes.
    """
    every = rows_of(found)
    conditions = ordered(every["where"])
    lines = _differ_by_a_number(conditions)
    across = max(1, min(len(found), canvas.across[0], int(12 * canvas.width / 7) // len(conditions)))
    longest = max(len(word) for condition in conditions for word in condition.split(", "))
    labels = 0.6 + 0.065 * longest * len(conditions) * across  # inches that they need beside each other
    wide = across > 1 or len(conditions) > 3 or labels > canvas.narrow
    width = canvas.width if wide else canvas.narrow
    figure, drawn = multiples(found, looks, canvas, height=2.4, across=across, width=width)
    for ax, panel in drawn:
        arms = in_order(panel.rows["variant"])
        for position, arm in enumerate(arms):
            dodge = min(0.12, 0.7 / len(arms)) * (position - (len(arms) - 1) / 2)
            places = {condition: i + dodge for i, condition in enumerate(conditions)}
            rows = panel.rows[panel.rows["variant"] == arm]
            rows = rows.sort_values("where", key=lambda column: column.map(places))
            estimates(ax, rows, values, looks[arm], places, "where", ls="-" if lines else "")
    ax = drawn[0][0]
    ax.set_xticks(range(len(conditions)), labels=[condition.replace(", ", "\n") for condition in conditions])
    if labels > width:
        for other, _ in drawn:
            other.tick_params(axis="x", rotation=90)
    ax.set_xlim(-0.5, len(conditions) - 0.5)
    for other, _ in drawn:
        other.grid(visible=False, axis="x")
    _finish(figure, ax, every, metric, "")
    return figure


def _differ_by_a_number(conditions: Sequence[str]) -> bool:
    """Whether one number is all that tells them apart, as the depths of a network."""
    alike = len({re.sub(NUMBER, "0", condition) for condition in conditions}) == 1
    numbers = zip(*(re.findall(NUMBER, condition) for condition in conditions), strict=False)
    return alike and sum(len(set(values)) > 1 for values in numbers) == 1


def by_arm(tidy: pd.DataFrame, values: pd.DataFrame, metric: Metric, canvas: Canvas) -> Figure:
    """The final measure of every arm, one row each, a block per condition: for more arms than colours.

    Args:
        tidy: the accuracy table's tidy frame, of one batch size.
        values: the done runs' outcomes.
    """
    conditions = ordered(tidy["condition"])
    blocks = [tidy[tidy["condition"] == condition] for condition in conditions]
    titles = [
        wrapped(f"{condition} ({seeds(block['n'][block['n'] > 0])})", 2.4)
        for condition, block in zip(conditions, blocks, strict=True)
    ]
    width = canvas.narrow if max(map(len, tidy["variant"])) < 20 else canvas.width
    label = {arm: wrapped(arm, 0.4 * width) for arm in tidy["variant"].unique()}
    lines = max(text.count("\n") + 1 for text in label.values())
    heights = [block["variant"].nunique() * (0.25 + 0.75 * lines) + 0.4 for block in blocks]
    room = sum(title.count("\n") + 2 for title in titles)  # lines of titles, and the space around
    figure = Figure(figsize=(width, 0.14 * (sum(heights) + room) + 0.4), layout="constrained")
    axes = figure.subplots(len(blocks), 1, sharex=True, squeeze=False, height_ratios=heights).ravel()
    look = Style(BLACK, "o")
    for ax, title, block in zip(axes, titles, blocks, strict=True):
        arms = in_order(block["variant"])
        for i, arm in enumerate(arms):
            estimates(ax, block[block["variant"] == arm], values, look, {arm: i}, "variant", upright=False)
        ax.set_yticks(range(len(arms)), labels=[label[arm] for arm in arms])
        ax.set_ylim(len(arms) - 0.4, -0.6)
        ax.set_title(title, loc="left")
    limit(axes[0], "x", pd.concat([tidy["mean"], tidy["low"], tidy["high"]]), share=metric.unit == "%")
    axes[-1].set_xlabel(metric.axis_label)
    return figure


def against_option(
    found: Sequence[tuple[str, pd.DataFrame]], values: pd.DataFrame, metric: Metric, canvas: Canvas
) -> Figure:
    """The final measure against a number that a norm's options vary, one line per value of a second one: gamma's start
    and the divisor of its learning rate, as in Davis & Frank 2021.

    Args:
        found: per panel its title, and rows of the accuracy table's tidy frame with the columns x, line (texts, or
            ""), x_name.
        values: the done runs' outcomes.
    """
    across = canvas.columns(len(found))
    figure, axes = grid(len(found), across, canvas, height=2.3, sharex=False)
    every = pd.concat([rows for _, rows in found])
    names = ordered(every["line"])
    looks = dict(zip(names, styles(f"{i}" for i in range(len(names))).values(), strict=True))
    for ax, (title, rows) in zip(axes, found, strict=True):
        places = sorted(rows["x"].unique())
        logarithmic = places[0] > 0 and places[-1] >= 10 * places[0]
        for i, name in enumerate(names):
            offset = 0.03 * (i - (len(names) - 1) / 2)
            span = places[-1] - places[0]
            at = {x: x * 10**offset if logarithmic else x + offset * span for x in places}
            estimates(ax, rows[rows["line"] == name].sort_values("x"), values, looks[name], at, "x")
        ax.set_xscale("log" if logarithmic else "linear")
        ax.set_xticks(places, labels=[f"{x:g}" for x in places])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel(rows["x_name"].iloc[0])
        ax.set_title(wrapped(title, figure.get_figwidth() / across - 0.2))
    if any(names):
        told = [Line2D([], [], color=look.color, marker=look.marker, label=name) for name, look in looks.items()]
        legend(figure, told, canvas)
    _finish(figure, axes[0], every, metric, "")
    return figure


def option_panels(study: Study, tidy: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The arms that differ in one or two numbers of their norm's options, at least three values of one of them."""
    found = []
    runs = study.runs[study.runs["run"].isin(study.configs)]
    of_arms = {arm: study.configs[run]["norm"] for arm, run in zip(runs["arm"], runs["run"], strict=True)}
    norms = tidy["arm"].map(of_arms)
    for condition in ordered(tidy["condition"]):
        for name in in_order(tidy["variant"].str.split(" ").str[0]):
            chosen = (tidy["condition"] == condition) & (tidy["variant"].str.split(" ").str[0] == name)
            rows, options = tidy[chosen], norms[chosen].dropna()
            table = pd.DataFrame(list(options), index=options.index)
            counts = table.select_dtypes("number").nunique().sort_values(ascending=False, kind="stable")
            varied = list(counts[counts > 1].index)
            if not 1 <= len(varied) <= 2 or counts.iloc[0] < 3:
                continue
            table = table.dropna(subset=varied)
            line = [f"{varied[1]}={value:g}" for value in table[varied[1]]] if len(varied) > 1 else ""
            told = seeds(rows["n"][rows["n"] > 0])
            rows = rows.loc[table.index].assign(x=table[varied[0]], line=line, x_name=varied[0])
            found.append((f"{name}, {condition} ({told})", rows))
    return found


def estimates(
    ax: Axes,
    rows: pd.DataFrame,
    values: pd.DataFrame,
    look: Style,
    places: Mapping[Any, float],
    by: str,
    upright: bool = True,
    **line: Any,
) -> None:
    """Means with t-intervals, single seeds as faint dots, and a cross at the foot where runs diverged.

    Args:
        rows: of the tidy frame, one arm's.
        values: the done runs' outcomes; those of the rows' cells are drawn.
        places: where on the axis the rows' values of the column `by` stand.
        upright: whether the measure is the vertical axis.
    """

    def plot(x: Sequence[float], y: Sequence[float], *form: Any, **style: Any) -> None:
        ax.plot(*((x, y) if upright else (y, x)), *form, **style)

    at = [places[value] for value in rows[by]]
    plot(at, list(rows["mean"]), color=look.color, marker=look.marker, zorder=3, **line)
    several = rows["n"] > 1
    if several.any():
        x = [place for place, shown in zip(at, several, strict=True) if shown]
        half = (rows["high"] - rows["mean"])[several]
        bars: dict[str, Any] = {"fmt": "none", "ecolor": look.color, "elinewidth": 0.9, "capsize": 2}
        if upright:
            ax.errorbar(x, rows["mean"][several], yerr=half, **bars)
        else:
            ax.errorbar(rows["mean"][several], x, xerr=half, **bars)
        cells = rows[several].assign(at=x)[["setting", "arm", "batch", "at"]]
        dots = values.merge(cells, on=["setting", "arm", "batch"])
        plot(list(dots["at"]), list(dots["value"]), ".", color=look.color, alpha=0.45, ms=3)
    lost = [place for place, diverged in zip(at, rows["diverged"], strict=True) if diverged]
    if lost:
        foot = ax.get_xaxis_transform() if upright else ax.get_yaxis_transform()
        plot(lost, [0.04] * len(lost), "x", color=look.color, transform=foot)


def _powers_of_2(ax: Axes, sizes: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, labels=[str(size) for size in sizes])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)


def _finish(figure: Figure, ax: Axes, rows: pd.DataFrame, metric: Metric, label: str) -> None:
    limit(ax, "y", pd.concat([rows["mean"], rows["low"], rows["high"]]), share=metric.unit == "%")
    figure.supxlabel(label)
    figure.supylabel(metric.axis_label)
