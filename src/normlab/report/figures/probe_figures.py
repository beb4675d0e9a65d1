"""Figures of what the probes measured, after those of the papers that measured it.

Each takes the rows of one probe in finished runs, arranged by `panels.arrange`, and gives one figure or several.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from normlab.report.analysis.frames import evenly
from normlab.report.analysis.metrics import step_to_step
from normlab.report.figures.marks import mark
from normlab.report.figures.panels import (
    Drawing,
    Panel,
    Theme,
    by_variant,
    common,
    curve_marks,
    grid,
    n_seeds,
    only_cell,
    ordered,
    paged,
    rows_of,
    split,
    ticks,
    trend,
    wrapped,
)  # fmt: skip
from normlab.report.figures.style import Canvas, Style, handles, legend, limit
from normlab.report.study.columns import as_numbers

_NUMBERS = (
    *("position", "l2", "cosine", "loss_low", "loss_high", "predictiveness_low", "predictiveness_high", "beta"),
    *("eigenvalue", "mean", "variance", "large", "large_normalised", "output_norm", "norm"),
    *("sample_cosine", "stable_rank"),
    *("scale_start", "scale_drift", "shift_drift"),
)  # columns of our probes that a record may lack, or hold something else in
BEFORE = "before a divergence"  # an entry of a legend
Make = Callable[[pd.DataFrame, Theme], Iterator[Drawing]]
Density = tuple[np.ndarray, np.ndarray]  # middles of the bins, and the share of values in each, per unit of the axis


def figures(probes: Mapping[str, pd.DataFrame], theme: Theme) -> Iterator[tuple[str, Iterator[Drawing]]]:
    """Yield each kind of figure that the rows of these probes allow, with its pages."""
    for probe, kind, make in _FIGURES:
        if probe in probes and len(probes[probe]):
            yield kind, make(_whole(probes[probe]), theme)


def _whole(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with the columns that figures take for granted, nan where nothing was measured."""
    odd = [name for name in _NUMBERS if name not in rows or rows[name].dtype == object]
    rows = rows.assign(**{name: as_numbers(rows[name]) if name in rows else math.nan for name in odd})
    return rows if "layer" in rows else rows.assign(layer="")


def _trends(scale: float = 1.0, **quantities: str) -> Make:
    """Return what draws quantities over the training, means over layers.

    Quantities have a column each and conditions a row; of one quantity, conditions stand beside each other.

    Args:
        scale: multiplies the values.
        quantities: column -> label of its axis. Of columns `<name>_low` and `<name>_high` give `<name>`: a band.
    """

    def make(rows: pd.DataFrame, theme: Theme) -> Iterator[Drawing]:
        known = [(name, label) for name, label in quantities.items() if _measured(rows, name)]
        most = min(3, max(theme.canvas.across))
        for beside in (dict(known[i : i + most]) for i in range(0, len(known), most)):
            size = theme.canvas.panels // (1 if len(beside) == 1 else most)
            yield from paged(split(rows), size, partial(_trend_figure, quantities=beside, theme=theme, scale=scale))

    return make


def _measured(rows: pd.DataFrame, name: str) -> bool:
    return any(column in rows and rows[column].notna().any() for column in (name, f"{name}_low"))


def _trend_figure(page: Sequence[Panel], quantities: Mapping[str, str], theme: Theme, scale: float) -> Figure:
    number, every = len(quantities), rows_of(page)
    across = number if number > 1 else theme.canvas.columns(len(page))
    figure, axes = grid(len(page) * number, across, theme.canvas, height=2.0, sharey="col" if number > 1 else "all")
    for i, panel in enumerate(page):
        for ax, (name, label) in zip(axes[i * number :], quantities.items(), strict=False):
            draw = _band if f"{name}_low" in panel.rows else trend
            for arm, rows in by_variant(panel.rows):
                draw(ax, rows, "step", name, theme.styles[arm], scale)
            if number > 1 or i == 0:
                ax.set_ylabel(label)
            ticks(ax, panel.rows["step"])
        axes[i * number].set_title(wrapped(panel.title, figure.get_figwidth() / across - 0.4), loc="left")
    for ax, name in zip(axes, quantities, strict=False):
        ends = [f"{name}_low", f"{name}_high"] if f"{name}_low" in every else [name]
        limit(ax, "y", scale * every.groupby(["run", "step"])[ends].mean().melt()["value"])
    figure.supxlabel("training step")
    legend(figure, handles(every["variant"], theme.styles), theme.canvas)
    return figure


