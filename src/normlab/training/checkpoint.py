"""Checkpoints: the newest and its predecessor, written atomically, verified, read without executing anything.

The file is what torch.save writes, followed by its SHA-256: torch alone does not notice a flipped bit.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from normlab.common.errors import first_line, storage_error
from normlab.runs.files import remove_temporaries, write_atomically

NEWEST, PREVIOUS, INCOMING = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.incoming.pt"
DIGEST_BYTES = hashlib.sha256().digest_size


class _Hashing:
    """A file to write to that keeps the digest of what was written, and the error that stopped it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save_tensors(value: object, file: BinaryIO) -> bytes:
    """Save with torch.save, and return the SHA-256 of the written bytes.

    Raises:
        OSError: the file's own, of a full disk for one.
    """
    hashing = _Hashing(file)
    try:
        torch.save(value, hashing)  # type: ignore[arg-type]
    except RuntimeError:
        if hashing.error:  # torch hides it behind an error about positions in its archive
            raise hashing.error from None
        raise
    return hashing.digest.digest()


def save(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Write `checkpoint` (tensors and plain values) as the newest; the newest so far becomes the previous.

    Raises:
        UserError: if the folder cannot be written or the disk is full; both older files stay usable.
    """
    write_atomically(folder / INCOMING, lambda file: file.write(save_tensors(checkpoint, file)))
    try:
        if (folder / NEWEST).exists():
            (folder / NEWEST).replace(folder / PREVIOUS)
        (folder / INCOMING).replace(folder / NEWEST)
    except OSError as error:
        raise storage_error(folder / NEWEST, error) from error


def load(folder: Path, run_id: str, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """Return the newest checkpoint whose digest is right, or None; `warn` is called for each other one.

    For the process that holds the run: it also removes files that a killed one left half-written.
    """
    remove_temporaries(folder)
    for name in (INCOMING, NEWEST, PREVIOUS):  # INCOMING is whole: its process was killed before the renaming
        path = folder / name
        if not path.exists():
            continue
        try:
            content = path.read_bytes()
            if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
                raise ValueError("it is truncated or altered")
            checkpoint = torch.load(io.BytesIO(content[:-DIGEST_BYTES]), map_location="cpu", weights_only=True)
            if checkpoint["run_id"] != run_id:
                raise ValueError("it belongs to another run")
            return dict(checkpoint)
        except Exception as error:
            reason = first_line(error) or type(error).__name__
            warn(f"{path} cannot be used and is left out ({reason}). The run goes on from an earlier state.")
    return None


def remove(folder: Path) -> None:
    """Remove the checkpoints of a finished run: its folder then holds its record alone."""
    remove_temporaries(folder)
    for name in (INCOMING, NEWEST, PREVIOUS):
        (folder / name).unlink(missing_ok=True)
