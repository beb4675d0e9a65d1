"""Figures of what the probes measured, after those of the papers that measured it.

Each takes the rows of one probe in finished runs, arranged by `panels.arrange`, and gives one figure or several.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from normlab.report.analysis.metrics import step_to_step
from normlab.report.figures.panels import Drawn, Panel, grid, ordered, pages, rows_of, split, ticks, trend, wrapped
from normlab.report.figures.style import Canvas, Style, handles, legend, limit, seeds
from normlab.report.study.arms import in_order

Looks = Mapping[str, Style]
Make = Callable[[pd.DataFrame, Looks, Canvas], Iterator[Drawn]]


def trends(
    rows: pd.DataFrame, quantities: Mapping[str, str], looks: Looks, canvas: Canvas, scale: float = 1.0
) -> Iterator[Drawn]:
    """Quantities over the training, means over layers: one column each, one row per condition; conditions stand beside
    each other where there is one quantity.

    Args:
        quantities: column -> label of its axis. Of columns `<name>_low` and `<name>_high` give `<name>`: a band.
    """
    known = [(name, label) for name, label in quantities.items() if _known(rows, name)]
    most = min(3, max(canvas.across))
    for beside in (dict(known[i : i + most]) for i in range(0, len(known), most)):
        for page in pages(split(rows), canvas.panels if len(beside) == 1 else canvas.panels // most):
            yield _trends(page, beside, looks, canvas, scale), rows_of(page)


def _known(rows: pd.DataFrame, name: str) -> bool:
    return any(column in rows and rows[column].notna().any() for column in (name, f"{name}_low"))


def _trends(page: Sequence[Panel], quantities: Mapping[str, str], looks: Looks, canvas: Canvas, scale: float) -> Figure:
    number = len(quantities)
    across = number if number > 1 else canvas.columns(len(page))
    figure, axes = grid(len(page) * number, across, canvas, height=2.0, sharey="col" if number > 1 else "all")
    for i, panel in enumerate(page):
        for ax, (name, label) in zip(axes[i * number :], quantities.items(), strict=False):
            banded = f"{name}_low" in panel.rows
            for arm in in_order(panel.rows["variant"]):
                draw = _band if banded else trend
                draw(ax, panel.rows[panel.rows["variant"] == arm], "step", name, looks[arm], scale)
            if number > 1 or i == 0:
                ax.set_ylabel(label)
            ticks(ax, panel.rows["step"])
        axes[i * number].set_title(wrapped(panel.title, figure.get_figwidth() / across - 0.4), loc="left")
    every = rows_of(page)
    for ax, name in zip(axes, quantities, strict=False):
        ends = [f"{name}_low", f"{name}_high"] if f"{name}_low" in every else [name]
        by_run = every.groupby(["run", "step"])[ends].mean()
        limit(ax, "y", scale * by_run.melt()["value"])
    figure.supxlabel("training step")
    legend(figure, handles(every["variant"], looks), canvas)
    return figure


def _band(ax: Axes, rows: pd.DataFrame, x: str, name: str, look: Style, scale: float) -> None:
    """From the mean of the low to the mean of the high ends over the done seeds; a diverged run's ends are dotted."""
    low, high = f"{name}_low", f"{name}_high"
    done = scale * rows[rows["state"] == "done"].groupby(x)[[low, high]].mean()
    ax.fill_between(done.index, done[low], done[high], color=look.color, alpha=0.25, lw=0)
    for end in (low, high):
        trend(ax, rows, x, end, look, scale, marker="", lw=0.6)


