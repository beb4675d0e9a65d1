"""The figures of a report, for one setting each: DataFrame in, Figure out.

Sizes are those of a two-column paper. An arm has one colour and one marker in every figure of every
study. Colours are those of Okabe & Ito (2008), which colour-blind readers can tell apart.
"""

import io
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from normlab.report.arms import in_order
from normlab.report.load import FINISHED, Study
from normlab.report.tables import Measure, Table, outcomes

SINGLE, DOUBLE = 3.4, 7.0  # inches: widths of one and of two columns
_RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType: conferences refuse matplotlib's default, Type 3
}


_CAPTIONS = {
    "against_batch": "Final {label} against batch size: mean over seeds; bars: {percent:g} % t-interval (where"
    " n > 1); dots: single seeds; crosses at the foot: some runs diverged.",
    "learning_curves": "The {label} after each epoch: mean over the done seeds; band: lowest to highest seed"
    " (where n > 1); dotted: diverged runs.",
    "train_against_test": "Test against training values (those seen while training) from epoch to epoch, the"
    " second half of the training in view; lines: mean over the done seeds; markers: where each seed ends;"
    " dashed: equal values.",
}


class Style(NamedTuple):
    color: str
    marker: str


_KNOWN = {
    "bn": Style("#0072B2", "o"),
    "affine": Style("#D55E00", "s"),
    "bnminus": Style("#009E73", "^"),
    "none": Style("#000000", "D"),
}
_OTHERS = [
    Style(color, marker) for marker, color in itertools.product("vPX*<>", ("#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F"))
]


def styles(arms: Iterable[str]) -> dict[str, Style]:
    """Colour and marker of each arm. Unknown arms get theirs by name, so that studies agree on them;
    two that fall on the same one are set apart."""
    found: dict[str, Style] = {}
    for arm in in_order(arms):
        if arm in _KNOWN:
            found[arm] = _KNOWN[arm]
            continue
        first = zlib.crc32(arm.encode()) % len(_OTHERS)
        candidates = [*_OTHERS[first:], *_OTHERS[:first]]
        colors = {style.color for style in found.values()}
        free = [style for style in candidates if style not in found.values()]
        found[arm] = next((s for s in free if s.color not in colors), (free or candidates)[0])
    return found


def draw(study: Study, accuracy: Table, measure: Measure, confidence: float) -> Iterator[tuple[str, str, Figure]]:
    """Every figure that the study's measurements allow: its name, its caption, and itself."""
    values, evaluations = outcomes(study, measure), study.evaluations
    looks = styles(study.runs["arm"].dropna())
    for i, (setting, tidy) in enumerate(accuracy.tidy.groupby("setting", sort=False)):
        curves = evaluations[(evaluations["setting"] == setting) & evaluations["state"].isin(FINISHED)]
        done = curves[curves["state"] == "done"]
        figures = {}
        if tidy["n"].any():
            of_setting = values[values["setting"] == setting]
            figures[f"{accuracy.name}_against_batch"] = against_batch(tidy, of_setting, measure, looks)
        if measure.column in curves and curves[measure.column].notna().any():
            figures["learning_curves"] = learning_curves(curves, measure, looks)
        columns = [measure.column, measure.train_column]
        if set(columns) <= set(done) and len(done.dropna(subset=columns)):
            figures["train_against_test"] = train_against_test(done, measure, looks)
        for name, figure in figures.items():
            caption = next(text for end, text in _CAPTIONS.items() if name.endswith(end))
            caption = caption.format(label=measure.label, percent=100 * confidence)
            yield f"{name}_{i + 1}" if i else name, f"{setting}. {caption}", figure


