"""A figure as SVG for a page: what matplotlib draws, made small, with its marks and the keys of its series on top.

Elements of a series have the class `s0`, `s1`, ..., its entries in legends `k0`, `k1`, ...; what answers a pointer lies
on top: `mark` has the text of a point, `key` an entry of a legend. Texts have the page's font, what is black has the
colour of its text, and white and the grey of the grid are left to its style (`render/html/figures.css`), so that a dark
page has a dark figure.
"""

import io
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from normlab.common.terminal import plain
from normlab.report.figures.marks import Cell, shown
from normlab.report.figures.style import BLACK, PAPER, Canvas

LONG = 40  # points of a line that is thinned
_RC: dict[Any, Any] = {"svg.fonttype": "none", "savefig.bbox": None}
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
_NO_XML = re.compile("[\ufffe\uffff]")
_UNSAID = {"stroke-linejoin", "stroke-dashoffset", "font-family"}  # the page's style has them
_ANCHORS = {"left": ("start", 0.0), "center": ("middle", 0.5), "right": ("end", 1.0)}


class _Key(NamedTuple):
    """An entry of a legend, with its series."""

    handle: Artist | None
    text: Text
    series: str

    @property
    def artists(self) -> list[Artist]:
        """Its artists."""
        return [self.text] if self.handle is None else [self.handle, self.text]


def as_svg(figure: Figure, name: str, cells: Mapping[Cell, int], canvas: Canvas = PAPER) -> str:
    """Return the figure as an `<svg>` element, for an HTML page; the same figure gives the same text.

    The figure is changed: it is drawn for the last time.

    Args:
        figure: as `draw` made it.
        name: of the figure, unique on the page; its ids begin with it, and `caption-<name>` describes it.
        cells: the number of each cell on the page, which its marks have as `data-cell`.
        canvas: its style.
    """
    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_text(_printable(text.get_text()))
    legends = [*figure.legends, *filter(None, (ax.get_legend() for ax in figure.axes))]
    entries = [entry for legend in legends for entry in zip(legend.legend_handles, legend.get_texts(), strict=True)]
    numbers: dict[str, int] = {}
    for artist in figure.findobj():
        if (found := shown(artist)) and not isinstance(artist, Text):
            artist.set_gid(f"s{numbers.setdefault(found.series, len(numbers))}")
    keys = [_Key(*entry, found.series) for entry in entries if (found := shown(entry[1])) and found.series in numbers]
    for key in keys:
        for artist in key.artists:
            artist.set_gid(f"k{numbers[key.series]}")
    grounds = [figure.patch, *(ax.patch for ax in figure.axes)]
    themed = all(to_hex(ground.get_facecolor()) == "#ffffff" for ground in grounds)
    for ground in grounds:
        ground.set_visible(not themed)
    drawn = _drawn(figure, name, canvas)
    width, height = 72 * figure.get_size_inches()
    root = Element(
        "svg",
        {
            "viewBox": f"0 0 {_short(width)} {_short(height)}",
            "style": f"--inches: {_short(figure.get_figwidth())}",
            "class": "themed" if themed else "",
            "role": "graphics-document",
            "aria-label": name.replace("_", " "),
            "aria-describedby": f"caption-{name}",
        },
    )
    root.extend(_Tidy(name, _places_of_lines(figure), "currentColor" if themed else BLACK).children(drawn))
    root.append(_keys(keys, numbers, height))
    root.append(_marks(figure, cells, height))
    for group in root.iter("g"):  # one stop of the tab key, and arrows from there (figures.js)
        for i, element in enumerate(group.findall("*[@aria-label]")):
            element.set("tabindex", "-1" if i else "0")
    return ElementTree.tostring(root, encoding="unicode")


def _printable(text: str) -> str:
    """Return a text without characters that XML does not allow, or that a page would obey."""
    return _NO_XML.sub("\ufffd", plain(text))


def _drawn(figure: Figure, name: str, canvas: Canvas) -> Element:
    """Return matplotlib's SVG; its units are those of the figure's transforms from then on."""
    buffer = io.BytesIO()
    figure.set_dpi(72)
    with canvas.context(), mpl.rc_context({**_RC, "svg.hashsalt": name}):
        for i, text in enumerate(_lines(figure)):
            text.set_gid(text.get_gid() or f"t{i}")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return ElementTree.fromstring(buffer.getvalue())


def _lines(figure: Figure) -> Iterator[Text]:
    """Yield the upright texts of several lines, which matplotlib places for its own font."""
    for text in figure.findobj(Text):
        if isinstance(text, Text) and "\n" in text.get_text() and not text.get_rotation():
            yield text


def _places_of_lines(figure: Figure) -> dict[str, tuple[str, float]]:
    """Return the anchor of each text of several lines, by its id."""
    places = {}
    for text in _lines(figure):
        anchor, share = _ANCHORS[text.get_horizontalalignment()]
        extent = text.get_window_extent()
        places[str(text.get_gid())] = anchor, extent.x0 + share * extent.width
    return places


