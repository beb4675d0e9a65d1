"""The style of figures: their sizes, for papers and slides, and one color and one marker per arm.

Colors are those of Okabe & Ito (2008), which color-blind readers can tell apart, with a grey and a brown.
"""

import io
import math
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image

from normlab.report.figures.marks import mark
from normlab.report.study.arms import FAMILIES, in_order
from normlab.runs.reading import LARGEST_NUMBER

SINGLE, DOUBLE, SLIDE = 3.4, 7.0, 6.4  # inches: widths of one and of two columns, and of a slide
CROWD = 8  # arms that one panel can show
RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "figure.labelsize": 8,
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
    "savefig.dpi": 160,
    "pdf.fonttype": 42,  # TrueType: conferences refuse matplotlib's default, Type 3
}


class Canvas(NamedTuple):
    """The size of figures, and a style laid over ours.

    Attributes:
        size: `double` or `single`, as wide as two columns or one of a paper, or `slide`, 16:9 and small, so that a
            slide that it fills has larger type.
        style: a style of matplotlib or the path of an .mplstyle file.
    """

    size: str = "double"
    style: str | None = None

    @property
    def width(self) -> float:
        """Inches."""
        return {"double": DOUBLE, "single": SINGLE, "slide": SLIDE}[self.size]

    @property
    def narrow(self) -> float:
        """Inches of a figure of one panel."""
        return min(SINGLE, self.width) if self.size != "slide" else SLIDE

    @property
    def across(self) -> Sequence[int]:
        """The numbers of panels that may stand beside each other in several rows, the usual one first."""
        return {"double": (4, 3, 5), "single": (2,), "slide": (3, 2)}[self.size]

    @property
    def panels(self) -> int:
        """The most panels of one figure."""
        return {"double": 12, "single": 8, "slide": 6}[self.size]

    def columns(self, number: int) -> int:
        """Return the number of panels beside each other with which the last row is full, if there is one."""
        if number < 4 and number <= max(self.across):
            return number
        return next((across for across in self.across if number % across == 0), self.across[0])

    def context(self) -> AbstractContextManager[None]:
        """Return the context in which its figures are to be drawn and written."""
        dots = {"savefig.dpi": 300 if self.size == "slide" else RC["savefig.dpi"]}  # a size that is promised
        if self.style is None:
            return mpl.rc_context(RC | dots)
        from matplotlib import style  # reads all of matplotlib's styles

        return style.context([RC, self.style, dots])

    def shape(self, figure: Figure) -> Figure:
        """Return the finished figure; for a slide in the slide's shape, and larger if its contents are.

        Its texts are texts, and no formulas of matplotlib: a name may hold dollar signs.
        """
        axes = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) if axis.get_scale() == "log"]
        powers = {id(tick.label1) for axis in axes for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())}
        for text in figure.findobj(Text):
            if isinstance(text, Text) and id(text) not in powers:
                text.set_parse_math(False)
        if self.size == "slide":
            height = max(figure.get_figheight(), figure.get_figwidth() * 9 / 16)
            figure.set_size_inches(height * 16 / 9, height)
        return figure


PAPER = Canvas()


class Style(NamedTuple):
    """The color and the marker of an arm."""

    color: str
    marker: str


BLUE, VERMILION, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
PURPLE, SKY, ORANGE, GREY, BROWN = "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#8C510A"
WINE = "#882255"
_MARKERS = "os^DvPX*<"


def _known_styles() -> dict[str, Style]:
    """Return the style of each known arm, none for two; blue is BN's alone, black none's.

    Among the first eight of a family no color comes twice.
    """
    known: dict[str, Style] = {}
    others: list[str] = []
    colors: tuple[str, ...] = (BLUE, VERMILION, GREEN, BLACK, PURPLE, SKY, ORANGE, WINE)
    for family, shift in zip(FAMILIES.values(), (0, 1, 2, 4), strict=True):  # such that no two arms have one style
        for i, (arm, color) in enumerate(zip(family, colors, strict=False)):
            known[arm] = Style(color, _MARKERS[(i + shift) % len(_MARKERS)])
        others += family[len(colors) :]
        colors = (ORANGE, PURPLE, SKY, GREY, GREEN, VERMILION, BROWN, WINE)
    free = [style for style in _OTHERS if style not in known.values()]
    return known | dict(zip(others, free, strict=False))


_COLORS = (PURPLE, SKY, ORANGE, GREY, GREEN, VERMILION, BROWN)
_OTHERS = [Style(color, marker) for marker in _MARKERS for color in _COLORS]
_KNOWN = _known_styles()


def styles(arms: Iterable[str]) -> dict[str, Style]:
    """Return the color and marker of each arm: by its name, so that studies agree on them.

    Where two of a few arms fall on the same color, the later one in the order of tables gets another.
    """
    chosen: dict[str, Style] = {}
    names = in_order(arms)
    for arm in names:
        first = zlib.crc32(arm.encode()) % len(_OTHERS)
        own = _KNOWN.get(arm) or _KNOWN.get(arm.split(" (")[0]) or _OTHERS[first]
        free = [style for style in (own, *_OTHERS[first:], *_OTHERS[:first]) if style not in chosen.values()] or [own]
        colors = {style.color for style in chosen.values()} if len(names) <= CROWD else set()
        chosen[arm] = next((style for style in free if style.color not in colors), free[0])
    return chosen