def _band(ax: Axes, rows: pd.DataFrame, x: str, name: str, style: Style, scale: float) -> None:
    """Fill from the mean of the low to the mean of the high ends over the done seeds; ends of diverged runs: dotted."""
    low, high = f"{name}_low", f"{name}_high"
    done = scale * common(rows[rows["state"] == "done"], [x], [low, high]).groupby(x)[[low, high]].mean()
    series = str(rows["variant"].iloc[0])
    mark(ax.fill_between(done.index, done[low], done[high], color=style.color, alpha=0.25, lw=0), series)
    for end in (low, high):
        trend(ax, rows, x, end, style, scale, marker="", lw=0.6)


def _covariate_shifts(rows: pd.DataFrame, theme: Theme) -> Iterator[Drawing]:
    for condition in ordered(rows["condition"]):
        here = rows[rows["condition"] == condition]
        yield _covariate_shift(here, condition, theme), here


def _covariate_shift(rows: pd.DataFrame, condition: str, theme: Theme) -> Figure:
    """Draw cosine and L2 difference of a layer's gradients before and after the layers below it moved.

    Up to four layers are shown, as in Santurkar et al. 2018. The first layer has none below it and is left out.
    """
    above = rows[rows["position"] > rows["position"].min()].sort_values("position")["layer"].unique()
    layers = _few(above, theme.canvas.across[0]) or list(rows["layer"].unique())
    figure, axes = grid(2 * len(layers), len(layers), theme.canvas, height=1.7, sharey="row")
    for i, (name, label) in enumerate({"cosine": "cosine", "l2": "L2 difference"}.items()):
        row = axes[i * len(layers) : (i + 1) * len(layers)]
        for ax, layer in zip(row, layers, strict=True):
            here = rows[rows["layer"] == layer]
            for arm, of_arm in by_variant(here):
                trend(ax, of_arm, "step", name, theme.styles[arm])
            if i == 0:
                ax.set_title(layer)
            ticks(ax, here["step"])
        row[0].set_ylabel(label)
        limit(row[0], "y", rows[rows["layer"].isin(layers)][name])
    figure.supxlabel(f"training step; {condition} ({n_seeds(rows)})")
    legend(figure, handles(rows["variant"], theme.styles), theme.canvas)
    return figure


def _layers(column: str, label: str) -> Make:
    """Return what draws a quantity from the first to the last layer, one panel per condition and arm."""

    def make(rows: pd.DataFrame, theme: Theme) -> Iterator[Drawing]:
        panels = _arm_panels(_single_steps(rows)) if _measured(rows, column) else []
        return paged(panels, theme.canvas.panels, lambda page: _along_the_layers(page, column, label, theme.canvas))

    return make


def _arm_panels(rows: pd.DataFrame) -> list[Panel]:
    panels = []
    for condition in ordered(rows["condition"]):
        line = f"\n{condition}" if rows["condition"].nunique() > 1 else ""
        for arm, of_arm in by_variant(rows[rows["condition"] == condition]):
            panels.append(Panel(f"{arm}{line} ({n_seeds(of_arm)})", of_arm))
    return panels