def _keys(keys: list[_Key], numbers: Mapping[str, int], height: float) -> Element:
    group = Element("g", {"class": "keys"})
    for key in keys:
        box = Bbox.union([artist.get_window_extent() for artist in key.artists]).padded(1.5)
        shape = {"x": box.x0, "y": height - box.y1, "width": box.width, "height": box.height}
        named = {"aria-label": _printable(key.series), "data-series": str(numbers[key.series])}
        answer = {"class": "key", "role": "button", "aria-pressed": "true"}
        SubElement(group, "rect", answer | named | {name: _short(value) for name, value in shape.items()})
    return group


def _marks(figure: Figure, cells: Mapping[Cell, int], height: float) -> Element:
    group = Element("g", {"class": "marks"})
    for ax in figure.axes:
        box = ax.bbox.padded(1)
        for line in ax.lines:
            found = shown(line)
            if found is None or not found.marks:
                continue
            points = line.get_transform().transform(np.asarray(line.get_xydata(), dtype=float))
            for (x, y), of_point in zip(points, found.marks, strict=True):
                if of_point is None or not box.contains(x, y):
                    continue
                shape = {"cx": _short(x), "cy": _short(height - y), "r": "5"}
                named = {"class": f"mark {line.get_gid()}", "aria-label": _printable(of_point.text)}
                number = cells.get(of_point.cell) if of_point.cell else None
                answer = {"role": "img"} if number is None else {"role": "button", "data-cell": str(number)}
                SubElement(group, "circle", named | answer | shape)
    return group


class _Tidy:
    """Makes matplotlib's elements small: without wrappers, defaults, long ids and needless digits."""

    def __init__(self, name: str, places: Mapping[str, tuple[str, float]], black: str) -> None:
        self.name, self.places, self.black, self.ids = name, places, black, dict[str, str]()

    def children(self, element: Element) -> Iterator[Element]:
        """Yield what replaces the children of an element."""
        for child in element:
            yield from self._replaced(child)

    def _replaced(self, element: Element) -> Iterator[Element]:
        tag, old = element.tag.rpartition("}")[2], element.get("id", "")
        if tag in ("metadata", "style"):
            return
        children = list(self.children(element))
        attributes = dict(self._attributes(element))
        if tag == "g":
            attributes |= {"class": old} if re.fullmatch(r"[sk]\d+", old) else {}
            if old in self.places:
                _anchor(children, *self.places[old])
            attributes |= _shared(children)
        elif old:
            attributes["id"] = self._id(old)
        if tag in ("g", "defs") and not children:
            return
        if tag == "g" and not attributes:
            yield from children
            return
        new = Element(tag, attributes)
        new.text = element.text if tag in ("text", "tspan") else None
        new.extend(children)
        yield new

    def _value(self, said: str) -> str:
        return self.black if said == BLACK else _rounded(said)

    def _id(self, old: str) -> str:
        return self.ids.setdefault(old, f"{self.name}-{len(self.ids)}")

    def _attributes(self, element: Element) -> Iterator[tuple[str, str]]:
        for qualified, value in element.items():
            key = qualified.rpartition("}")[2]
            if key == "style":
                pairs = [part.split(": ", 1) for part in value.split("; ") if part]
                yield from ((name, self._value(said)) for name, said in pairs if name not in _UNSAID)
            elif key == "clip-path":
                yield key, f"url(#{self._id(value[5:-1])})"
            elif key == "href":
                yield key, f"#{self._id(value[1:])}"
            elif key == "d":
                yield key, _path(value)
            elif key != "id" and not value.startswith("rotate(-0 "):
                yield key, _rounded(value)


def _shared(markers: list[Element]) -> dict[str, str]:
    """Take from markers that stand beside each other what they all have, and return it."""
    if len(markers) < 2 or any(marker.tag != "use" for marker in markers):
        return {}
    first, *others = (marker.attrib for marker in markers)
    alike = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    shared = {key: value for key, value in alike.items() if key not in ("x", "y", "href")}
    for marker in markers:
        for key in shared:
            del marker.attrib[key]
    return shared


def _anchor(texts: list[Element], anchor: str, x: float) -> None:
    """Anchor the lines of a text at x, of whatever width they are on the page."""
    for text in texts:
        place = re.fullmatch(r"translate\(\S+ (\S+)\)", text.attrib.pop("transform", ""))
        if place:
            text.attrib |= {"x": _short(x), "y": place[1], "text-anchor": anchor}


def _path(d: str) -> str:
    """Return the same path in less bytes; a long line without what is within a quarter of a point from it."""
    if re.search("[CQ]", d):
        return re.sub(r"\s*([A-Za-z])\s*", r"\1", _rounded(d))
    found = []
    for part in d.split("M")[1:]:
        points = np.array(_NUMBER.findall(part), dtype=float).reshape(-1, 2)
        if len(points) > LONG:
            path = Path(points)
            path.should_simplify, path.simplify_threshold = True, 0.25
            points = np.asarray(path.cleaned(simplify=True).vertices)[:-1]  # the last one ends the path
        digits = 1 if len(points) > LONG else 2
        found.append("M" + " ".join(_short(x, digits) for x in points.ravel()) + "z" * ("z" in part))
    return "".join(found)


def _rounded(text: str) -> str:
    return text if text.startswith("#") else _NUMBER.sub(lambda number: _short(float(number[0])), text)


def _short(value: Any, digits: int = 2) -> str:
    text = f"{value:.{digits}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
