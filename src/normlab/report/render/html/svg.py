"""A figure of the page: its drawing, which scrolls in a box of its own where it is wide, and its caption."""

from typing import NamedTuple

from markupsafe import Markup

from normlab.common.terminal import plain
from normlab.report.study.provenance import Provenance

_FIGURE = Markup(
    '<figure id="figure-{name}" class="figure"><div class="plot">{svg}</div>'
    '<figcaption id="caption-{name}">{caption} <span class="files">{files}</span></figcaption></figure>'
)
_FILE = Markup('<a href="{name}.{suffix}">{suffix}</a> ')


class PageFigure(NamedTuple):
    """A figure for the page: `svg` is its drawing as `figures.svg.as_svg` gives it."""

    name: str
    caption: str
    svg: str
    sources: Provenance


def figure_html(figure: PageFigure) -> Markup:
    """Return the `<figure>` element of a figure; its caption links to the files for papers."""
    files = Markup("").join(_FILE.format(name=figure.name, suffix=suffix) for suffix in ("pdf", "png"))
    return _FIGURE.format(name=figure.name, svg=Markup(figure.svg), caption=plain(figure.caption), files=files)
