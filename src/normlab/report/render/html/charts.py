"""A matplotlib figure as charts for Plotly, one per panel, so that a page can show its values and hide its arms.

What a figure shows is said once, by the functions that draw it; here its lines, bands and bars are only copied.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgba
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

DIGITS = 5  # of a number on the page
_DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
_SYMBOLS = {
    "o": "circle",
    ".": "circle",
    "s": "square",
    "^": "triangle-up",
    "v": "triangle-down",
    "<": "triangle-left",
    "D": "diamond",
    "P": "cross",
    "X": "x",
    "x": "x-thin-open",
    "*": "star",
}
_SHAPES = {"steps-mid": "hvh", "steps-pre": "vh", "steps-post": "hv"}

Chart = dict[str, Any]


def charts(figure: Figure) -> tuple[list[Chart], list[dict[str, str]]]:
    """The panels of a figure as Plotly's traces and layout; and its legend: name, color, dash and symbol of each entry.

    A trace has `legendgroup`, the name of its entry, where there is one.
    """
    # Nothing is drawn, but positions in axes' coordinates become data's only once limits are settled.
    for ax in figure.axes:
        ax.get_xlim(), ax.get_ylim()
    legends = [*figure.legends, *filter(None, (ax.get_legend() for ax in figure.axes))]
    entries = [entry for legend in legends for entry in _entries(legend)]
    unique = list({entry["name"]: entry for entry in entries}.values())
    return [_chart(figure, ax, unique) for ax in figure.axes], unique


def _entries(legend: Legend) -> Iterator[dict[str, str]]:
    for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
        if isinstance(handle, Line2D):
            yield {
                "name": text.get_text(),
                "color": to_hex(handle.get_color()),
                "dash": _DASHES.get(str(handle.get_linestyle()), "none"),
                "symbol": _SYMBOLS.get(str(handle.get_marker()), ""),
            }


def _chart(figure: Figure, ax: Axes, entries: Sequence[Mapping[str, str]]) -> Chart:
    own = ax.get_legend()
    scope = list(_entries(own)) if own else entries
    bars = [_bar(container) for container in ax.containers if isinstance(container, ErrorbarContainer)]
    parts = {id(part) for container in ax.containers for part in _parts(container)}
    bands = [_band(band, scope) for band in ax.collections if isinstance(band, PolyCollection)]
    spans = [_span(ax, patch, scope) for patch in ax.patches]
    lines = [_line(ax, line, scope, bars) for line in ax.lines if id(line) not in parts and np.size(line.get_xdata())]
    x_label = ax.get_xlabel() or figure.get_supxlabel()
    y_label = ax.get_ylabel() or figure.get_supylabel()
    return {
        "title": re.sub(r"\n(?!\()", ", ", ax.get_title() or ax.get_title(loc="left")).replace("\n", " "),
        "traces": [*spans, *bands, *lines],
        "x": _axis(ax, "x", x_label),
        "y": _axis(ax, "y", y_label),
    }


def _axis(ax: Axes, name: str, label: str) -> dict[str, Any]:
    axis = ax.xaxis if name == "x" else ax.yaxis
    low, high = ax.get_xlim() if name == "x" else ax.get_ylim()
    logarithmic = axis.get_scale() == "log"
    found: dict[str, Any] = {"title": label, "range": _rounded(np.log10([low, high]) if logarithmic else [low, high])}
    if logarithmic:
        found["type"] = "log"
    ticks = _ticks(ax, name)
    if ticks:
        found |= {"tickvals": _rounded([place for place, _ in ticks]), "ticktext": [text for _, text in ticks]}
    return found


def _ticks(ax: Axes, name: str) -> list[tuple[float, str]]:
    """Places and texts of ticks that were given one by one."""
    axis = ax.xaxis if name == "x" else ax.yaxis
    if not isinstance(axis.get_major_locator(), FixedLocator):
        return []
    places = axis.get_majorticklocs()
    texts = axis.get_major_formatter().format_ticks(list(places))
    return [(float(place), str(text)) for place, text in zip(places, texts, strict=True)]


def _line(ax: Axes, line: Line2D, scope: Sequence[Mapping[str, str]], bars: Sequence[dict[str, Any]]) -> Chart:
    x, y = _in_data(ax, line)
    color, marker, dash = (
        to_hex(line.get_color()),
        str(line.get_marker()),
        _DASHES.get(str(line.get_linestyle()), "none"),
    )
    symbol = _SYMBOLS.get(marker, "")
    drawn = dash != "none"
    name = _name(color, symbol, scope)
    trace: Chart = {
        "x": _rounded(x),
        "y": _rounded(y),
        "mode": "+".join(filter(None, ("lines" * drawn, "markers" * bool(symbol)))) or "lines",
        "line": {
            "color": color,
            "dash": dash if dash != "none" else "solid",
            "width": round(1.3 * line.get_linewidth(), 2),
        },
        "marker": {"color": color, "symbol": symbol or "circle", "size": round(1.6 * line.get_markersize(), 1)},
        "name": name,
    }
    if marker == "x":
        trace["marker"]["line"] = {"color": color, "width": 1.5}
    if marker == ".":
        trace["marker"]["size"] = 4
    if (line.get_alpha() or 1) < 1:
        trace["opacity"] = line.get_alpha()
    if line.get_drawstyle() in _SHAPES:
        trace["line"]["shape"] = _SHAPES[line.get_drawstyle()]
    every = line.get_markevery()
    if isinstance(every, int) and every > 1:  # markers at some points, values at all
        trace["marker"]["size"] = [trace["marker"]["size"] if i % every == 0 else 0 for i in range(len(x))]
    labels = {name: _ticks(ax, name) for name in ("x", "y")}
    if labels["x"] or labels["y"]:
        across, up = (_nearest(ax, name, labels[name], values) for name, values in (("x", x), ("y", y)))
        trace["text"] = [": ".join(filter(None, pair)) for pair in zip(across, up, strict=True)]
    if not drawn and line.get_transform() != ax.transData:  # markers whose height says nothing
        trace["hoverinfo"] = "skip"
    for bar in bars if marker != "." else ():  # dots are single seeds
        _attach(trace, bar, x, y, color)
    if name:
        trace["legendgroup"] = name
    return trace


def _in_data(ax: Axes, line: Line2D) -> tuple[Any, Any]:
    """A line's points as data, whatever its coordinates are."""
    points = np.column_stack([np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)])
    if line.get_transform() != ax.transData:
        points = (line.get_transform() - ax.transData).transform(points)
    return points[:, 0], points[:, 1]