@mpl.rc_context(_RC)
def against_batch(tidy: pd.DataFrame, values: pd.DataFrame, measure: Measure, looks: dict[str, Style]) -> Figure:
    """The final measure against the batch size: means with t-intervals, single seeds as faint dots.

    A cross at the foot says that runs of that cell diverged.

    Args:
        tidy: the accuracy table's tidy frame, of one setting.
        values: the done runs' outcomes (arm, batch, final), of the same setting.
    """
    figure = Figure(figsize=(SINGLE, 2.6), layout="constrained")
    ax = figure.add_subplot()
    arms, batches = in_order(tidy["arm"]), sorted(int(batch) for batch in tidy["batch"].unique())
    # Arms stand side by side at each batch size, so that their intervals do not hide each other.
    apart = min(0.1, 0.4 / len(arms)) if (tidy["n"] > 1).any() else 0.0
    for position, arm in enumerate(arms):
        look, rows = looks[arm], tidy[tidy["arm"] == arm].sort_values("batch")
        dodge = 2 ** (apart * (position - (len(arms) - 1) / 2))
        ax.plot(_times(rows["batch"], dodge), rows["mean"], color=look.color, marker=look.marker, zorder=3)
        several = rows[rows["n"] > 1]
        if len(several):
            half = several["high"] - several["mean"]
            x = _times(several["batch"], dodge)
            ax.errorbar(x, several["mean"], half, fmt="none", ecolor=look.color, elinewidth=0.9, capsize=2)
            seeds = values[values["arm"] == arm]
            ax.plot(_times(seeds["batch"], dodge), seeds["final"], ".", color=look.color, alpha=0.45, ms=3)
        lost = _times(rows[rows["diverged"] > 0]["batch"], dodge)
        if lost:
            ax.plot(lost, [0.04] * len(lost), "x", color=look.color, transform=ax.get_xaxis_transform())
    ax.set_xscale("log", base=2)
    ax.set_xticks(batches, labels=[str(batch) for batch in batches])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(batches[0] / 1.5, batches[-1] * 1.5)
    _limit(ax, "y", pd.concat([tidy["mean"], tidy["low"], tidy["high"]]), measure)
    ax.set_xlabel(f"images per batch ({_seeds(tidy['n'])})")
    ax.set_ylabel(measure.with_unit)
    _legend(figure, arms, looks)
    return figure


@mpl.rc_context(_RC)
def learning_curves(evaluations: pd.DataFrame, measure: Measure, looks: dict[str, Style]) -> Figure:
    """The measure per epoch, one panel per batch size: mean over seeds, band from lowest to highest seed.

    A diverged run is a dotted line that ends in a cross, part of no mean.

    Args:
        evaluations: of the done and diverged runs of one setting (arm, batch, seed, state, epoch, ...).
    """
    figure, panels = _panels(evaluations)
    for ax, here in panels:
        for arm in in_order(here["arm"]):
            look, of_arm = looks[arm], here[here["arm"] == arm]
            done = of_arm[of_arm["state"] == "done"]
            curve = done.groupby("epoch")[measure.column].agg(["mean", "min", "max"]) * measure.scale
            every = max(1, math.ceil(len(curve) / 6))
            ax.plot(curve.index, curve["mean"], color=look.color, marker=look.marker, markevery=every, ms=3)
            if done["seed"].nunique() > 1:
                ax.fill_between(curve.index, curve["min"], curve["max"], color=look.color, alpha=0.18, lw=0)
            for _, lost in of_arm[of_arm["state"] == "diverged"].groupby("seed"):
                y = lost[measure.column] * measure.scale
                ax.plot(lost["epoch"], y, ":", color=look.color, lw=0.9)
                ax.plot(lost["epoch"].iloc[-1:], y.iloc[-1:], "x", color=look.color)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _limit(panels[0][0], "y", evaluations[measure.column] * measure.scale, measure)
    figure.supxlabel("epoch", fontsize=8)
    figure.supylabel(measure.with_unit, fontsize=8)
    _legend(figure, in_order(evaluations["arm"]), looks)
    return figure


