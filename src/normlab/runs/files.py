"""Files that are whole or absent: atomic writes. How they are read is `runs/reading.py`."""

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from normlab.common.errors import storage_error
from normlab.runs.reading import LARGEST_NUMBER

_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
TEMPORARY = ".tmp"  # ends the name of a file that is being written


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
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with temporary.open("x+b") as file:  # with the mode that the user's umask gives a new file
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the folder may have become read-only
            temporary.unlink()
        if isinstance(error, OSError):
            raise storage_error(path, error) from error
        raise


def open_to_append(path: Path) -> BinaryIO:
    """Open a file to append to it: not by way of a link, and of a FIFO without waiting for its reader.

    Raises:
        OSError: if it cannot be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "ab")


def remove_temporaries(folder: Path) -> None:
    """Remove temporary files of killed processes from `folder`, in which no other process may be writing."""
    with contextlib.suppress(OSError, RecursionError):  # it only takes space
        for path in folder.rglob(f".*{TEMPORARY}"):
            path.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite, or too large to be read again, by None: JSON has no NaN."""
    if isinstance(value, float) and not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
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
