"""Checkpoints: the newest and its predecessor, written atomically, read without executing anything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from normlab.runs.files import storage_error, write_atomically

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def save(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Write `checkpoint` (tensors and plain values) as the newest; the newest so far becomes the previous.

    Raises:
        UserError: if the folder cannot be written or the disk is full; both older files stay usable.
    """
    incoming = folder / "checkpoint.incoming.pt"
    write_atomically(incoming, lambda file: torch.save(checkpoint, file))
    try:
        if (folder / NEWEST).exists():
            (folder / NEWEST).replace(folder / PREVIOUS)
        incoming.replace(folder / NEWEST)
    except OSError as error:
        raise storage_error(folder / NEWEST, error) from error


def load(folder: Path, run_id: str, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None. `warn` is told of each that cannot."""
    for name in (NEWEST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            if checkpoint["run_id"] != run_id:
                raise ValueError("it belongs to another run")
            return dict(checkpoint)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warn(f"{path} cannot be used and is left out ({reason}). The run goes on from an earlier state.")
    return None


def remove(folder: Path) -> None:
    for name in (NEWEST, PREVIOUS, "checkpoint.incoming.pt"):
        (folder / name).unlink(missing_ok=True)