def covariate_shift(rows: pd.DataFrame, looks: Looks, canvas: Canvas) -> Figure:
    """Cosine and L2 difference of a layer's gradients before and after the layers below it moved, for up to four
    layers, as in Santurkar et al. 2018. The first layer has none below it and is left out.

    Args:
        rows: of the probe `ics`, of one condition.
    """
    layers = _few(
        rows[rows["position"] > rows["position"].min()].sort_values("position")["layer"].unique(), canvas.across[0]
    )
    layers = layers or list(rows["layer"].unique())
    quantities = {"cosine": "cosine", "l2": "L2 difference"}
    figure, axes = grid(2 * len(layers), len(layers), canvas, height=1.7, sharey="row")
    for i, (name, label) in enumerate(quantities.items()):
        shown = rows[rows["layer"].isin(layers)]
        for ax, layer in zip(axes[i * len(layers) :], layers, strict=False):
            here = shown[shown["layer"] == layer]
            for arm in in_order(here["variant"]):
                trend(ax, here[here["variant"] == arm], "step", name, looks[arm])
            if i == 0:
                ax.set_title(layer)
            ticks(ax, here["step"])
        axes[i * len(layers)].set_ylabel(label)
        limit(axes[i * len(layers)], "y", shown[name])
    figure.supxlabel(f"training step; {rows['condition'].iloc[0]} ({_seeds(rows)})")
    legend(figure, handles(rows["variant"], looks), canvas)
    return figure


def along_the_layers(found: Sequence[Panel], column: str, label: str, canvas: Canvas) -> Figure:
    """A quantity from the first to the last layer at up to five moments of the training, one panel per arm, as Gitman &
    Ginsburg 2017 show the outputs of layers: mean over seeds, band from lowest to highest (where n > 1).

    Diverged runs take part as far as they came; their last measured moment is dotted.

    Args:
        found: one panel per condition and arm.
    """
    every = rows_of(found)
    done = every[every["state"] == "done"]
    steps = _few(sorted((every if done.empty else done)["step"].unique()), 5)
    colors = dict(zip(steps, mpl.colormaps["viridis"](np.linspace(0, 0.88, len(steps))), strict=True))
    across = canvas.columns(len(found))
    figure, axes = grid(len(found), across, canvas)
    for ax, panel in zip(axes, found, strict=True):
        done = panel.rows[panel.rows["state"] == "done"]
        for step in steps:
            curve = done[done["step"] == step].groupby("position")[column].agg(["mean", "min", "max"])
            if len(curve):
                ax.plot(curve.index, curve["mean"], color=colors[step])
                if done["seed"].nunique() > 1:
                    ax.fill_between(curve.index, curve["min"], curve["max"], color=colors[step], alpha=0.2, lw=0)
        for _, lost in panel.rows[panel.rows["state"] == "diverged"].groupby("seed"):
            last = lost[lost["step"] == lost["step"].max()].sort_values("position")
            ax.plot(last["position"], last[column], ":", color="0.4", lw=0.9)
        ax.set_title(wrapped(panel.title, figure.get_figwidth() / across - 0.2))
        ticks(ax, panel.rows["position"])
    limit(axes[0], "y", every[column])
    more: list[Artist] = [Line2D([], [], color=color, label=f"step {step:g}") for step, color in colors.items()]
    if (every["state"] == "diverged").any():
        more.append(Line2D([], [], color="0.4", ls=":", label="before a divergence"))
    figure.supxlabel("layer, in the order of execution")
    figure.supylabel(label)
    legend(figure, more, canvas)
    return figure


def by_arm(rows: pd.DataFrame) -> list[Panel]:
    """One panel per condition and arm."""
    found = []
    for condition in ordered(rows["condition"]):
        here = rows[rows["condition"] == condition]
        told = f"\n{condition}" if rows["condition"].nunique() > 1 else ""
        for arm in in_order(here["variant"]):
            of_arm = here[here["variant"] == arm]
            found.append(Panel(f"{arm}{told} ({_seeds(of_arm)})", of_arm))
    return found


