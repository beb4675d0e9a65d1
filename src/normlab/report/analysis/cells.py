"""The cells of a table: what they say to a reader, what they are sorted by, and whose runs they are of.

The texts are made from the rows of a tidy frame, whose columns `tables` describes.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from normlab.report.analysis.highlight import standings

NOTHING = "--"


class Cell(NamedTuple):
    """One cell of a table.

    Attributes:
        text: for a reader.
        value: the number that the text tells, to sort by; nan where it tells none.
        batch: the batch size of the runs that it is of, whose arm is the row's; None where it is of no single cell.
        standing: "best" or "close" where it stands out, as `standing.standings` tells, else "".
    """

    text: str
    value: float = math.nan
    batch: int | None = None
    standing: str = ""


Row = dict[str, Cell]  # by heading


@dataclass(frozen=True)
class Table:
    """One table of the report: `tidy` for CSV, and per setting (of verdicts: per place) its rows for a reader.

    Attributes:
        caption: what the numbers are; it does not say what stands out.
        rule: a sentence about the cells that are bold, "" where none can be. `standing.CLOSE` is that about the
            underlined ones, for formats that underline.
        prose: headings of what is to be read as sentences rather than compared.
        runs: names of the runs that it is of, where these are not all finished ones of its cells.
    """

    name: str
    title: str
    caption: str
    tidy: pd.DataFrame
    rows: Mapping[str, Sequence[Row]]
    rule: str = ""
    prose: Sequence[str] = ()
    runs: Sequence[str] | None = None

    @property
    def origin(self) -> pd.DataFrame:
        """Rows that say whose runs it is of, as `sources.sources` takes them."""
        return self.tidy if self.runs is None else pd.DataFrame({"run": self.runs}, dtype=object)

    @property
    def texts(self) -> dict[str, pd.DataFrame]:
        """The rows as one frame of texts per setting; a cell that a row lacks is dashes."""
        return self.frames(lambda cell: cell.text)

    def frames(self, text: Callable[[Cell], str]) -> dict[str, pd.DataFrame]:
        """The same with each cell's text as `text` has it."""
        return {
            setting: pd.DataFrame([{heading: text(cell) for heading, cell in row.items()} for row in rows]).fillna(
                NOTHING
            )
            for setting, rows in self.rows.items()
        }


def p_text(p: float, equals: str = "") -> str:
    """`0.012`, `< 0.001`, or dashes; `equals` stands before a number."""
    return NOTHING if math.isnan(p) else "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"


def with_test(row: Any, decimals: int | None) -> str:
    """`+1.20 ± 0.80 (n=5, p = 0.012, d_z = 2.1)`: a difference as `with_counts` has it, with its test."""
    text = with_counts(row, decimals, "+")
    if math.isnan(row.p_holm):
        return text
    size = "" if math.isnan(row.d_z) else f", d_z = {row.d_z:.1f}"
    return f"{text.removesuffix(')')}, p {p_text(row.p_holm, '= ')}{size})"


def with_interval(row: Any, decimals: int | None, sign: str = "") -> str:
    """`91.2 ± 0.8`, `91.2` for one seed, or dashes."""
    if not row.n:
        return NOTHING
    half = row.high - row.mean if row.n > 1 else 0.0
    shown = _format(max(abs(row.mean), half)) if decimals is None else f",.{decimals}f"
    text = f"{row.mean:{sign}{shown}}"
    return f"{text} ± {half:{shown}}" if row.n > 1 else text


def _format(size: float) -> str:
    """What shows three or four digits of numbers up to `size`: 0.123, 1.234, 12.34, 1,234; 1.23e+07."""
    exponent = math.floor(math.log10(size)) if size > 0 else 0
    if not -4 <= exponent < 7:
        return ".3g"
    return f",.{max((3 if exponent >= 0 else 2) - exponent, 0)}f"


def with_counts(row: Any, decimals: int | None, sign: str = "") -> str:
    """`91.2 ± 0.8 (n=3)`, `91.2 (n=1, 2 of 3 diverged)`, `-- missing`."""
    runs = row.done + row.diverged + row.missing
    notes = [f"n={row.n}"] if row.n else []
    notes += [f"{row.done - row.n} without a value"] if row.done > row.n else []
    notes += [f"{row.diverged} of {runs} diverged"] if row.diverged else []
    if row.missing:
        notes.append("missing" if row.missing == runs else f"{row.missing} of {runs} missing")
    text = with_interval(row, decimals, sign)
    return f"{text} ({', '.join(notes)})" if row.n else f"{text} {', '.join(notes)}".strip()


def grids(
    tidy: pd.DataFrame, text: Callable[[Any], str], higher_is_better: Mapping[str, bool] | None = None
) -> dict[str, list[Row]]:
    """Per setting, arms as rows and batch sizes as columns; `higher_is_better` of quantities that have a best."""
    cells: dict[str, dict[str, dict[int, Cell]]] = defaultdict(lambda: defaultdict(dict))
    for row, standing in zip(named_rows(tidy), standings(tidy, higher_is_better or {}), strict=True):
        cells[row.setting][row.arm][row.batch] = Cell(text(row), row.mean, row.batch, standing)
    found = {}
    for setting, arms in cells.items():
        batches = sorted({batch for cell in arms.values() for batch in cell})
        found[setting] = [
            {"arm": Cell(arm)} | {f"batch {b}": cell.get(b, Cell(NOTHING)) for b in batches}
            for arm, cell in arms.items()
        ]
    return found


def lists(
    tidy: pd.DataFrame,
    columns: dict[str, tuple[str, Callable[[Any], str]]],
    higher_is_better: Mapping[str, bool] | None = None,
) -> dict[str, list[Row]]:
    """Per setting, one row per arm and batch size. `columns`: quantity -> heading and text of a row."""
    cells: dict[tuple[str, str, int], Row] = {}
    for row, standing in zip(named_rows(tidy), standings(tidy, higher_is_better or {}), strict=True):
        head = {
            "arm": Cell(row.arm),
            "batch": Cell(str(row.batch), row.batch, row.batch),
            "runs": Cell(_runs(row), row.done, row.batch),
        }
        heading, text = columns[row.quantity]
        line = cells.setdefault((row.setting, row.arm, row.batch), head)
        line[heading] = Cell(text(row), row.mean, row.batch, standing)
    found = defaultdict(list)
    for (setting, *_), cell in cells.items():
        found[setting].append(cell)
    return dict(found)


def named_rows(frame: pd.DataFrame) -> Iterator[Any]:
    """The rows as named tuples."""
    return frame.itertuples(index=False)


def _runs(row: Any) -> str:
    total = row.done + row.diverged + row.missing
    told = [f"{row.diverged} diverged"] if row.diverged else []
    told += [f"{row.missing} missing"] if row.missing else []
    return f"{row.done} of {total}, {', '.join(told)}" if told else str(total)
