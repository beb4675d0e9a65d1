"""A matplotlib figure as charts for Plotly, one per panel, so that a page can show its values and hide its arms.

The functions that draw a figure decide its contents; here its lines, bands and error bars are only copied.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgba
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator
from matplotlib.typing import ColorType
from numpy.typing import NDArray

from normlab.report.render.html.contents import rounded

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

Chart = dict[str, Any]  # as Plotly's JSON
Entries = Sequence[Mapping[str, str]]  # of a legend: name, color, dash and symbol
Values = NDArray[np.float64]


class _ErrorBars(NamedTuple):
    """Centers and half lengths of error bars, and whether they stand upright."""

    x: Values
    y: Values
    half: Values
    upright: bool
    color: str


def charts(figure: Figure) -> tuple[list[Chart], list[dict[str, str]]]:
    """Return the panels of a figure as traces and layout for Plotly; and the entries of its legend.

    An entry has a name, a color, a dash and a symbol. A trace has `legendgroup`, the name of its entry, where it has
    an entry.
    """
    # Nothing is drawn, but positions in axes' coordinates become data's only once limits are settled.
    for ax in figure.axes:
        ax.get_xlim(), ax.get_ylim()
    legends = [*figure.legends, *filter(None, (ax.get_legend() for ax in figure.axes))]
    entries = list({entry["name"]: entry for legend in legends for entry in _entries(legend)}.values())
    return [_panel(figure, ax, entries) for ax in figure.axes], entries


def _entries(legend: Legend) -> Iterator[dict[str, str]]:
    for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
        if isinstance(handle, Line2D):
            yield {"name": text.get_text(), **_look(handle)}


def _look(line: Line2D) -> dict[str, str]:
    return {
        "color": to_hex(line.get_color()),
        "dash": _DASHES.get(str(line.get_linestyle()), "none"),
        "symbol": _SYMBOLS.get(str(line.get_marker()), ""),
    }


def _panel(figure: Figure, ax: Axes, entries: Entries) -> Chart:
    legend = ax.get_legend()
    scope = list(_entries(legend)) if legend else entries
    containers = [container for container in ax.containers if isinstance(container, ErrorbarContainer)]
    bars = [_error_bars(container) for container in containers]
    of_bars = {id(part) for container in containers for part in container.get_children()}
    bands = [_band(band, scope) for band in ax.collections if isinstance(band, PolyCollection)]
    spans = [_span(ax, patch, scope) for patch in ax.patches]
    lines = [_line(ax, line, scope, bars) for line in ax.lines if id(line) not in of_bars and np.size(line.get_xdata())]
    return {
        "title": re.sub(r"\n(?!\()", ", ", ax.get_title() or ax.get_title(loc="left")).replace("\n", " "),
        "traces": [*spans, *bands, *lines],
        "x": _axis(ax.xaxis, ax.get_xlabel() or figure.get_supxlabel()),
        "y": _axis(ax.yaxis, ax.get_ylabel() or figure.get_supylabel()),
    }


def _axis(axis: Axis, label: str) -> Chart:
    ends = axis.get_view_interval()
    logarithmic = axis.get_scale() == "log"
    found: Chart = {"title": label, "range": _rounded(np.log10(ends) if logarithmic else ends)}
    if logarithmic:
        found["type"] = "log"
    ticks = _given_ticks(axis)
    if ticks:
        found |= {"tickvals": _rounded([place for place, _ in ticks]), "ticktext": [text for _, text in ticks]}
    return found


def _given_ticks(axis: Axis) -> list[tuple[float, str]]:
    """Return places and texts of ticks that were given one by one."""
    if not isinstance(axis.get_major_locator(), FixedLocator):
        return []
    places = [float(place) for place in axis.get_majorticklocs()]
    return list(zip(places, map(str, axis.get_major_formatter().format_ticks(places)), strict=True))


def _line(ax: Axes, line: Line2D, scope: Entries, bars: Sequence[_ErrorBars]) -> Chart:
    x, y = _in_data(ax, line)
    look, marker, every = _look(line), str(line.get_marker()), line.get_markevery()
    color, symbol, drawn = look["color"], look["symbol"], look["dash"] != "none"
    name = _name(color, symbol, scope)
    size: Any = 4 if marker == "." else round(1.6 * line.get_markersize(), 1)
    if isinstance(every, int) and every > 1:  # markers at some points, values at all
        size = [size if i % every == 0 else 0 for i in range(len(x))]
    trace: Chart = {
        "x": _rounded(x),
        "y": _rounded(y),
        "mode": "+".join(filter(None, ("lines" * drawn, "markers" * bool(symbol)))) or "lines",
        "line": {
            "color": color,
            "dash": look["dash"] if drawn else "solid",
            "width": round(1.3 * line.get_linewidth(), 2),
        },
        "marker": {"color": color, "symbol": symbol or "circle", "size": size},
        "name": name,
    }
    if marker == "x":
        trace["marker"]["line"] = {"color": color, "width": 1.5}
    if (line.get_alpha() or 1) < 1:
        trace["opacity"] = line.get_alpha()
    if line.get_drawstyle() in _SHAPES:
        trace["line"]["shape"] = _SHAPES[line.get_drawstyle()]
    if _given_ticks(ax.xaxis) or _given_ticks(ax.yaxis):
        texts = zip(_nearest_ticks(ax.xaxis, x), _nearest_ticks(ax.yaxis, y), strict=True)
        trace["text"] = [": ".join(filter(None, pair)) for pair in texts]
    if not drawn and line.get_transform() != ax.transData:  # markers whose height means nothing
        trace["hoverinfo"] = "skip"
    for bar in bars if marker != "." else ():  # dots are single seeds
        _add_error_bars(trace, bar, x, y)
    return trace | ({"legendgroup": name} if name else {})


def _in_data(ax: Axes, line: Line2D) -> tuple[Values, Values]:
    """Return the points of a line as data, whatever its coordinates are."""
    points = np.column_stack([np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)])
    if line.get_transform() != ax.transData:
        points = (line.get_transform() - ax.transData).transform(points)
    return points[:, 0], points[:, 1]


def _nearest_ticks(axis: Axis, values: Values) -> list[str]:
    """Return the text of the tick at each value, "" if no texts were given."""
    ticks = _given_ticks(axis)
    if not ticks:
        return [""] * len(values)
    places = np.array([place for place, _ in ticks])
    if axis.get_scale() == "log":
        places, values = np.log(places), np.log(values)
    return [ticks[int(np.abs(places - value).argmin())][1].replace("\n", ", ") for value in values]


def _error_bars(container: ErrorbarContainer) -> _ErrorBars:
    [collection] = container.lines[2]
    ends = np.array([segment for segment in collection.get_segments() if len(segment)]).reshape(-1, 2, 2)
    upright = bool(container.has_yerr)
    x, y = ends.mean(axis=1).T
    half = np.abs(np.diff(ends[:, :, int(upright)], axis=1))[:, 0] / 2
    return _ErrorBars(x, y, half, upright, to_hex(np.asarray(collection.get_color())[0]) if len(ends) else "")


def _add_error_bars(trace: Chart, bars: _ErrorBars, x: Values, y: Values) -> None:
    """Give a line of means its error bars, if they have its color and stand at its points."""
    color = trace["line"]["color"]
    if bars.color != color or "markers" not in trace["mode"] or len(x) < len(bars.x):
        return
    half = np.zeros(len(x))
    for bar_x, bar_y, bar_half in zip(bars.x, bars.y, bars.half, strict=True):
        close = np.isclose(x, bar_x) & np.isclose(y, bar_y)
        if close.sum() != 1:
            return
        half[close.argmax()] = bar_half
    error = {"type": "data", "array": _rounded(half), "color": color, "thickness": 1.2, "width": 3}
    trace["error_y" if bars.upright else "error_x"] = error
    trace["half"] = _rounded(half)


def _band(band: PolyCollection, scope: Entries) -> Chart:
    vertices = [path.vertices for path in band.get_paths()]
    return _filled(
        np.concatenate(vertices) if vertices else np.empty((0, 2)), np.asarray(band.get_facecolor())[0], scope
    )


def _span(ax: Axes, patch: Any, scope: Entries) -> Chart:
    """Return a horizontal stripe."""
    points = (patch.get_transform() - ax.transData).transform(patch.get_path().vertices)
    return _filled(points, patch.get_facecolor(), scope)


def _filled(points: Values, color: ColorType, scope: Entries) -> Chart:
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


def _name(color: str, symbol: str | None, scope: Entries) -> str:
    """Return the name of the entry of the legend with this color and symbol; "" if there is none, or several."""
    alike = [entry for entry in scope if entry["color"] == color]
    exact = [entry for entry in alike if entry["symbol"] == symbol]
    return next((found[0]["name"] for found in (exact, alike) if len(found) == 1), "")


def _rounded(values: Values | Sequence[float]) -> list[float | None]:
    return [rounded(float(value)) for value in values]
