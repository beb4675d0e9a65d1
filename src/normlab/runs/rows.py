"""Read the files of rows of a run: metrics.jsonl and probes/*.jsonl, one JSON object a line.

Every line is checked (`schema.Bounds`). One that cannot be read, or has a value that no run writes, is left out with a
sentence.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from normlab.runs import reading
from normlab.runs.reading import RecordPath

METRICS_FILE = "metrics.jsonl"
MOST_ROWS = 1_000_000  # of a file
MOST_NESTED = 2_000_000  # lists and mappings in it, each of which costs memory
MOST_FAULTS = 100  # lines of a file that cannot be read, after which the rest of it is not
_SMALL = 1 << 20  # bytes that hold too little to fill the memory, whatever they are

Rows = list[dict[str, Any]]
Columns = Mapping[str, Sequence[Any]]


def read_rows(path: RecordPath) -> tuple[Rows, list[str]]:
    """Return the rows of a file of metrics or of a probe, and a sentence about each line that cannot be read.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        content = reading.read(path)
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise reading.damaged(path, error) from None
    rows, _, warnings = _parsed(path, content)
    return rows, warnings


def as_columns(path: RecordPath, content: bytes) -> tuple[Columns, list[str]]:
    """Return what a file of rows holds as columns, nan where a row lacks one; a sentence about each line left out.

    Raises:
        UserError: if it has more values than fit into the memory.
    """
    rows, columns, warnings = _parsed(path, content)
    if columns is None:
        names = dict.fromkeys(itertools.chain.from_iterable(rows))
        columns = {name: [row.get(name, math.nan) for row in rows] for name in names}
    return columns, warnings


def _parsed(path: RecordPath, content: bytes) -> tuple[Rows, Columns | None, list[str]]:
    """Return the rows, the same as columns if all have the same names, and sentences about what is left out."""
    from normlab.runs import schema  # pydantic is slow to import, and most commands read no record

    large = len(content) > _SMALL
    if large and (content.count(b"[") + content.count(b"{") > MOST_NESTED or content.count(b"\n") > MOST_ROWS):
        raise reading.damaged(path, f"it has more than {MOST_ROWS} rows, or too many lists")
    probe = path.name != METRICS_FILE
    text = content.decode(errors="replace")
    lines = text.removesuffix("\n")
    try:  # all lines at once, which takes half the time
        rows = reading.parse_json(f"[{lines.replace(chr(10), ',')}]")
    except (ValueError, RecursionError):
        rows = []
    if len(rows) == lines.count("\n") + 1 and set(map(type, rows)) == {dict} and len(set(map(tuple, rows))) == 1:
        columns = dict(zip(rows[0], zip(*map(dict.values, rows), strict=True), strict=True))
        if schema.columns_fit(columns, probe=probe):
            return rows, columns, []
    return _row_by_row(path, text, probe=probe)


def _row_by_row(path: RecordPath, text: str, *, probe: bool) -> tuple[Rows, None, list[str]]:
    from normlab.runs import schema

    rows: Rows = []
    warnings: list[str] = []
    names: set[str] = set()
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), start=1):
        try:
            row = reading.parse_json(line)
            why = schema.row_fault(row, probe=probe) or schema.order_fault(row, rows[-1] if rows else None, probe=probe)
            if not why and len(names | row.keys()) > schema.MOST_COLUMNS:
                why = f"it brings the file to more than {schema.MOST_COLUMNS} columns"
            if why:
                raise ValueError(why)
        except (ValueError, RecursionError) as error:
            if len(warnings) == MOST_FAULTS:
                warnings.append(f"{reading.shown(path)}: line {number} and those after it are left out, too.")
                break
            why = reading.shown(error)
            warnings.append(f"{reading.shown(path)}, line {number} cannot be read and is left out: {why}.")
            continue
        names |= row.keys()
        rows.append(row)
    return rows, None, warnings
