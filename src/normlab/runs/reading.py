"""The one place where a file of a study is opened to be read: whatever lies there, in bounded time and memory.

A study may come from anybody. Only regular files are read: no links, which could lead to any file of this machine, no
FIFOs, devices and sockets, which may never end. Sizes are limited by the kind of file; so are depth, number and kinds
of the values that its text stands for. Nothing is executed.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self, TypeVar

import yaml

from normlab.common.errors import UserError, first_line

MOST_BYTES_OF_ROWS = 64 << 20  # of a file of rows, or of a table; a hundred thousand evaluations
MOST_BYTES_OF_FILE = 1 << 20  # of another one; a configuration has 1 kB
MOST_VALUES = 10_000  # of each key of a record in YAML, and
MOST_KEYS = 200  # keys: a configuration has 150 values in 40
MOST_DEPTH = 50  # of lists and mappings within each other
MOST_MARKS = 100_000  # signs that can begin a value in YAML, each of which costs memory while it is read
MOST_KEPT = 20_000  # characters of a text whose value is kept for equal ones: a hostile study must not fill the memory
LARGEST = 2**63  # whole numbers are below it: what computes with them takes no more
LARGEST_NUMBER = 1e150  # of a row: its square, and what a figure adds to an axis, are numbers still
_MARKS = ",:[{-?&*\n"

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}
_TEXT, _WHOLE, _DATE = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "timestamp"))
_NEXT_KEY = re.compile(r"(?<=\n)(?=[a-zA-Z_])")  # in the outermost mapping: the dumper indents what belongs to a key
_DIGITS = 30  # of a whole number
FAULTS = (OSError, ValueError, RecursionError, MemoryError, yaml.YAMLError)


class RecordPath(Protocol):
    """What reading records takes of a Path: a Path, or a part of a study in one file (`runs/archive.py`)."""

    @property
    def name(self) -> str:
        """The last part of the path."""

    @property
    def stem(self) -> str:
        """The name without its suffix."""

    def __truediv__(self, name: str, /) -> Self: ...
    def exists(self) -> bool:
        """Return whether there is such a file or folder."""

    def iterdir(self) -> Iterator[Self]:
        """Yield what a folder holds."""

    def read_bytes(self) -> bytes:
        """Return the contents of a file."""


P = TypeVar("P", bound=RecordPath)


class NotReadError(OSError):
    """What is there is not read: it is no regular file or folder, or too large."""


def most_bytes(name: str) -> int:
    """Return the size up to which a file of that name is read."""
    return MOST_BYTES_OF_ROWS if name.endswith((".jsonl", ".csv")) else MOST_BYTES_OF_FILE


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file, not by way of a link and without waiting for anybody.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        NotReadError: if it is no regular file.
        OSError: if it cannot be read.
    """
    with os.fdopen(_descriptor(os.fspath(path))[0], "rb", buffering=0) as file:
        yield file


def _descriptor(path: str) -> tuple[int, int]:
    """Return a descriptor of a regular file, and its size."""
    try:
        found = os.open(path, _OPEN)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotReadError(error.errno, "it is a link, and links are not followed") from None
        if error.errno == errno.ENXIO:
            raise NotReadError(error.errno, "it is no file") from None
        raise
    facts = os.fstat(found)
    if not stat.S_ISREG(facts.st_mode):
        os.close(found)
        raise NotReadError(errno.EINVAL, "it is a folder" if stat.S_ISDIR(facts.st_mode) else "it is no file")
    return found, facts.st_size


def read(path: RecordPath, most: int | None = None) -> bytes:
    """Return the contents of a file of a study.

    Args:
        path: the file.
        most: the size up to which it is read; by default that of files of its name.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        NotReadError: if it is no regular file, or larger.
        OSError: if it cannot be read.
    """
    most = most_bytes(path.name) if most is None else most
    if not isinstance(path, Path):
        return path.read_bytes()  # not above the bounds of archive.py, which are these
    descriptor, size = _descriptor(os.fspath(path))
    try:
        if size > most:
            raise NotReadError(errno.EFBIG, f"it has {size} bytes, and at most {most} are read")
        content = os.read(descriptor, size)  # what comes meanwhile is for the next time
        while len(content) < size and (more := os.read(descriptor, size - len(content))):
            content += more
    finally:
        os.close(descriptor)
    return content


def read_end(path: Path, most: int) -> tuple[bytes, int]:
    """Return the last `most` bytes of a file of a study, and its size.

    Raises:
        OSError: as of `read`.
    """
    with opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - most))
        return file.read(most), size


def is_there(path: RecordPath) -> bool:
    """Return whether there is anything of that name, if only a link that leads nowhere."""
    return os.path.lexists(path) if isinstance(path, Path) else path.exists()


def listed(folder: P) -> list[P]:
    """Return what a folder holds; nothing of one that does not exist.

    Raises:
        NotReadError: if it is a link, or no folder.
        OSError: if it cannot be read.
    """
    if not isinstance(folder, Path):
        return list(folder.iterdir())
    try:
        found = os.open(folder, _OPEN | os.O_DIRECTORY)
    except FileNotFoundError:
        return []
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        why = "it is a link, and links are not followed" if folder.is_symlink() else "it is no folder"
        raise NotReadError(error.errno, why) from None
    try:
        return [folder / name for name in os.listdir(found)]  # noqa: PTH208  # of what was opened
    finally:
        os.close(found)


