"""The rows of a study's runs as columns, kept in a file beside the runs, so that no line of them is read twice.

The index, `.index.npz` in the study's folder, is a cache: the runs' files are the records, and one that is not as it
was when the index was written is read anew. It may be deleted at any time, and a folder that cannot be written does
without. It holds numbers and JSON; nothing of it is executed.
"""

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from normlab import runs
from normlab.common.errors import UserError
from normlab.report.study.columns import Columns, as_columns, length
from normlab.runs import files
from normlab.runs.files import RecordPath

NAME = ".index.npz"
VERSION = 2  # of the index, and of what `as_columns` makes of rows: another one is not read
WORTH = 20_000  # rows read line by line, a fifth of a second, from which on writing an index pays


class Index:
    """Reader of files of rows, which takes from the index those that are as they were."""

    def __init__(self, study_folder: RecordPath) -> None:
        self._folder = study_folder
        self._path = study_folder / NAME if isinstance(study_folder, Path) else None  # a packed study is read without
        self._before = _read(self._path) if self._path else {}
        self._now: dict[str, tuple[list[int], Columns]] = {}
        self._rows_read = 0

    def read(self, run: str, file: str) -> tuple[Columns, list[str]]:
        """Return the columns of a file of a run's folder, and a sentence about each line that cannot be read."""
        if not self._path:
            rows, warnings = runs.read_rows(self._folder / run / file)
            return as_columns(rows), warnings
        name, path = f"{run}/{file}", f"{self._path.parent}/{run}/{file}"
        try:
            stat = os.stat(path)  # noqa: PTH116  # before it is read: what is written meanwhile is seen the next time
        except FileNotFoundError:
            return {}, []
        written = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        then, columns = self._before.get(name, (None, {}))
        if then != written:
            rows, warnings = runs.read_rows(Path(path))
            columns = as_columns(rows)
            if warnings:  # not kept, so that they are repeated every time
                return columns, warnings
            self._rows_read += len(rows)
        self._now[name] = written, columns
        return columns, []

    def write(self) -> None:
        """Keep what was read for the next time, if that pays and the folder can be written."""
        if not self._path:
            return
        path, rows = self._path, sum(length(columns) for _, columns in self._now.values())
        if self._rows_read >= max(WORTH, rows // 20):  # it is written as a whole, in about the time of reading so many
            arrays = _arrays(self._now)
            with contextlib.suppress(UserError):
                files.write_atomically(path, lambda file: np.savez(file, **arrays), durable=False)


def _arrays(read: Mapping[str, tuple[list[int], Columns]]) -> dict[str, Any]:
    """Return the numbers of all files with the same columns as one array, columns by rows, and the rest as JSON."""
    alike: dict[tuple[tuple[str, bool], ...], list[str]] = defaultdict(list)
    for name, (_, columns) in read.items():
        alike[tuple((column, isinstance(values, list)) for column, values in columns.items())].append(name)
    arrays: dict[str, Any] = {}
    groups = []
    for i, (kinds, names) in enumerate(alike.items()):
        numbers, lists = ([column for column, is_list in kinds if is_list == wanted] for wanted in (False, True))
        blocks, members = [], []
        for name in names:
            written, columns = read[name]
            rows = length(columns)
            blocks.append(np.array([columns[column] for column in numbers], float).reshape(len(numbers), rows))
            members.append([name, written, rows, {column: columns[column] for column in lists}])
        arrays[str(i)] = np.concatenate(blocks, axis=1)
        groups.append({"columns": [column for column, _ in kinds], "numbers": numbers, "files": members})
    head = json.dumps({"version": VERSION, "groups": groups}).encode()
    return {"head": np.frombuffer(head, np.uint8), **arrays}


def _read(path: Path) -> dict[str, tuple[list[int], Columns]]:
    """Return by file the stamp that it had when it was read, and its columns; nothing if there is no such index."""
    read = {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            head = json.loads(arrays["head"].tobytes())
            for i, group in enumerate(head["groups"] if head["version"] == VERSION else ()):
                block, start = arrays[str(i)], 0
                for name, written, rows, lists in group["files"]:
                    numbers = zip(group["numbers"], block[:, start : start + rows], strict=True)
                    columns = {**dict.fromkeys(group["columns"]), **dict(numbers), **lists}
                    read[name] = written, columns
                    start += rows
    except Exception:  # whatever is wrong with it, it is only a cache
        return {}
    return read
