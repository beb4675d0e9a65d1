"""The rows of a study's runs as columns, kept in a file beside the runs, so that no line of them is read twice.

The index, `.index.npz` in the study's folder, is a cache: the runs' files are the records, and one that is not as it
was when the index was written is read anew. It may be deleted at any time, and a folder that cannot be written does
without. It holds numbers and JSON; nothing of it is executed.
"""

import contextlib
import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from normlab import runs
from normlab.common.errors import UserError
from normlab.runs import files

NAME = ".index.npz"
VERSION = 1  # of the index, and of what `as_columns` makes of rows: another one is not read
WORTH = 20_000  # rows read line by line, a fifth of a second, from which on writing an index pays
TEXTS = ("layer",)  # columns that hold texts

# By name, in the order of the rows' keys: a float64 array, nan where there is no number; or, where a row has a text or
# a list, all values as JSON has them. Empty for a file without rows.
Columns = dict[str, Any]


def as_columns(rows: Sequence[dict[str, Any]]) -> Columns:
    keys = dict.fromkeys(map(tuple, rows))
    names = dict.fromkeys(itertools.chain.from_iterable(keys))
    alike = zip(*map(dict.values, rows), strict=True)  # far quicker, where all rows have the same keys
    found = alike if len(keys) == 1 else ([row.get(name, math.nan) for row in rows] for name in names)
    return {name: _column(name, list(values)) for name, values in zip(names, found, strict=True)}


def _column(name: str, values: list[Any]) -> Any:
    numbers = set(map(type, values)) <= {float, int, bool, NoneType}
    return np.array(values, dtype=float) if numbers and name not in TEXTS else values


def length(columns: Columns) -> int:
    return len(columns["step"]) if columns else 0  # every row has its step


class Index:
    """Reads files of rows, from the index where it has them as they are on disk."""

    def __init__(self, study_folder: Path) -> None:
        self.path = study_folder / NAME
        self._before = _read(self.path)
        self._now: dict[str, tuple[list[int], Columns]] = {}
        self._rows_read = 0

    def read(self, run: str, file: str) -> tuple[Columns, list[str]]:
        """What a file of a run's folder holds, and a sentence about each line that cannot be read."""
        name, path = f"{run}/{file}", f"{self.path.parent}/{run}/{file}"
        try:
            found = os.stat(path)  # noqa: PTH116  # before it is read: what is written meanwhile is seen the next time
        except FileNotFoundError:
            return {}, []
        written = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        then, columns = self._before.get(name, (None, {}))
        if then != written:
            rows, warnings = runs.read_rows(Path(path))
            columns = as_columns(rows)
            if warnings:  # not kept, so that they are told every time
                return columns, warnings
            self._rows_read += len(rows)
        self._now[name] = written, columns
        return columns, []

    def write(self) -> None:
        """Keep what was read for the next time, if that pays and the folder can be written."""
        rows = sum(length(columns) for _, columns in self._now.values())
        if self._rows_read >= max(WORTH, rows // 20):  # it is written as a whole, in about the time of reading so many
            arrays = _arrays(self._now)
            with contextlib.suppress(UserError):
                files.write_atomically(self.path, lambda file: np.savez(file, **arrays), durable=False)


def _arrays(found: Mapping[str, tuple[list[int], Columns]]) -> dict[str, Any]:
    """Numbers as arrays that are each of a column and of all files with the same columns; all else as JSON."""
    alike: dict[Any, list[str]] = defaultdict(list)
    for name, (_, columns) in found.items():
        alike[tuple((column, isinstance(values, list)) for column, values in columns.items())].append(name)
    arrays: dict[str, Any] = {}
    groups = []
    for i, (kinds, names) in enumerate(alike.items()):
        for j, (column, is_list) in enumerate(kinds):
            if not is_list:
                arrays[f"{i}.{j}"] = np.concatenate([found[name][1][column] for name in names])
        lists = {column for column, is_list in kinds if is_list}
        members = [
            [name, found[name][0], length(found[name][1]), {column: found[name][1][column] for column in lists}]
            for name in names
        ]
        groups.append({"columns": [column for column, _ in kinds], "files": members})
    head = json.dumps({"version": VERSION, "groups": groups}).encode()
    return {"head": np.frombuffer(head, np.uint8), **arrays}


def _read(path: Path) -> dict[str, tuple[list[int], Columns]]:
    found = {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            head = json.loads(arrays["head"].tobytes())
            for i, group in enumerate(head["groups"] if head["version"] == VERSION else ()):
                numbers = [arrays.get(f"{i}.{j}") for j in range(len(group["columns"]))]
                start = 0
                for name, written, rows, lists in group["files"]:
                    parts = zip(group["columns"], numbers, strict=True)
                    stop = start + rows
                    columns = {
                        column: lists[column] if column in lists else array[start:stop] for column, array in parts
                    }
                    found[name] = written, columns
                    start = stop
    except Exception:  # whatever is wrong with it, it is only a cache
        return {}
    return found
