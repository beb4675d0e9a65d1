"""Digests of image files: cheap ones of their listing, and those of all their bytes."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from normlab.common.cpu import cores


def listing_digest(root: Path, paths: Sequence[str]) -> str:
    """Return the SHA-256 of the relative path, size and time of change of each file."""
    digest = hashlib.sha256()
    for path in paths:
        status = (root / path).stat()
        digest.update(repr((path, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def contents_digest(root: Path, paths: Sequence[str]) -> str:
    """Return the SHA-256 of the relative path and the SHA-256 of the bytes of each file."""

    def of_file(path: str) -> bytes:
        with (root / path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    digest = hashlib.sha256()
    with ThreadPoolExecutor(cores()) as pool:
        for path, found in zip(paths, pool.map(of_file, paths), strict=True):
            digest.update(repr((path, found.hex())).encode())
    return digest.hexdigest()
