"""The files of a folder that cannot be read, which `dataset.skip_unreadable` leaves out: found once, by decoding."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from normlab.common.cpu import cores
from normlab.common.download import with_progress
from normlab.common.errors import UserError, first_line, listed
from normlab.data.contents import listing_digest
from normlab.data.damage import may_pass
from normlab.data.folders import NAMED, shown
from normlab.runs.files import write_atomically

FORMAT = 1  # of what is kept; raise it when the same files would be judged otherwise
CHUNK = 512  # images between two looks at the clock


def known(root: Path, paths: tuple[str, ...], data_dir: Path) -> frozenset[str] | None:
    """Return the files that were found to be unreadable when the folder's listing was as it is now; None if unknown."""
    return _read(remembered(root, paths, data_dir), paths)


def find(
    root: Path, paths: tuple[str, ...], no_files: frozenset[str], data_dir: Path, log: Callable[[str], None]
) -> frozenset[str]:
    """Return the files that cannot be decoded, from below `data_dir` if they are known, else by decoding all.

    Of several processes at once, one decodes.

    Raises:
        UserError: `data_dir` cannot be written, the files change meanwhile, or what one cannot be read for may pass.
    """
    from normlab.data.cache import locked  # imports torch

    kept = _kept(root, paths, data_dir)
    found = _read(kept, paths)
    if found is None:
        with locked(kept.with_suffix(".lock"), log):
            found = _read(kept, paths)
            if found is None:
                found = no_files.union(_undecodable(root, [path for path in paths if path not in no_files], log))
                if kept != _kept(root, paths, data_dir):
                    raise UserError(f"The images in {root} changed while they were read.\nStart again.")
                content = json.dumps(sorted(found)).encode("ascii")  # escapes whatever a name has
                write_atomically(kept, lambda file: file.write(content))
    return found


def _undecodable(root: Path, paths: list[str], log: Callable[[str], None]) -> list[str]:
    from normlab.data.images import read

    def is_damaged(path: str) -> bool:
        try:
            read(root / path, value_range=(0.0, 1.0))
        except UserError as error:
            if may_pass(error.__context__):
                raise UserError(
                    f"{first_line(error)}\nThat may be the disk's fault and not the file's, so it is not left out.\n"
                    "Start again; if it stays, replace the file or remove it."
                ) from None
            return True
        return False

    text = f"Looking for files of {root.name} that cannot be read, once: {{:,}} of {len(paths):,}".format
    found: list[str] = []
    with ThreadPoolExecutor(cores()) as pool, warnings.catch_warnings(action="ignore"):  # Pillow's remarks
        for chunk in with_progress([paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)], text, log):
            found += [path for path, damaged in zip(chunk, pool.map(is_damaged, chunk), strict=True) if damaged]
    return found


def remark(root: Path, left_out: tuple[str, ...], images: int) -> str:
    """Return the sentence about files that are left out of so many images."""
    one = len(left_out) == 1
    return (
        f"{len(left_out):,} of {images:,} images of {root} ({100 * len(left_out) / images:.2g} %) cannot be read and"
        f" {'is' if one else 'are'} left out (dataset.skip_unreadable): {listed([*map(shown, left_out)], NAMED)}."
    )


def _kept(root: Path, paths: tuple[str, ...], data_dir: Path) -> Path:
    described = (FORMAT, version("pillow"), os.fsencode(root.resolve()), listing_digest(root, paths, lenient=True))
    return data_dir / "cache" / f"unreadable-{hashlib.sha256(repr(described).encode()).hexdigest()}.json"


remembered = lru_cache(maxsize=8)(_kept)  # a sweep checks every run


def _read(kept: Path, paths: tuple[str, ...]) -> frozenset[str] | None:
    try:
        found = frozenset(json.loads(kept.read_text(encoding="ascii")))
    except (OSError, ValueError, TypeError, RecursionError):  # none, or a damaged one
        return None
    return found if found <= set(paths) else None
