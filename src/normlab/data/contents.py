"""Digests of files: is what lies below a folder still what it was?

`listing_digest` reads no file and is compared first. Where it differs (a copy, another time) `contents_digest` decides.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from normlab.common.cpu import cores
from normlab.common.errors import UserError

THREADS_PER_CORE = 4  # most of the time a disk or a network is waited for
CHUNK = 64  # files that a thread reads before it returns


def listing_digest(root: Path, paths: Sequence[str]) -> str:
    """Return the SHA-256 of the relative path, size and times (st_mtime_ns, st_ctime_ns) of each file; 64 hex digits.

    The last is the system's own, which a copy that keeps times (cp -p, rsync -a, tar) cannot set.

    Args:
        root: the folder that `paths` are relative to; its own path is no part of the digest.
        paths: their order counts.

    Raises:
        UserError: naming a file that is not there or cannot be read.
    """
    return _digest(_size_and_times, root, paths)


def contents_digest(root: Path, paths: Sequence[str]) -> str:
    """Return the SHA-256 of the relative path and the SHA-256 of all bytes of each file; 64 hex digits.

    A copy of a data set has the digest of the original. Several threads read.

    Args:
        root: the folder that `paths` are relative to; its own path is no part of the digest.
        paths: their order counts.

    Raises:
        UserError: naming a file that is not there or cannot be read.
    """
    return _digest(_bytes_digest, root, paths)


def _digest(describe: Callable[[Path], str], root: Path, paths: Sequence[str]) -> str:
    def part(start: int) -> bytes:
        described = ((path, describe(root / path)) for path in paths[start : start + CHUNK])
        return b"".join(os.fsencode(path) + b"\0" + fact.encode() + b"\0" for path, fact in described)

    digest = hashlib.sha256()
    with ThreadPoolExecutor(THREADS_PER_CORE * cores()) as pool:
        try:
            for described in pool.map(part, range(0, len(paths), CHUNK)):
                digest.update(described)
        except OSError as error:
            pool.shutdown(cancel_futures=True)
            raise UserError(
                f"The file {error.filename} cannot be read: {error.strerror or error}.\nReplace the file or remove it."
            ) from None
    return digest.hexdigest()


def _size_and_times(file: Path) -> str:
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _bytes_digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