def histograms(found: Sequence[Panel], looks: Looks, canvas: Canvas) -> Figure:
    """How a sampled activation's distribution moves, from the first (top) to the last measured moment, as in Santurkar
    et al. 2018: densities of one seed, the same values from left to right in every panel.

    Args:
        found: one panel per arm and layer; rows (with step, histogram, edges) are of one run each.
    """
    steps = _few(sorted({step for panel in found for step in panel.rows["step"]}), 7)
    densities = [[_density(panel.rows, step) for step in steps] for panel in found]
    across = canvas.columns(len(found))
    figure, axes = grid(len(found), across, canvas, height=2.2)
    for ax, panel, ridges in zip(axes, found, densities, strict=True):
        color = looks[panel.rows["variant"].iloc[0]].color
        highest = max((density.max() for _, density in filter(None, ridges)), default=1.0) or 1.0
        for i, ridge in enumerate(ridges):
            if ridge is None:
                continue
            edges, density = ridge
            # Earlier moments stand above later ones, which overlap them.
            top = len(steps) - 1 - i + 1.6 * density / highest
            base = np.full(len(top), float(len(steps) - 1 - i))
            ax.fill_between(edges, base, top, step="mid", facecolor=color, alpha=0.35, lw=0, zorder=2 + i)
            ax.step(edges, top, where="mid", color=color, lw=0.7, zorder=2 + i)
        ax.set_title(wrapped(panel.title, figure.get_figwidth() / across - 0.2))
        ax.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(steps)), labels=[f"{step:g}" for step in reversed(steps)])
    axes[0].set_ylim(-0.2, len(steps) + 0.8)
    low, high = _support(densities)
    axes[0].set_xlim(low, high)
    figure.supxlabel("value of the sampled activation")
    figure.supylabel("training step")
    return figure