def _nearest(ax: Axes, name: str, ticks: Sequence[tuple[float, str]], values: Any) -> list[str]:
    """The text of the tick that each value stands at, as far as texts were given."""
    if not ticks:
        return [""] * len(values)
    logarithmic = (ax.xaxis if name == "x" else ax.yaxis).get_scale() == "log"
    places = np.array([place for place, _ in ticks])
    at, of = (np.log(values), np.log(places)) if logarithmic else (values, places)
    return [ticks[int(np.abs(of - value).argmin())][1].replace("\n", ", ") for value in at]


def _bar(container: ErrorbarContainer) -> dict[str, Any]:
    """Centres and half lengths of error bars, and whether they stand upright."""
    [collection] = container.lines[2]
    ends = np.array([segment for segment in collection.get_segments() if len(segment)]).reshape(-1, 2, 2)
    upright = bool(container.has_yerr)
    return {
        "x": ends[:, :, 0].mean(axis=1),
        "y": ends[:, :, 1].mean(axis=1),
        "half": np.abs(np.diff(ends[:, :, 1 if upright else 0], axis=1))[:, 0] / 2,
        "upright": upright,
        "color": to_hex(np.asarray(collection.get_color())[0]) if len(ends) else "",
    }


def _parts(container: Any) -> Iterator[Any]:
    """The lines that a container of error bars holds."""
    if isinstance(container, ErrorbarContainer):
        data, caps, bars = container.lines
        yield from (part for part in (data, *caps, *bars) if part is not None)


def _attach(trace: Chart, bar: dict[str, Any], x: Any, y: Any, color: str) -> None:
    """Give a line of means its error bars."""
    if bar["color"] != color or "markers" not in trace["mode"] or len(x) < len(bar["x"]):
        return
    half = np.zeros(len(x))
    for at, (bar_x, bar_y) in enumerate(zip(bar["x"], bar["y"], strict=True)):
        close = np.isclose(x, bar_x) & np.isclose(y, bar_y)
        if close.sum() != 1:
            return
        half[close.argmax()] = bar["half"][at]
    error = {"type": "data", "array": _rounded(half), "color": color, "thickness": 1.2, "width": 3}
    trace["error_y" if bar["upright"] else "error_x"] = error
    trace["half"] = _rounded(half)


def _band(band: PolyCollection, scope: Sequence[Mapping[str, str]]) -> Chart:
    points = np.concatenate([path.vertices for path in band.get_paths()]) if band.get_paths() else np.empty((0, 2))
    return _filled(points, band.get_facecolor()[0], scope)


def _span(ax: Axes, patch: Any, scope: Sequence[Mapping[str, str]]) -> Chart:
    """A horizontal stripe."""
    points = (patch.get_transform() - ax.transData).transform(patch.get_path().vertices)
    return _filled(points, patch.get_facecolor(), scope)


def _filled(points: Any, color: Any, scope: Sequence[Mapping[str, str]]) -> Chart:
    red, green, blue, alpha = to_rgba(color)
    name = _name(to_hex(color), None, scope)
    trace = {
        "x": _rounded(points[:, 0]),
        "y": _rounded(points[:, 1]),
        "mode": "lines",
        "line": {"width": 0},
        "fill": "toself",
        "fillcolor": f"rgba({255 * red:.0f},{255 * green:.0f},{255 * blue:.0f},{alpha:.2f})",
        "hoverinfo": "skip",
        "name": name,
    }
    return trace | ({"legendgroup": name} if name else {})


def _name(color: str, symbol: str | None, scope: Sequence[Mapping[str, str]]) -> str:
    """The entry of the legend that has this look; "" if that is none, or not only one."""
    alike = [entry["name"] for entry in scope if entry["color"] == color]
    exact = [entry["name"] for entry in scope if entry["color"] == color and entry["symbol"] == symbol]
    return exact[0] if len(exact) == 1 else alike[0] if len(alike) == 1 else ""


def _rounded(values: Any) -> list[float | None]:
    """To so many digits; None where it is not finite, as JSON has no nan."""
    return [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in map(float, values)]