def _along_the_layers(panels: Sequence[Panel], column: str, label: str, canvas: Canvas) -> Figure:
    """Draw a quantity over the layers at up to five steps of the training, as Gitman & Ginsburg 2017 show outputs.

    Lines are means over seeds, bands from lowest to highest (where n > 1). Diverged runs take part as far as they came;
    their last measured step is dotted.
    """
    every = rows_of(panels)
    done = every[every["state"] == "done"]
    steps = _few(sorted((every if done.empty else done)["step"].unique()), 5)
    colors = dict(zip(steps, mpl.colormaps["viridis"](np.linspace(0, 0.88, len(steps))), strict=True))
    across = canvas.columns(len(panels))
    figure, axes = grid(len(panels), across, canvas)
    for ax, panel in zip(axes, panels, strict=True):
        done = common(panel.rows[panel.rows["state"] == "done"], ["step", "position"], [column])
        for step in steps:
            curve = done[done["step"] == step].groupby("position")[column].agg(["mean", "min", "max"])
            if len(curve):
                series = f"step {step:.0f}"
                [line] = ax.plot(curve.index, curve["mean"], color=colors[step])
                mark(line, series, curve_marks(f"{panel.arms[0]}, {series}, layer", curve, only_cell(panel.rows)))
                if done["seed"].nunique() > 1:
                    ends = ax.fill_between(curve.index, curve["min"], curve["max"], color=colors[step], alpha=0.2, lw=0)
                    mark(ends, series)
        for _, lost in panel.rows[panel.rows["state"] == "diverged"].groupby("seed"):
            last = lost[lost["step"] == lost["step"].max()].sort_values("position")
            [dotted] = ax.plot(last["position"], last[column], ":", color="0.4", lw=0.9)
            mark(dotted, BEFORE)
        ax.set_title(wrapped(panel.title, figure.get_figwidth() / across - 0.2))
        ticks(ax, panel.rows["position"])
    limit(axes[0], "y", every[column])
    more: list[Artist] = [Line2D([], [], color=color, label=f"step {step:.0f}") for step, color in colors.items()]
    if (every["state"] == "diverged").any():
        more.append(Line2D([], [], color="0.4", ls=":", label=BEFORE))
    figure.supxlabel("layer, in the order of execution")
    figure.supylabel(label)
    legend(figure, more, canvas)
    return figure


def _histograms(rows: pd.DataFrame, theme: Theme) -> Iterator[Drawing]:
    panels = _histogram_panels(_single_steps(rows))
    return paged(panels, min(8, theme.canvas.panels), lambda page: _ridges(page, theme))


def _histogram_panels(rows: pd.DataFrame) -> list[Panel]:
    """Return panels of one run each, the lowest done seed of an arm, for up to two layers with histograms."""
    if "histogram" not in rows:
        return []
    kept = rows[rows["histogram"].map(lambda value: isinstance(value, list)) & (rows["state"] == "done")]
    layers = _few(kept.sort_values("position")["layer"].unique(), 2)
    panels = []
    for condition in ordered(kept["condition"]):
        line = f", {condition}" if kept["condition"].nunique() > 1 else ""
        for layer in layers:
            for arm, of_arm in by_variant(kept[(kept["condition"] == condition) & (kept["layer"] == layer)]):
                seed = of_arm["seed"].min()
                panels.append(Panel(f"{arm}{line}\n{layer} (seed {seed})", of_arm[of_arm["seed"] == seed]))
    return panels