def shown(text: object) -> str:
    """Return a path or a value from disk on one line that any terminal and file can show."""
    short = str(text)
    short = short if len(short) <= 300 else f"{short[:300]} ..."
    if short.isprintable():
        return short
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in short)


def damaged(path: RecordPath, why: object) -> UserError:
    """Return the error for a file of a run that cannot be read."""
    reason = (why.strerror if isinstance(why, OSError) else None) or first_line(why) or type(why).__name__
    return UserError(f"{shown(path)} cannot be read: {shown(reason)}.\n{remedy(path)}")


def remedy(path: RecordPath) -> str:
    """Return what helps against a damaged file of a run."""
    if isinstance(path, Path):
        return f"Move the folder {shown(path.parent)} away and run the same command again to repeat this run."
    return "It was so when the study was packed. Whoever packed it has to repeat this run."


# ---- JSON


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


_decode = json.JSONDecoder(parse_constant=_no_number).decode


def parse_json(text: str) -> Any:
    """Return the value of a text in JSON.

    Raises:
        ValueError, RecursionError: for what is none, has NaN or infinite numbers, or is too deep.
    """
    return _decode(text)


def read_json(path: RecordPath) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: if the file cannot be read or holds no JSON object.
    """
    return json_object(path, contents(path))


def contents(path: RecordPath) -> bytes:
    """Return what `read` does.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        return read(path)
    except OSError as error:
        raise damaged(path, error) from None


def json_object(path: RecordPath, content: bytes) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        UserError: if that is none.
    """
    try:
        value = parse_json(content.decode())
        check_values(value)
    except FAULTS as error:
        raise damaged(path, error) from None
    if not isinstance(value, dict):
        raise damaged(path, "it holds no JSON object")
    return value


def check_values(value: Any) -> None:
    """Check depth and numbers of what JSON gave.

    Raises:
        ValueError: if it is deeper than `MOST_DEPTH`, or has a number that is too large.
    """
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise ValueError(f"it is more than {MOST_DEPTH} deep")
        below: list[Any] = []
        for each in level:
            kind = type(each)
            if kind is dict:
                below += each.values()
            elif kind is list:
                below += each
            elif kind is int and not -LARGEST < each < LARGEST:
                raise ValueError("it has a whole number of more than 63 bits")
            elif kind is float and not -float("inf") < each < float("inf"):
                raise ValueError("it has a number that is not finite")
        level = below


# ---- YAML


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a file of this package.

    Raises:
        UserError: if the file cannot be read or holds no mapping.
    """
    try:
        value = parse_yaml(path.read_bytes().decode())  # a package may be installed by way of links
    except FAULTS as error:
        raise damaged(path, error) from None
    if not isinstance(value, dict):
        raise damaged(path, "it holds no settings")
    return value


def parse_yaml(text: str, *, dates: bool = False) -> Any:
    """Return the value of a text in YAML; equal parts of texts share theirs, which are to be read only.

    It is made of mappings with texts as keys, lists, texts, numbers, true, false and null; with `dates` also of these.

    Raises:
        ValueError, RecursionError, yaml.YAMLError: for a text that is none, holds other things, or is too large.
    """
    return _parts(text, dates=dates) or _part(text, dates)


def _parts(text: str, *, dates: bool) -> dict[str, Any]:
    """Read a mapping key by key, as runs of a study share most parts and YAML is slow; empty if it is no such text."""
    value: dict[str, Any] = {}
    try:
        for text_of_part in _NEXT_KEY.split(text):
            part = _part(text_of_part, dates)
            if not isinstance(part, dict):
                return {}
            value |= part
            if len(value) > MOST_KEYS:
                raise ValueError(f"it has more than {MOST_KEYS} keys")
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value


def _part(text: str, dates: bool) -> Any:
    return _kept_part(text, dates) if len(text) <= MOST_KEPT else _read_part(text, dates)


def _read_part(text: str, dates: bool) -> Any:
    if sum(map(text.count, _MARKS)) > MOST_MARKS:
        raise ValueError(f"it has more than {MOST_VALUES} values")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, _TAGS | {_DATE} if dates else _TAGS)
        value = loader.construct_document(node)
        check_values(value)
        return value
    except (LookupError, TypeError, AttributeError) as error:  # PyYAML's, of a value that is not of the kind it names
        raise ValueError(f"it holds an odd value ({type(error).__name__})") from None
    finally:
        loader.dispose()


_kept_part = lru_cache(maxsize=4096)(_read_part)


def _check_nodes(root: yaml.Node, tags: Collection[str]) -> None:
    """Check what a text in YAML is made of before values are made of it: an alias stands for all that it names."""
    level, seen, depth = [root], 0, 0
    while level:
        depth += 1
        seen += len(level)
        if seen > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES} values")
        if depth > MOST_DEPTH:
            raise ValueError(f"it is more than {MOST_DEPTH} deep")
        below: list[yaml.Node] = []
        for node in level:
            if node.tag not in tags:
                raise ValueError(f"it holds a value of the kind {node.tag.rpartition(':')[2]}")
            if isinstance(node, yaml.MappingNode):
                if any(key.tag != _TEXT for key, _ in node.value):
                    raise ValueError("it has a key that is no text")
                below += (value for _, value in node.value)
            elif isinstance(node, yaml.SequenceNode):
                below += node.value
            elif node.tag == _WHOLE and len(node.value) > _DIGITS:
                raise ValueError("it has a whole number of too many digits")
            if len(below) > MOST_VALUES:
                raise ValueError(f"it has more than {MOST_VALUES} values")
        level = below