def limit(ax: Axes, name: Literal["x", "y"], shown: pd.Series, *, share: bool = False) -> None:
    """Set the limits of one axis around the values shown.

    Those of a share (in %) end at 0 and 100, and the axis of positive values that span a factor of ten is logarithmic.
    """
    values = shown.replace([math.inf, -math.inf], math.nan).dropna()
    values = values.where(values.abs() >= 1 / LARGEST_NUMBER, 0.0)  # of one that is nearer to 0, ratios overflow
    if values.empty:
        return
    low, high = float(values.min()), float(values.max())
    above = float(values[values > 0].min()) if high > 0 else math.nan
    if not share and low > 0 and 10 * above <= high:
        margin = (high / above) ** 0.06
        ax.set(**{f"{name}scale": "log", f"{name}lim": (above / margin, high * margin)})
        return
    margin = 0.06 * (high - low) or 0.5 * (abs(high) or 1.0)
    low, high = low - margin, high + margin
    if share:
        low, high = max(low, -1.0), min(high, 101.0)  # a little beyond, so that markers at the ends are whole
    ax.set(**{f"{name}lim": (low, high)})


def broken(name: str, most: int, lines: int = 3) -> str:
    """Return a name in lines of at most so many characters; of a longer one the beginning, an ellipsis and the end."""
    found = [""]
    for word in re.findall(r"[^\s_,/()-]*.?", name):
        for piece in (word[i : i + most] for i in range(0, len(word), most)):
            if len(found[-1] + piece.rstrip()) > most:
                found.append("")
            found[-1] += piece
    if len(found) > lines:
        found = [*found[: lines - 1], found[-1]]
        found[-2] = f"{found[-2][: most - 1]}…"
    return "\n".join(line.strip() for line in found)


def add_entries(owner: Figure | Axes, handles: Sequence[Artist], labels: Sequence[str], **placed: Any) -> None:
    """Add a legend, whose entries stand for the series that the handles are named after."""
    texts = owner.legend(handles=list(handles), labels=list(labels), **placed).get_texts()
    for text, handle in zip(texts, handles, strict=True):
        mark(text, str(handle.get_label()))


def legend(figure: Figure, handles: Sequence[Artist], canvas: Canvas) -> None:
    """Add a legend above the panels, in as many columns as fit; the figure grows with it.

    Where it would be high, it stands beside a narrow figure, which becomes wide.
    """
    labels = [broken(str(handle.get_label()), int((figure.get_figwidth() - 0.6) / 0.07)) for handle in handles]
    sizes = [(max(map(len, lines)), len(lines)) for lines in (label.split("\n") for label in labels)]
    for columns in range(len(handles), 0, -1):
        split = np.array_split(sizes, columns)
        if sum(0.42 + 0.06 * max(column[:, 0]) for column in split) <= figure.get_figwidth():
            break
    rows = max(int(sum(column[:, 1])) for column in split)
    if rows > 3 and figure.get_figwidth() < canvas.width:
        figure.set_size_inches(canvas.width, max(figure.get_figheight(), 0.17 * sum(lines for _, lines in sizes)))
        add_entries(figure, handles, labels, loc="outside right center")
        return
    figure.set_figheight(figure.get_figheight() + 0.17 * (rows - 1))
    add_entries(figure, handles, labels, loc="outside upper center", ncols=columns, columnspacing=1.2)


def handles(arms: Iterable[str], styles: Mapping[str, Style]) -> list[Artist]:
    """Return the entries of a legend, in the order of tables."""
    return [Line2D([], [], color=styles[arm].color, marker=styles[arm].marker, label=arm) for arm in in_order(arms)]


@contextmanager
def missing_glyphs() -> Iterator[set[str]]:
    """Yield a set that has, in the end, the characters that the font lacks of what is drawn: warned of by nobody else.

    matplotlib warns of each once for every figure and file.
    """
    missing: set[str] = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "Glyph .* missing from")
        yield missing
    for warning in caught:
        if glyph := re.match(r"Glyph (\d+) .* missing from", str(warning.message)):
            missing.add(chr(int(glyph[1])))
        else:
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


def encode(figure: Figure, suffix: str, canvas: Canvas = PAPER) -> bytes:
    """Return the figure as a file's content, `png` or `pdf`; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with canvas.context():
        figure.savefig(buffer, format=suffix, metadata={"CreationDate": None} if suffix == "pdf" else None)
    if suffix == "png":  # 256 colors are a fraction of the bytes; by coverage, so that a thin line keeps its own
        drawn = Image.open(buffer)
        dpi = drawn.info["dpi"]
        image = drawn.convert("RGB")
        image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        image.save(buffer := io.BytesIO(), "png", optimize=True, dpi=dpi)
    return buffer.getvalue()
