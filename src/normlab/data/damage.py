"""Damaged image files, found before a run starts, as far as that is cheap; without torch."""

import errno
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from normlab.common.cpu import cores
from normlab.common.errors import UserError
from normlab.data.folders import shown

if TYPE_CHECKING:  # Pillow is imported where an image is opened
    from PIL import Image

MOST_FILES = 10_000  # whose ends are read, in half a second; of more files as many, evenly spread
MOST_DECODED = 64  # that have no end to be checked, evenly spread
END_BYTES = 64
OF_FILES = {  # errors that a file has for good; others are of the disk, the network or the machine, and may pass
    None,  # of Pillow, about contents
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENXIO,
    errno.EINVAL,
}
REMEDY = "Replace the file or remove it. Or leave out all that cannot be read: dataset.skip_unreadable=true."


def check(root: Path, paths: tuple[str, ...], no_files: frozenset[str]) -> None:
    """Check that none of the files is found to be damaged.

    Raises:
        UserError: naming the files.
    """
    if damaged := find(root, paths, no_files):
        (_, reason), *others = damaged.items()
        more = f"\n{len(others)} more cannot be read, e.g. {shown(others[0][0])}." if others else ""
        raise UserError(f"{reason}{more}")


@lru_cache(maxsize=8)  # a sweep checks every run
def find(root: Path, paths: tuple[str, ...], no_files: frozenset[str]) -> Mapping[str, str]:
    """Check that files end as their format does, and decode those that do not, and some whose format has no end.

    Cut and empty files are found, and files that are no images. Damage in the middle is found on decoding.

    Args:
        root: the folder that paths are relative to.
        paths: of all images.
        no_files: of these, pipes, devices and links to nowhere.

    Returns:
        a sentence why a file cannot be read, by its path.
    """
    looked_at = _spread([path for path in paths if path not in no_files], MOST_FILES)
    with ThreadPoolExecutor(4 * cores()) as pool:
        ends = list(pool.map(lambda path: _has_its_end(root / path), looked_at))
    cut = [path for path, whole in zip(looked_at, ends, strict=True) if whole is False]
    unknown = [path for path, whole in zip(looked_at, ends, strict=True) if whole is None]
    odd = "it is a pipe, a device or a link that leads nowhere"
    return {path: _refusal(root / path, odd) for path in sorted(no_files)} | {
        path: reason
        for path in (*_spread(cut, MOST_DECODED), *_spread(unknown, MOST_DECODED))
        if (reason := _damage(root / path))
    }


def _spread(paths: Sequence[str], most: int) -> Sequence[str]:
    return paths[:: -(-len(paths) // most)] if paths else paths


def _has_its_end(file: Path) -> bool | None:
    """Return whether a file ends as its format does; None if that cannot be told from its ends."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(0)
            head = opened.read(END_BYTES)
            opened.seek(max(0, size - END_BYTES))
            tail = opened.read()
    except OSError:
        return False
    if head.startswith(b"\xff\xd8"):
        return tail.rstrip(b"\0").endswith(b"\xff\xd9")
    if head.startswith(b"\x89PNG"):
        return b"IEND" in tail
    if head.startswith(b"GIF8"):
        return tail.endswith(b";")
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8 <= size
    if head.startswith((b"II*\0", b"MM\0*", b"BM", b"P")):
        return None
    return False


def _damage(file: Path) -> str:
    """Return why an image cannot be decoded; "" if it can."""
    with warnings.catch_warnings(action="ignore"):  # Pillow's remarks on odd files that it does read
        try:
            with open_image(file) as image:
                image.load()
        except UserError as error:
            return str(error)
    return ""


@contextmanager
def open_image(path: Path) -> Iterator["Image.Image"]:
    """Open an image file, whose header alone is read at first.

    Raises:
        UserError: naming the file, if it cannot be opened, or not be decoded inside the context.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow's plugins raise whatever their parsing meets
        reason = "it is not an image that Pillow knows" if "cannot identify" in str(error) else str(error)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else reason
        reason = "it is empty" if path.is_file() and not path.stat().st_size else reason
        raise UserError(_refusal(path, reason or type(error).__name__)) from None


def may_pass(error: BaseException | None) -> bool:
    """Return whether what a file could not be read for may be over when it is read again."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in OF_FILES)


def _refusal(path: Path, reason: str) -> str:
    return f"The image {shown(str(path))} cannot be read: {reason}.\n{REMEDY}"
