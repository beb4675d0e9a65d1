"""The panels of a figure: a study's conditions, and its arms where they are too many for one panel."""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from normlab.report.analysis.frames import CELL
from normlab.report.figures.marks import Cell, Mark, mark
from normlab.report.figures.style import CROWD, Canvas, Style, add_entries, broken, handles, legend
from normlab.report.study.arms import FAMILIES, in_order, natural, without_norm_batch
from normlab.report.study.load import Study

SINGLE_SEED = "single seed"  # marks the lines of single seeds where not every seed has a value
Drawing = tuple[Figure, pd.DataFrame]  # with the rows that it shows: setting, arm, batch and, of single runs, run


class Panel(NamedTuple):
    """The title and the rows of one panel; `crowded`: one family of too many arms."""

    title: str
    rows: pd.DataFrame
    crowded: bool = False

    @property
    def arms(self) -> list[str]:
        """Its variants in the order of tables."""
        return in_order(self.rows["variant"])


class Theme(NamedTuple):
    """The style of each arm, and the canvas."""

    styles: Mapping[str, Style]
    canvas: Canvas


def arrange(study: Study, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows (with setting, arm, batch) and their place in figures, which show conditions side by side.

    variant: the arm without its norm_batch; norm_batch: nan for the whole batch;
    short: the words of the setting that the study's others lack, `resnet18, optimizer.lr=0.5`; "" if nothing;
    where: short and norm_batch, where the study varies it; condition: where and batch, likewise.
    """
    runs = study.placed
    words = {setting: setting.split(", ") for setting in runs["setting"].unique()}
    common = common_setting(study).split(", ")
    several_groups = runs["arm"].str.contains("norm_batch=").any()
    several_batches = runs["batch"].nunique() > 1
    groups_of_cells = rows.groupby(CELL, sort=False)  # a cell has many rows, which all go to one place
    cells = groups_of_cells.head(1)
    groups = cells["arm"].str.extract(r"norm_batch=(\d+)", expand=False)
    short = [
        ", ".join(word.replace(".name=", "=") for word in words[setting] if word not in common)
        for setting in cells["setting"]
    ]
    sizes = [f"norm_batch={group}" if several_groups and isinstance(group, str) else "" for group in groups]
    whole = "whole batch" if several_groups else ""
    where = [", ".join(filter(None, pair)) or whole for pair in zip(short, sizes, strict=True)]
    places = pd.DataFrame(
        {
            "variant": [without_norm_batch(arm) for arm in cells["arm"]],
            "norm_batch": groups.astype(float).to_numpy(),
            "short": short,
            "where": where,
            "condition": [
                ", ".join(filter(None, (place, f"batch {batch}" if several_batches or not place else "")))
                for place, batch in zip(where, cells["batch"], strict=True)
            ],
        }
    )
    return rows.assign(**places.iloc[groups_of_cells.ngroup()].set_axis(rows.index))


def common_setting(study: Study) -> str:
    """Return the words that all settings of the study have in common: `cifar10, resnet18`."""
    words = [str(setting).split(", ") for setting in study.runs["setting"].dropna().unique()]
    return ", ".join(word for word in words[0] if all(word in others for others in words)) if words else ""


def ordered(values: pd.Series) -> list[Any]:
    """Return the different values in natural order."""
    return sorted(values.dropna().unique(), key=lambda value: natural(str(value)))


def split(rows: pd.DataFrame, by: str = "condition") -> list[Panel]:
    """Return one panel per condition, or one per family of arms where they are too many for one panel.

    Args:
        rows: of finished runs (with seed and state), or of a tidy frame (with n).
    """
    panels = []
    for value in ordered(rows[by]):
        of_value = rows[rows[by] == value]
        for family, arms in _crowds(of_value["variant"]):
            here = of_value[of_value["variant"].isin(arms)]
            title = f"{value} ({n_seeds(here)})".strip()
            panels.append(Panel(f"{family}\n{title}" if family else title, here, bool(family)))
    return panels


def by_variant(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the arms in the order of tables, each with its rows."""
    for arm in in_order(rows["variant"]):
        yield arm, rows[rows["variant"] == arm]


def _crowds(variants: pd.Series) -> list[tuple[str, list[str]]]:
    """Return the arms that can share a panel, with a title: all, or those of a family where they are too many."""
    arms = in_order(variants)
    if len(arms) <= CROWD:
        return [("", arms)]
    families = {arm: name for name, members in FAMILIES.items() for arm in members}
    crowds = []
    for name, members in itertools.groupby(arms, key=lambda arm: families.get(arm.split(" (")[0], "others")):
        family = list(members)
        crowds += [(name, family[i : i + CROWD]) for i in range(0, len(family), CROWD)]
    return crowds


def n_seeds(rows: pd.DataFrame) -> str:
    """Return `n = 3` or `n = 2 to 3`, the numbers of done seeds per arm.

    Args:
        rows: of finished runs (with seed and state), or of a tidy frame (with n).
    """
    n = rows["n"] if "n" in rows else rows[rows["state"] == "done"].groupby("variant")["seed"].nunique()
    numbers = [int(number) for number in n if number > 0] or [0]
    low, high = min(numbers), max(numbers)
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def paged(panels: Sequence[Panel], size: int, draw: Callable[[Sequence[Panel]], Figure]) -> Iterator[Drawing]:
    """Yield figures of at most so many panels, of about equally many, each with the rows that it shows."""
    number = math.ceil(len(panels) / size)
    for i in range(number):
        page = panels[i * len(panels) // number : (i + 1) * len(panels) // number]
        yield draw(page), rows_of(page)


def rows_of(panels: Sequence[Panel]) -> pd.DataFrame:
    """Return the rows that these panels show."""
    return pd.concat([panel.rows for panel in panels])


def multiples(
    panels: Sequence[Panel], theme: Theme, more: Sequence[Artist] = (), across: int | None = None, **options: Any
) -> tuple[Figure, list[tuple[Axes, Panel]]]:
    """Return a figure of these panels with its legend: one for all, or one beside each panel where some are crowded."""
    crowded, canvas = any(panel.crowded for panel in panels), theme.canvas
    across = min(len(panels), int(canvas.width / 3)) if crowded else across or canvas.columns(len(panels))
    figure, axes = grid(len(panels), across, canvas, **options)
    titles = [wrapped(panel.title, figure.get_figwidth() / across - (1.2 if crowded else 0.2)) for panel in panels]
    labels = [[broken(arm, 20, 2) for arm in panel.arms] if crowded else [] for panel in panels]
    high = 0.18 * max(sum(label.count("\n") + 1 for label in of_panel) for of_panel in labels)
    taller = 0.13 * max(title.count("\n") for title in titles) + max(0.0, high - options.get("height", 1.9))
    figure.set_figheight(figure.get_figheight() + taller * math.ceil(len(panels) / across))
    for ax, panel, title, of_panel in zip(axes, panels, titles, labels, strict=True):
        ax.set_title(title)
        if crowded:
            entries = handles(panel.arms, theme.styles)
            add_entries(ax, entries, of_panel, loc="center left", bbox_to_anchor=(1, 0.5))
    own = [] if crowded else handles(rows_of(panels)["variant"], theme.styles)
    if own or more:
        legend(figure, [*own, *more], canvas)
    return figure, list(zip(axes, panels, strict=True))


def wrapped(title: str, inches: float) -> str:
    """Return the title broken after commas and before brackets, else anywhere, where a line would be longer."""
    lines = []
    for paragraph in title.splitlines():
        lines.append("")
        for piece in re.split(r"(?<=,) | (?=\()", paragraph):
            joined = f"{lines[-1]} {piece}".strip()
            if lines[-1] and len(joined) > 16 * inches:
                lines.append(piece)
            else:
                lines[-1] = joined
    return "\n".join(broken(line, max(12, int(18 * inches))) for line in lines)


def grid(
    number: int, across: int, canvas: Canvas, height: float = 1.9, width: float | None = None, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure of small multiples, `across` beside each other, each `height` inches high."""
    down = math.ceil(number / across)
    width = width or (canvas.narrow if across == 1 else canvas.width)
    figure = Figure(figsize=(width, height * down + 0.5), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, **{"sharex": True, "sharey": True, **shared}).ravel()
    for ax in axes[number:]:
        ax.remove()
    for ax in axes[max(number - across, 0) : number]:
        ax.tick_params(labelbottom=True)  # also where the panel below is left out
    return figure, list(axes[:number])


def ticks(ax: Axes, values: pd.Series, number: int = 4) -> None:
    """Tick an axis of steps, epochs or layers at whole numbers, and one of a single value there."""
    if values.nunique() == 1:
        ax.set_xticks([values.iloc[0]])
    else:
        ax.xaxis.set_major_locator(MaxNLocator(number, integer=True))


def common(rows: pd.DataFrame, places: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """Return the rows at the places that every seed has: elsewhere a mean would be of other seeds than beside it.

    Where a value of one seed is nan, those of the others are so, too: a gap. Seeds without any value do not count.

    Args:
        rows: of one arm, with the column seed.
        places: columns of steps, epochs or layers.
        values: columns of numbers.
    """
    valued = rows[rows.groupby("seed")[[*values]].transform("count").gt(0).all(axis=1)]
    at = valued[valued.groupby([*places])["seed"].transform("nunique") == valued["seed"].nunique()]
    whole = at[[*values]].notna().all(axis=1).groupby([at[place] for place in places]).transform("all")
    return at.assign(**{value: at[value].where(whole) for value in values})


def trend(ax: Axes, rows: pd.DataFrame, x: str, y: str, style: Style, scale: float = 1.0, **line: Any) -> None:
    """Draw one arm along the training: the mean over the done seeds and a band from the lowest to the highest.

    There is no band of one seed. Where not every seed has a value, each that has one is a thin line, for the mean
    would be of other seeds than beside it. Every diverged run is a dotted line that ends in a cross, part of no mean. A
    run's value is its mean over layers.

    Args:
        rows: of one arm: seed, state, `x`, `y`.
        line: for the line of the mean; with `marker=""` the seeds' band is left out too.
    """
    if rows.empty:
        return
    series, of_cell = str(rows["variant"].iloc[0]), only_cell(rows)
    values = rows.groupby(["seed", "state", x], as_index=False)[y].mean()
    values[y] *= scale
    done = values[values["state"] == "done"]
    in_common = common(done, [x], [y])
    curve = in_common.groupby(x)[y].agg(["mean", "min", "max"])
    if in_common[y].count() < done[y].count():
        for _, seed in done.dropna(subset=[y]).groupby("seed"):
            [single] = ax.plot(seed[x], seed[y], color=style.color, lw=0.5, alpha=0.7, gid=SINGLE_SEED)
            mark(single, series)
    every = max(1, math.ceil(len(curve) / 6))
    form = {"color": style.color, "marker": style.marker, "markevery": every, "ms": 3, **line}
    if len(curve):
        [mean] = ax.plot(curve.index, curve["mean"], **form)
        mark(mean, series, curve_marks(f"{series}, {x}", curve, of_cell) if form["marker"] else ())
    if done["seed"].nunique() > 1 and form["marker"]:
        mark(ax.fill_between(curve.index, curve["min"], curve["max"], color=style.color, alpha=0.18, lw=0), series)
    for number, lost in values[values["state"] == "diverged"].groupby("seed"):
        [dotted] = ax.plot(lost[x], lost[y], ":", color=style.color, lw=0.9)
        mark(dotted, series)
        last = lost.dropna(subset=[y])[-1:]
        if form["marker"] and len(last):
            [end] = ax.plot(last[x], last[y], "x", color=style.color)
            text = f"{series}, seed {number}\ndiverged; last at {x} {last[x].iloc[0]:g}: {last[y].iloc[0]:.4g}"
            mark(end, series, [Mark(text, of_cell)])


def curve_marks(name: str, curve: pd.DataFrame, cell: Cell | None) -> list[Mark | None]:
    """Return a mark for about six points of a curve (mean, min, max by its index), the last one among them."""
    every = max(1, math.ceil(len(curve) / 6))
    found: list[Mark | None] = [None] * len(curve)
    for i in {*range(0, len(curve), every), len(curve) - 1}:
        row = curve.iloc[i]
        ends = f" ({row['min']:.4g} to {row['max']:.4g} over seeds)" if row["min"] < row["max"] else ""
        found[i] = Mark(f"{name} {curve.index[i]:g}\n{row['mean']:.4g}{ends}", cell)
    return found


def only_cell(rows: pd.DataFrame) -> Cell | None:
    """Return the cell that rows are of; None where they are of several."""
    cells = rows[CELL].drop_duplicates()
    if len(cells) != 1:
        return None
    setting, arm, batch = cells.iloc[0]
    return str(setting), str(arm), int(batch)