@mpl.rc_context(_RC)
def train_against_test(evaluations: pd.DataFrame, measure: Measure, looks: dict[str, Style]) -> Figure:
    """Test against training values along the training, one panel per batch size.

    A line is the mean over seeds from epoch to epoch; a marker is where one seed ends. The distance
    from the diagonal is the train-test gap.

    Args:
        evaluations: of the done runs of one setting.
    """
    columns = [measure.train_column, measure.column]
    figure, panels = _panels(evaluations, square=True)
    for ax, here in panels:
        ax.axline((1, 1), (2, 2), color="0.6", lw=0.7, ls="--", zorder=1)
        for arm in in_order(here["arm"]):
            look, of_arm = looks[arm], here[here["arm"] == arm]
            path = of_arm.groupby("epoch")[columns].mean() * measure.scale
            ends = of_arm[of_arm["epoch"] == of_arm["epoch"].max()][columns] * measure.scale
            ax.plot(*path.to_numpy().T, color=look.color, lw=0.9, alpha=0.8)
            ax.plot(*ends.to_numpy().T, color=look.color, marker=look.marker, ls="none", zorder=3)
        ax.set_box_aspect(1)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_locator(MaxNLocator(5))
    # The first epochs, far down the diagonal, would leave no room to see the ends apart.
    late = evaluations[evaluations["epoch"] > evaluations["epoch"].max() / 2]
    shown = late[columns].melt()["value"] * measure.scale
    _limit(panels[0][0], "x", shown, measure)
    _limit(panels[0][0], "y", shown, measure)
    figure.supxlabel(measure.with_unit.replace("test", "training"), fontsize=8)
    figure.supylabel(measure.with_unit, fontsize=8)
    _legend(figure, in_order(evaluations["arm"]), looks)
    return figure


def _panels(evaluations: pd.DataFrame, square: bool = False) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """Small multiples with common axes, one per batch size, at most four beside each other."""
    batches = sorted(int(batch) for batch in evaluations["batch"].unique())
    across = min(4, len(batches))
    down = math.ceil(len(batches) / across)
    width = SINGLE if across == 1 else DOUBLE
    height = min(2.6, 0.85 * width / across + 0.35) if square else 1.9
    figure = Figure(figsize=(width, height * down + 0.5), layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for ax in grid[len(batches) :]:
        ax.remove()
    panels = []
    for ax, batch in zip(grid, batches, strict=False):
        here = evaluations[evaluations["batch"] == batch]
        done = here[here["state"] == "done"]
        ax.set_title(f"batch {batch} ({_seeds(done.groupby('arm')['seed'].nunique())})")
        panels.append((ax, here))
    for ax, _ in panels[-across:]:
        ax.tick_params(labelbottom=True)  # also where the panel below is left out
    return figure, panels


def _times(batches: Iterable[int], factor: float) -> list[float]:
    return [int(batch) * factor for batch in batches]


def _seeds(numbers: pd.Series) -> str:
    low, high = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def _limit(ax: Axes, name: Literal["x", "y"], shown: pd.Series, measure: Measure) -> None:
    """Limits of one axis around what is shown; an accuracy's axis ends at 0 and 100 %, and that of a loss that
    falls tenfold is logarithmic."""
    values = shown.dropna()
    if values.empty:
        return
    low, high = float(values.min()), float(values.max())
    if measure.unit != "%" and 0 < 10 * low <= high:
        margin = (high / low) ** 0.06
        ax.set(**{f"{name}scale": "log", f"{name}lim": (low / margin, high * margin)})
        return
    margin = 0.06 * (high - low) or 0.5
    low, high = low - margin, high + margin
    if measure.unit == "%":
        low, high = max(low, -1.0), min(high, 101.0)  # a little beyond, so that markers at the ends are whole
    ax.set(**{f"{name}lim": (low, high)})


def _legend(figure: Figure, arms: Sequence[str], looks: dict[str, Style]) -> None:
    """Above the panels, in as many columns as fit."""
    handles = [Line2D([], [], color=looks[arm].color, marker=looks[arm].marker, label=arm) for arm in arms]
    lengths = [len(arm) for arm in arms]
    for columns in range(len(arms), 0, -1):
        inches = sum(0.42 + 0.06 * max(column) for column in np.array_split(lengths, columns))
        if inches <= figure.get_figwidth():
            break
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, columnspacing=1.2)


@mpl.rc_context(_RC)
def encode(figure: Figure, suffix: str) -> bytes:
    """The figure as a file's content, `png` or `pdf`; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, metadata={"CreationDate": None} if suffix == "pdf" else None)
    return buffer.getvalue()