def _ridges(panels: Sequence[Panel], theme: Theme) -> Figure:
    """Draw how a sampled activation's distribution moves, from the first (top) to the last step measured.

    As in Santurkar et al. 2018: densities of one seed, the same values from left to right in every panel.

    Args:
        panels: one per arm and layer; rows (with step, histogram, edges) are of one run each.
        theme: the styles and the canvas.
    """
    steps = _few(sorted(rows_of(panels)["step"].unique()), 7)
    densities = [[_density(panel.rows, step) for step in steps] for panel in panels]
    across = theme.canvas.columns(len(panels))
    figure, axes = grid(len(panels), across, theme.canvas, height=2.2)
    for ax, panel, ridges in zip(axes, panels, densities, strict=True):
        color = theme.styles[panel.arms[0]].color
        highest = max((density.max() for _, density in filter(None, ridges)), default=1.0) or 1.0
        for i, ridge in enumerate(ridges):
            if ridge:
                # Earlier steps stand above later ones, which overlap them.
                base = np.full(len(ridge[1]), float(len(steps) - 1 - i))
                top = base + 1.6 * ridge[1] / highest
                ax.fill_between(ridge[0], base, top, step="mid", facecolor=color, alpha=0.35, lw=0, zorder=2 + i)
                ax.step(ridge[0], top, where="mid", color=color, lw=0.7, zorder=2 + i)
        ax.set_title(wrapped(panel.title, figure.get_figwidth() / across - 0.2))
        ax.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(steps)), labels=[f"{step:.0f}" for step in reversed(steps)])
    axes[0].set_ylim(-0.2, len(steps) + 0.8)
    axes[0].set_xlim(*_support([ridge for ridges in densities for ridge in ridges if ridge]))
    figure.supxlabel("value of the sampled activation")
    figure.supylabel("training step")
    return figure


def _density(rows: pd.DataFrame, step: float) -> Density | None:
    for row in rows[rows["step"] == step].itertuples():
        if isinstance(row.histogram, list) and isinstance(row.edges, list) and sum(row.histogram):
            counts, edges = np.asarray(row.histogram, dtype=float), np.asarray(row.edges, dtype=float)
            return (edges[1:] + edges[:-1]) / 2, counts / counts.sum() / np.diff(edges)
    return None


def _support(densities: Sequence[Density]) -> tuple[float, float]:
    """Return the range of the values whose density is a hundredth of the highest or more."""
    values = np.concatenate([middles[density > 0.01 * density.max()] for middles, density in densities])
    margin = 0.05 * float(np.ptp(values)) or 0.5
    return float(values.min()) - margin, float(values.max()) + margin


def _few(values: Sequence[object] | np.ndarray, number: int) -> list[Any]:
    """Return at most so many of them, evenly from the first to the last."""
    return [values[i] for i in evenly(len(values), number)]


def _single_steps(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows without the second steps of pairs, which are there for the change from step to step."""
    first = rows[~(rows["step"] - 1).isin(rows["step"])]
    return first if first["step"].nunique() > 1 else rows


def _of(prepare: Callable[[pd.DataFrame], pd.DataFrame], make: Make) -> Make:
    return lambda rows, theme: make(prepare(rows), theme)


def _relative_drift(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(relative=rows["scale_drift"] / rows["scale_start"].where(rows["scale_start"] > 0))


_FIGURES: tuple[tuple[str, str, Make], ...] = (
    ("ics", "covariate_shift", _covariate_shifts),
    (
        "landscape",
        "landscape",
        _trends(loss="loss", predictiveness="change of the gradient (L2)", beta="effective beta-smoothness"),
    ),
    ("sharpness", "sharpness", _trends(eigenvalue="largest Hessian eigenvalue")),
    ("activations", "activation_histograms", _histograms),
    (
        "activations",
        "activation_changes",
        _of(step_to_step, _trends(mean_change="change of the mean", variance_change="change of the variance")),
    ),
    (
        "activations",
        "large_values",
        _of(_single_steps, _trends(100.0, large="outputs beyond 3 (%)", large_normalised="inputs beyond 3 std (%)")),
    ),
    (
        "activations",
        "condensation",
        _of(_single_steps, _trends(sample_cosine="cosine of samples", stable_rank="stable rank")),
    ),
    ("activations", "sample_cosines", _layers("sample_cosine", "cosine of samples")),
    ("activations", "output_norms", _layers("output_norm", "output of the convolution (rms)")),
    (
        "affine",
        "affine_drift",
        _of(_relative_drift, _trends(relative="drift of gamma / its start", shift_drift="drift of beta")),
    ),
    ("gradients", "gradient_norms", _layers("norm", "gradient norm")),
)
