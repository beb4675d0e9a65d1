"""The rows of a study's runs as columns, kept in a file beside the runs, so that no line of them is read twice.

The index, `.index.npz` in the study's folder, is a cache: the runs' files are the records, and one that is not as it
was when the index was written is read anew. It may be deleted at any time, and a folder that cannot be written does
without. It holds numbers and JSON; nothing of it is executed.

It may have come with the study, from anybody. So it is read only if this user wrote it, and believed about a file only
if size, times and inode of the file, which no copy of a folder has again, and the file's checksum are those that it
names. Its arrays are not compressed, and each is read when a file of it is as it was: what it costs is no more than its
own size.
"""

import contextlib
import os
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from normlab.common.errors import UserError
from normlab.report.study.columns import Columns, as_arrays, length
from normlab.runs import files, reading
from normlab.runs.reading import RecordPath
from normlab.runs.record import Record
from normlab.runs.rows import as_columns

NAME = ".index.npz"
VERSION = 3  # of the index, and of what `as_arrays` makes of rows: another one is not read
WORTH = 20_000  # rows read line by line, a fifth of a second, from which on writing an index pays


MOST_BYTES_OF_HEAD = 256 << 20  # the names of all files, and their lists: of ten thousand runs 2 MB

Stamp = list[Any]  # of a file of rows: size, times, inode, and the sum that its run recorded


class Index:
    """Reader of files of rows, which takes from the index those that are as they were."""

    def __init__(self, study_folder: RecordPath) -> None:
        self._folder = study_folder
        self._path = study_folder / NAME if isinstance(study_folder, Path) else None  # a packed study is read without
        self._before = _Kept(self._path) if self._path else None
        self._now: dict[str, tuple[Stamp, Columns]] = {}
        self._rows_read = 0

    def read(self, run: str, file: str, record: Record) -> tuple[Columns, list[str]]:
        """Return the columns of a file of a run's folder, and a sentence about each line that cannot be read.

        Raises:
            UserError: if the file cannot be read, or is not what the run wrote.
        """
        if not self._before:
            return _columns(self._folder / run / file, file, record)
        try:
            stat = os.lstat(f"{self._folder}/{run}/{file}")  # before it is read: later rows are for the next time
        except OSError:
            return _columns(self._folder / run / file, file, record)
        recorded = (record.sums or {}).get(file, (0, ""))
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, record.over, *recorded]
        name = f"{run}/{file}"
        columns = self._before.columns(name, stamp)
        if columns is None:
            columns, warnings = _columns(self._folder / run / file, file, record)
            if warnings:  # not kept, so that they are repeated every time
                return columns, warnings
            self._rows_read += length(columns)
        self._now[name] = stamp, columns
        return columns, []

    def write(self) -> None:
        """Keep what was read for the next time, if that pays and the folder can be written."""
        if self._before:
            self._before.close()
        if not self._path:
            return
        path, rows = self._path, sum(length(columns) for _, columns in self._now.values())
        if self._rows_read >= max(WORTH, rows // 20):  # it is written as a whole, in about the time of reading so many
            arrays = _arrays(self._now)
            with contextlib.suppress(UserError):
                files.write_atomically(path, lambda file: np.savez(file, **arrays), durable=False)


def _columns(path: RecordPath, file: str, record: Record) -> tuple[Columns, list[str]]:
    content = None
    try:
        content = reading.read(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise reading.damaged(path, error) from None
    fault = record.row_fault(path, file, content)
    if fault:
        raise fault
    columns, warnings = as_columns(path, content) if content is not None else ({}, [])
    return as_arrays(columns), warnings


def _arrays(read: Mapping[str, tuple[Stamp, Columns]]) -> dict[str, Any]:
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
    head = files.to_json({"version": VERSION, "groups": groups}).encode()
    return {"head": np.frombuffer(head, np.uint8), **arrays}


class _Kept:
    """An index as it was written before; an empty one if there is none that can be used, whatever is wrong with it."""

    def __init__(self, path: Path) -> None:
        self._open = contextlib.ExitStack()
        self._groups: list[dict[str, Any]] = []
        self._files: dict[str, tuple[int, int, Stamp, int, Columns]] = {}  # group, first row, stamp, rows, lists
        self._blocks: dict[int, Any] = {}
        with contextlib.suppress(Exception):  # it is only a cache
            file = self._open.enter_context(reading.opened(path))
            _check_index(file)
            self._arrays = self._open.enter_context(np.load(file, allow_pickle=False))
            self._read_head()

    def _read_head(self) -> None:
        head = reading.parse_json(self._arrays["head"].tobytes().decode())
        if head["version"] != VERSION:
            return
        self._groups = head["groups"]
        for i, group in enumerate(self._groups):
            start = 0
            for name, stamp, rows, lists in group["files"]:
                self._files[name] = i, start, stamp, rows, lists
                start += rows

    def columns(self, name: str, stamp: Stamp) -> Columns | None:
        """Return the columns of a file that is as it was; None of any other."""
        found = self._files.get(name)
        if found is None or found[2] != stamp:
            return None
        i, start, _, rows, lists = found
        try:
            group = self._groups[i]
            if i not in self._blocks:
                self._blocks[i] = self._arrays[str(i)]
            numbers = zip(group["numbers"], self._blocks[i][:, start : start + rows], strict=True)
            return {**dict.fromkeys(group["columns"]), **dict(numbers), **lists}
        except Exception:  # whatever is wrong with it, it is only a cache
            self._files.clear()
            return None

    def close(self) -> None:
        """Let go of the file."""
        self._open.close()


def _check_index(file: BinaryIO) -> None:
    """Check that an index is this user's, and not compressed: it then costs no more memory than its own size.

    Raises:
        ValueError, zipfile.BadZipFile: if it is not.
    """
    stat = os.fstat(file.fileno())
    if stat.st_uid != os.geteuid():
        raise ValueError("it is another user's")
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it is compressed")
    if sum(member.file_size for member in members) > stat.st_size:
        raise ValueError("its parts overlap")
    if any(member.filename == "head.npy" and member.file_size > MOST_BYTES_OF_HEAD for member in members):
        raise ValueError("its head is too large")
    file.seek(0)
