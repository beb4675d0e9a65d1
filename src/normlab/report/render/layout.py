"""The parts of a table's layout that several formats share."""

import math
from collections.abc import Iterator, Mapping, Sequence

from normlab.report.analysis.cells import NOTHING, Row, TableCell


def filled(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with a cell under every heading, dashes where they have none."""
    headings = dict.fromkeys(heading for row in rows for heading in row)
    return [{heading: row.get(heading, TableCell(NOTHING)) for heading in headings} for row in rows]


def split_number(text: str) -> tuple[str, str]:
    """Return the number of a cell with its interval, and the rest in brackets: only the first is highlighted."""
    number, bracket, notes = text.partition(" (")
    return number, bracket + notes


def column_parts(
    widths: Mapping[str, float], repeated: Sequence[str], room: float, widest: float = math.inf
) -> Iterator[list[str]]:
    """Yield the headings of columns in parts that fit, each behind the repeated ones.

    Args:
        widths: by heading, in order.
        repeated: the first headings.
        room: total width of a part, in the unit of `widths`; a part has at least one column of its own.
        widest: width from which a column of a part can be made narrower.
    """
    part = list(repeated)
    for heading in list(widths)[len(repeated) :]:
        if len(part) > len(repeated) and sum(min(widths[h], widest) for h in part) + widths[heading] > room:
            yield part
            part = list(repeated)
        part.append(heading)
    yield part
