"""The cells of a table: the text for a reader, the number to sort by, and the runs that they are of.

The texts are made from the rows of a tidy frame, whose columns `frames` describes. `report.render` formats a cell as
Markdown, LaTeX, HTML or terminal text.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from normlab.report.analysis.frames import named_rows
from normlab.report.analysis.highlight import highlights
from normlab.report.analysis.statistics import Interval

NOTHING = "--"


class TableCell(NamedTuple):
    """One cell of a table.

    Attributes:
        text: for a reader.
        value: the number of the text, to sort by; nan where it has none.
        batch: the batch size of the runs that it is of, whose arm is the row's; None where it is of no single cell.
        highlight: "best" or "close" where it stands out, as `highlight.highlights` decides, else "".
    """

    text: str
    value: float = math.nan
    batch: int | None = None
    highlight: str = ""


Row = dict[str, TableCell]  # by heading
Text = Callable[[Any], str]  # from a row of a tidy frame


@dataclass(frozen=True)
class Table:
    """One table of the report: `tidy` for CSV, and per setting (of verdicts: per place) its rows for a reader.

    Attributes:
        caption: explains the numbers, without what stands out.
        rule: a sentence about the cells that are bold, "" where none can be. `highlight.CLOSE` is that about the
            underlined ones, for formats that underline.
        prose: headings of what is to be read as sentences rather than compared.
        runs: names of the runs that it is of, where these are not all finished ones of its cells.
        commands: command lines that follow from it, to stand below it, each on a line after its title.
    """

    name: str
    title: str
    caption: str
    tidy: pd.DataFrame
    rows: Mapping[str, Sequence[Row]]
    rule: str = ""
    prose: Sequence[str] = ()
    runs: Sequence[str] | None = None
    commands: Sequence[str] = ()

    @property
    def origin(self) -> pd.DataFrame:
        """Return rows that name the runs that it is of, as `provenance.provenance_of` takes them."""
        return self.tidy if self.runs is None else pd.DataFrame({"run": self.runs}, dtype=object)


def p_text(p: float, equals: str = "") -> str:
    """Return `0.012`, `< 0.001`, or dashes; `equals` stands before a number."""
    return NOTHING if math.isnan(p) else "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"


def with_test(row: Any, decimals: int | None) -> str:
    """Return `+1.20 ± 0.80 (n=5, p = 0.012, d_z = 2.1)`: a difference as `with_counts` has it, with its test.

    Where pairs diverged, the test is of the others alone, and says so: `survivors' p = 0.012`.
    """
    text = with_counts(row, decimals, "+")
    if math.isnan(row.p_holm):
        return text
    size = "" if math.isnan(row.d_z) else f", d_z = {row.d_z:.1f}"
    whose = "survivors' " if row.diverged else ""
    return f"{text.removesuffix(')')}, {whose}p {p_text(row.p_holm, '= ')}{size})"


def with_interval(row: Any, decimals: int | None, sign: str = "") -> str:
    """Return `91.2 ± 0.8`, `91.2` for one seed, or dashes; three or four digits where `decimals` is None.

    An interval that is cut at a bound is shown by its ends: `99.2 [98.1, 100.0]`.
    """
    if not row.n:
        return NOTHING
    half = row.high - row.mean if row.n > 1 else 0.0
    shown = _format(max(abs(row.mean), half)) if decimals is None else f",.{decimals}f"
    text = f"{row.mean:{sign}{shown}}"
    if _is_cut(row):
        return f"{text} [{row.low:{sign}{shown}}, {row.high:{sign}{shown}}]"
    return f"{text} ± {half:{shown}}" if row.n > 1 else text


def _is_cut(row: Any) -> bool:
    return row.n > 1 and Interval(row.mean, row.low, row.high, row.n).is_cut


def note_on_cut(tidy: pd.DataFrame, bounds: str) -> str:
    """Return a sentence for the caption of a table in which intervals are cut at these bounds, "" for another one."""
    is_cut = any(map(_is_cut, named_rows(tidy)))
    return f" In brackets: the ends of an interval that is cut at {bounds}." if is_cut else ""


def with_geometric_interval(row: Any) -> str:
    """Return `1.2 [0.9, 1.6]`, `1.2` for one seed, or dashes."""
    if not row.n:
        return NOTHING
    return f"{row.mean:.3g}" + (f" [{row.low:.3g}, {row.high:.3g}]" if row.n > 1 else "")


def _format(size: float) -> str:
    """Return the format of three or four digits of numbers up to `size`: 0.123, 1.234, 12.34, 1,234; 1.23e+07."""
    exponent = math.floor(math.log10(size)) if 0 < size < math.inf else 0
    if not -4 <= exponent < 7:
        return ".3g"
    return f",.{max((3 if exponent >= 0 else 2) - exponent, 0)}f"


def with_counts(row: Any, decimals: int | None, sign: str = "") -> str:
    """Return `91.2 ± 0.8 (n=3)`, `91.2 (n=1, 2 of 3 diverged)`, `-- missing`."""
    runs = row.done + row.diverged + row.missing
    notes = [f"n={row.n}"] if row.n else []
    notes += [f"{row.done - row.n} without a value"] if row.done > row.n else []
    notes += [f"{row.diverged} of {runs} diverged"] if row.diverged else []
    if row.missing:
        notes.append("missing" if row.missing == runs else f"{row.missing} of {runs} missing")
    text = with_interval(row, decimals, sign)
    return f"{text} ({', '.join(notes)})" if row.n else f"{text} {', '.join(notes)}".strip()


def grids(tidy: pd.DataFrame, text: Text, higher_is_better: Mapping[str, bool] | None = None) -> dict[str, list[Row]]:
    """Return per setting arms as rows and batch sizes as columns; `higher_is_better` of quantities that have a best."""
    cells: dict[str, dict[str, dict[int, TableCell]]] = defaultdict(lambda: defaultdict(dict))
    for row, mark in zip(named_rows(tidy), highlights(tidy, higher_is_better or {}), strict=True):
        cells[row.setting][row.arm][row.batch] = TableCell(text(row), row.mean, row.batch, mark)
    grids = {}
    for setting, arms in cells.items():
        batches = sorted({batch for row in arms.values() for batch in row})
        grids[setting] = [
            {"arm": TableCell(arm)} | {f"batch {b}": row.get(b, TableCell(NOTHING)) for b in batches}
            for arm, row in arms.items()
        ]
    return grids


def lists(
    tidy: pd.DataFrame, headings: Mapping[str, str], text: Text, higher_is_better: Mapping[str, bool] | None = None
) -> dict[str, list[Row]]:
    """Return per setting one row per arm and batch size, with the headings of the quantities.

    A mean over fewer runs than are done says over how many: `12.3 ± 4.5 (2 of 5)`.
    """
    lines: dict[tuple[str, str, int], Row] = {}
    lists: dict[str, list[Row]] = defaultdict(list)
    for row, mark in zip(named_rows(tidy), highlights(tidy, higher_is_better or {}), strict=True):
        key = (row.setting, row.arm, row.batch)
        if key not in lines:
            batch, runs = TableCell(str(row.batch), row.batch, row.batch), TableCell(_runs(row), row.done, row.batch)
            lines[key] = {"arm": TableCell(row.arm), "batch": batch, "runs": runs}
            lists[row.setting].append(lines[key])
        partly = f" ({row.n} of {row.done})" if 0 < row.n < row.done else ""
        lines[key][headings[row.quantity]] = TableCell(text(row) + partly, row.mean, row.batch, mark)
    return dict(lists)


def _runs(row: Any) -> str:
    total = row.done + row.diverged + row.missing
    notes = [f"{row.diverged} diverged"] if row.diverged else []
    notes += [f"{row.missing} missing"] if row.missing else []
    return f"{row.done} of {total}, {', '.join(notes)}" if notes else str(total)
