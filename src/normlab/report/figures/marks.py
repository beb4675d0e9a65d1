"""What artists show, kept beside them: the series that hides them, and the values at their points.

A series is an entry of the figure's legend. `svg` writes both into the page.
"""

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from matplotlib.artist import Artist
from matplotlib.container import Container

Cell = tuple[str, str, int]  # setting, arm, batch


class Mark(NamedTuple):
    """The text on one point of a line, and the cell whose runs it shows, if it is of one alone."""

    text: str
    cell: Cell | None = None


class Shown(NamedTuple):
    """The series of an artist, and a mark per point of a line; None: a point that has no mark of its own."""

    series: str
    marks: Sequence[Mark | None] = ()


_SHOWN: WeakKeyDictionary[Artist, Shown] = WeakKeyDictionary()


def mark(drawn: Artist | Container, series: str, marks: Sequence[Mark | None] = ()) -> None:
    """Keep what an artist, or each of a container, shows."""
    for artist in drawn.get_children() if isinstance(drawn, Container) else [drawn]:
        _SHOWN[artist] = Shown(series, marks)


def shown(artist: Artist) -> Shown | None:
    """Return what was kept of an artist."""
    return _SHOWN.get(artist)
