"""Digests of files: is what lies below a folder still what it was?

`listing_digest` reads no file and is compared first. Where it differs (a copy, another time) `contents_digest` decides.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from normlab.common.cpu import cores
from normlab.common.errors import UserError
from normlab.data.damage import REMEDY, may_pass
from normlab.data.folders import shown
from normlab.runs.files import make_folder, write_atomically

THREADS_PER_CORE = 4  # most of the time a disk or a network is waited for
CHUNK = 64  # files that a thread reads before it returns


def listing_digest(root: Path, paths: Sequence[str], *, lenient: bool = False) -> str:
    """Return the SHA-256 of the relative path, size and times (st_mtime_ns, st_ctime_ns) of each file; 64 hex digits.

    The last is the system's own, which a copy that keeps times (cp -p, rsync -a, tar) cannot set.

    Args:
        root: the folder that `paths` are relative to; its own path is no part of the digest.
        paths: their order counts.
        lenient: that a file is not there or cannot be read is a fact about it, and no error.

    Raises:
        UserError: naming a file that is not there or cannot be read.
    """
    return _digest(_size_and_times, root, paths, lenient=lenient)


def contents_digest(root: Path, paths: Sequence[str], *, lenient: bool = False) -> str:
    """Return the SHA-256 of the relative path and the SHA-256 of all bytes of each file; 64 hex digits.

    A copy of a data set has the digest of the original. Several threads read.

    Args:
        root: the folder that `paths` are relative to; its own path is no part of the digest.
        paths: their order counts.
        lenient: as of `listing_digest`.

    Raises:
        UserError: naming a file that is not there or cannot be read.
    """
    return _digest(_bytes_digest, root, paths, lenient=lenient)


def known_contents_digest(
    root: Path,
    paths: Sequence[str],
    data_dir: Path,
    log: Callable[[str], None] = lambda sentence: None,
    *,
    lenient: bool = False,
) -> str:
    """Return the `contents_digest`, from below `data_dir` if it was taken there of the same folder at an equal listing.

    Args:
        root: the folder that `paths` are relative to. Its real path is part of what is kept.
        paths: their order counts.
        data_dir: where the digest is kept, in cache/.
        log: called with a sentence before the files are read.
        lenient: as of `listing_digest`.

    Raises:
        UserError: naming a file that is not there or cannot be read.
    """
    key = hashlib.sha256(os.fsencode(f"{root.resolve()} {listing_digest(root, paths, lenient=lenient)}")).hexdigest()
    kept = data_dir / "cache" / f"contents-{key}"
    with contextlib.suppress(OSError):
        digest = kept.read_text(encoding="ascii", errors="replace")
        if len(digest) == len(key):
            return digest
    log(f"Reading the {len(paths):,} files of {root}, once, to know them again.")
    digest = contents_digest(root, paths, lenient=lenient)
    with contextlib.suppress(UserError):  # a folder that cannot be written: the files are read again
        make_folder(kept.parent)
        write_atomically(kept, lambda file: file.write(digest.encode()))
    return digest


def _digest(describe: Callable[[Path], str], root: Path, paths: Sequence[str], *, lenient: bool) -> str:
    def fact(path: str) -> str:
        try:
            return describe(root / path)
        except OSError as error:
            if not lenient or may_pass(error):
                error.filename = root / path  # which reading does not tell
                raise
            return f"cannot be read: {errno.errorcode.get(error.errno or 0)}"

    def part(start: int) -> bytes:
        described = ((path, fact(path)) for path in paths[start : start + CHUNK])
        return b"".join(os.fsencode(path) + b"\0" + told.encode() + b"\0" for path, told in described)

    digest = hashlib.sha256()
    with ThreadPoolExecutor(THREADS_PER_CORE * cores()) as pool:
        try:
            for described in pool.map(part, range(0, len(paths), CHUNK)):
                digest.update(described)
        except OSError as error:
            pool.shutdown(cancel_futures=True)
            raise UserError(
                f"The file {shown(str(error.filename))} cannot be read: {error.strerror or error}.\n{REMEDY}"
            ) from None
    return digest.hexdigest()


def _size_and_times(file: Path) -> str:
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _bytes_digest(file: Path) -> str:
    if not file.is_file():  # to open a pipe would wait for its other end
        raise OSError(errno.ENOENT, "No such file", str(file))
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
