"""A figure of the page: its drawing, which scrolls in a box of its own where it is wide, and its caption."""

from collections.abc import Mapping
from typing import NamedTuple

from markupsafe import Markup

from normlab.common.terminal import plain
from normlab.report.study.provenance import Provenance

_FIGURE = Markup(
    '<figure id="figure-{name}" class="figure"><div class="plot">{svg}</div>'
    '<figcaption id="caption-{name}">{caption} <span class="files">{files}</span></figcaption></figure>'
)
_FILE = Markup('<a href="{href}">{suffix}</a> ')


class PageFigure(NamedTuple):
    """A figure for a page.

    Attributes:
        name: unique on the page.
        svg: its drawing as `figures.svg.as_svg` gives it.
        files: addresses of its files, by suffix, relative to the page.
        sources: its provenance; None on a page that does not show it.
    """

    name: str
    caption: str
    svg: str
    files: Mapping[str, str]
    sources: Provenance | None = None


def figure_html(figure: PageFigure) -> Markup:
    """Return the `<figure>` element of a figure; its caption links to the files for papers."""
    files = Markup("").join(_FILE.format(href=href, suffix=suffix) for suffix, href in figure.files.items())
    return _FIGURE.format(name=figure.name, svg=Markup(figure.svg), caption=plain(figure.caption), files=files)
