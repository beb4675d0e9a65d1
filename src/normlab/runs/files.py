"""Files that are whole or absent: atomic writes, and reads that never execute anything."""

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import yaml

from normlab.common.errors import UserError, first_line, storage_error

_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NEXT_KEY = re.compile(r"(?<=\n)(?=[a-zA-Z_])")  # in the outermost mapping: the dumper indents what belongs to a key
MOST_VALUES = 10_000  # of each key of a record in YAML, and
MOST_KEYS = 200  # keys: a configuration has 150 values in 40
TEMPORARY = ".tmp"  # ends the name of a file that is being written


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


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless they exist.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(path, error) from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, durable: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path` in one step.

    `durable` waits until the disk has it, so that a power cut leaves the old file or the new one.

    Raises:
        UserError: if the folder cannot be written or the disk is full. The old file is untouched.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY, delete=False
        ) as file:
            temporary = Path(file.name)
            write(file)  # type: ignore[arg-type]
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException as error:
        if temporary:
            with contextlib.suppress(OSError):  # the folder may have become read-only
                temporary.unlink()
        if isinstance(error, OSError):
            raise storage_error(path, error) from error
        raise


def remove_temporaries(folder: Path) -> None:
    """Remove temporary files of killed processes from `folder`, in which no other process may be writing."""
    with contextlib.suppress(OSError):  # it only takes space
        for path in folder.rglob(f".*{TEMPORARY}"):
            path.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, as JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def to_json(value: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Return a mapping as JSON, with null for numbers that are not finite."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write a mapping as JSON (see `write_atomically`)."""
    write_atomically(path, lambda file: file.write((to_json(value, indent=1) + "\n").encode()), durable=durable)


def write_yaml(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as YAML (see `write_atomically`)."""
    text = yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    write_atomically(path, lambda file: file.write(text.encode()))


def read_yaml(path: RecordPath, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Read a mapping; `parse` is `parse_yaml`, or calls it.

    Raises:
        UserError: if the file cannot be read or holds no mapping.
    """
    try:
        value = parse(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise damaged(path, error) from None
    if not isinstance(value, dict):
        raise damaged(path, "it holds no settings")
    return value


def parse_yaml(text: str) -> Any:
    """Return the value of a text in YAML; equal parts of texts share theirs, which are to be read only."""
    return _parts(text) or _part(text)


def _parts(text: str) -> dict[str, Any]:
    """Read a mapping key by key, as runs of a study share most parts and YAML is slow; empty if it is no such text."""
    value: dict[str, Any] = {}
    try:
        for part in map(_part, _NEXT_KEY.split(text)):
            if not isinstance(part, dict):
                return {}
            value |= part
            if len(value) > MOST_KEYS:
                raise ValueError(f"it has more than {MOST_KEYS} keys")
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value


@lru_cache(maxsize=4096)
def _part(text: str) -> Any:
    value = yaml.load(text, Loader=_Loader)
    left, seen = [value], 0
    while left:  # an alias stands for all that it names, which can be a part of itself
        each = left.pop()
        left += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        seen += 1
        if seen + len(left) > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES} values")
    return value


def read_json(path: RecordPath) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: if the file cannot be read or holds no JSON object.
    """
    try:
        value = json.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from None
    if not isinstance(value, dict):
        raise damaged(path, "it holds no JSON object")
    return value


def damaged(path: RecordPath, why: object) -> UserError:
    """Return the error for a file of a run that cannot be read."""
    reason = first_line(why) or type(why).__name__
    if isinstance(path, Path):
        fix = f"Move the folder {path.parent} away and run the same command again to repeat this run."
    else:
        fix = "It was so when the study was packed. Whoever packed it has to repeat this run."
    return UserError(f"{path} cannot be read: {reason}.\n{fix}")