def _density(rows: pd.DataFrame, step: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Middles of the bins and the share of values in each, per unit of the axis."""
    for row in rows[rows["step"] == step].itertuples():
        if isinstance(row.histogram, list) and isinstance(row.edges, list) and sum(row.histogram):
            counts, edges = np.asarray(row.histogram, dtype=float), np.asarray(row.edges, dtype=float)
            return (edges[1:] + edges[:-1]) / 2, counts / counts.sum() / np.diff(edges)
    return None


def _support(densities: Sequence[Sequence[tuple[np.ndarray, np.ndarray] | None]]) -> tuple[float, float]:
    """Where there are values worth a look."""
    shown = [
        middles[density > 0.01 * density.max()] for ridges in densities for middles, density in filter(None, ridges)
    ]
    values = np.concatenate(shown)
    margin = 0.05 * float(np.ptp(values)) or 0.5
    return float(values.min()) - margin, float(values.max()) + margin


def sampled(rows: pd.DataFrame) -> list[Panel]:
    """Where a histogram was kept: panels of one run each, the lowest done seed of an arm, for up to two layers."""
    if "histogram" not in rows:
        return []
    kept = rows[rows["histogram"].map(lambda value: isinstance(value, list)) & (rows["state"] == "done")]
    layers = _few(kept.sort_values("position")["layer"].unique(), 2)
    found = []
    for condition in ordered(kept["condition"]):
        told = f", {condition}" if kept["condition"].nunique() > 1 else ""
        for layer in layers:
            here = kept[(kept["condition"] == condition) & (kept["layer"] == layer)]
            for arm in in_order(here["variant"]):
                of_arm = here[here["variant"] == arm]
                seed = of_arm["seed"].min()
                found.append(Panel(f"{arm}{told}\n{layer} (seed {seed})", of_arm[of_arm["seed"] == seed]))
    return found


def _few(values: Sequence[object] | np.ndarray, number: int) -> list:
    """At most so many of them, evenly from the first to the last."""
    chosen = np.unique(np.linspace(0, len(values) - 1, min(number, len(values))).round().astype(int))
    return [values[i] for i in chosen]


def _seeds(rows: pd.DataFrame) -> str:
    done = rows[rows["state"] == "done"].groupby("variant")["seed"].nunique()
    return seeds(done)


def figures(probes: Mapping[str, pd.DataFrame], looks: Looks, canvas: Canvas) -> Iterator[tuple[str, str, Drawn]]:
    """Every figure that the rows of these probes allow: its name, its caption, and itself."""
    for probe, name, caption, make in _FIGURES:
        if probe in probes and len(probes[probe]):
            drawn = list(make(probes[probe], looks, canvas))
            for i, pair in enumerate(drawn):
                yield f"{name}_{i + 1}" if i else name, caption, pair


_OVER_SEEDS = "mean over the done seeds; band: lowest to highest seed (where n > 1); dotted: diverged runs."


def _covariate_shifts(rows: pd.DataFrame, looks: Looks, canvas: Canvas) -> Iterator[Drawn]:
    for condition in ordered(rows["condition"]):
        here = rows[rows["condition"] == condition]
        yield covariate_shift(here, looks, canvas), here


def _layers(column: str, label: str) -> Make:
    def make(rows: pd.DataFrame, looks: Looks, canvas: Canvas) -> Iterator[Drawn]:
        for page in pages(by_arm(_moments(rows)), canvas.panels) if _known(rows, column) else ():
            yield along_the_layers(page, column, label, canvas), rows_of(page)

    return make


def _histograms(rows: pd.DataFrame, looks: Looks, canvas: Canvas) -> Iterator[Drawn]:
    for page in pages(sampled(_moments(rows)), min(8, canvas.panels)):
        yield histograms(page, looks, canvas), rows_of(page)


def _moments(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the second steps of pairs, which are there for the change from step to step."""
    first = rows[~(rows["step"] - 1).isin(rows["step"])]
    return first if first["step"].nunique() > 1 else rows


def _trend(**quantities: str) -> Make:
    return lambda rows, looks, canvas: trends(rows, quantities, looks, canvas)


def _percent(**quantities: str) -> Make:
    return lambda rows, looks, canvas: trends(_moments(rows), quantities, looks, canvas, 100.0)


_FIGURES: list[tuple[str, str, str, Make]] = [
    (
        "ics",
        "covariate_shift",
        "Internal covariate shift: cosine and L2 difference of a layer's gradients before and after the layers below it"
        f" took their step; {_OVER_SEEDS}",
        _covariate_shifts,
    ),
    (
        "landscape",
        "landscape",
        "Along the gradient: the range of the loss, the range of the gradient's change, and effective beta-smoothness;"
        f" bands of the first two: means of both ends over the done seeds; beta: {_OVER_SEEDS}",
        _trend(loss="loss", predictiveness="change of the gradient (L2)", beta="effective beta-smoothness"),
    ),
    (
        "sharpness",
        "sharpness",
        f"Largest eigenvalue of the loss's Hessian on the step's batch: {_OVER_SEEDS}",
        _trend(eigenvalue="largest Hessian eigenvalue"),
    ),
    (
        "activations",
        "activation_histograms",
        "Distribution of one sampled channel of a norm's output over the training (one seed): a ridge per measured"
        " step, time running downwards.",
        _histograms,
    ),
    (
        "activations",
        "activation_changes",
        "Change of the activations' mean and variance from one step to the next, absolute, mean over layers:"
        f" {_OVER_SEEDS}",
        lambda rows, looks, canvas: _trend(mean_change="change of the mean", variance_change="change of the variance")(
            step_to_step(rows), looks, canvas
        ),
    ),
    (
        "activations",
        "large_values",
        "Shares of overly large values, mean over layers: outputs of the norms beyond 3 in absolute value, and inputs"
        f" beyond 3 standard deviations of their channel (0.27 % if normal): {_OVER_SEEDS}",
        _percent(large="outputs beyond 3 (%)", large_normalised="inputs beyond 3 std (%)"),
    ),
    (
        "activations",
        "output_norms",
        "Root mean square of each site's convolution output against the site's place, at moments of the training: mean"
        " over the done seeds; band: lowest to highest seed (where n > 1).",
        _layers("output_norm", "output of the convolution (rms)"),
    ),
    (
        "affine",
        "affine_drift",
        "Drift of gamma, in units of its start, and of beta: root mean square over channels, mean over layers;"
        f" {_OVER_SEEDS}",
        lambda rows, looks, canvas: _trend(relative="drift of gamma / its start", shift_drift="drift of beta")(
            rows.assign(relative=rows["scale_drift"] / rows["scale_start"].where(rows["scale_start"] > 0)),
            looks,
            canvas,
        ),
    ),
    (
        "gradients",
        "gradient_norms",
        "Gradient norm of each layer's weights against the layer's place, at moments of the training: mean over the"
        " done seeds; band: lowest to highest seed (where n > 1).",
        _layers("norm", "gradient norm"),
    ),
]
