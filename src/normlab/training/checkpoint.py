"""Checkpoints: the newest and its predecessor, written atomically, verified, read without executing anything.

The file is what torch.save writes, followed by its SHA-256: torch alone does not notice a flipped bit. A digest says
nothing of what the file holds: `read` checks its form, and `training.resume` that it fits the run.
"""

import hashlib
import io
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch
from torch import Tensor, nn

from normlab.common.errors import first_line, storage_error
from normlab.models import pretrained
from normlab.runs.files import remove_temporaries, write_atomically
from normlab.runs.shorter import KEPT

NEWEST, PREVIOUS, INCOMING = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.incoming.pt"
DIGEST_BYTES = hashlib.sha256().digest_size
MOST_THREADS = 4096  # that a checkpoint may ask for
_FORM: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("run_id", "data_fingerprint", "memory_format"), str),
    **dict.fromkeys(("network", "optimizer", "scaler", "probes", "position"), dict),
    **dict.fromkeys(("threads", "processes", "peak_memory_bytes"), int),
    "averaged": (dict, type(None)),
}
_OF_SOME = {"exemplar_ranks"}  # of runs that choose their memory; `resume` compares it with theirs


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
    _write(folder / INCOMING, checkpoint)
    try:
        if (folder / NEWEST).exists():
            (folder / NEWEST).replace(folder / PREVIOUS)
        (folder / INCOMING).replace(folder / NEWEST)
    except OSError as error:
        raise storage_error(folder / NEWEST, error) from error


def keep(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Write the checkpoint that a run keeps when it is done.

    Raises:
        UserError: if the folder cannot be written or the disk is full.
    """
    _write(folder / KEPT, checkpoint)


def _write(path: Path, checkpoint: dict[str, Any]) -> None:
    write_atomically(path, lambda file: file.write(save_tensors(checkpoint, file)))


def load(folder: Path, run_id: str, warn: Callable[[str], None]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the checkpoints that can be read, the newest first; `warn` is called for each other one.

    For the process that holds the run: it also removes files that a killed one left half-written.
    """
    remove_temporaries(folder)
    for name in (INCOMING, NEWEST, PREVIOUS):  # INCOMING is whole: its process was killed before the renaming
        path = folder / name
        if path.exists() or path.is_symlink():
            try:
                checkpoint = read(path, run_id)
            except ValueError as error:
                warn(left_out(path, error))
            else:
                yield path, checkpoint


def left_out(path: Path, why: object) -> str:
    """Return the sentence about a checkpoint that is not used."""
    return f"{path} cannot be used and is left out ({why}). An earlier one is tried, or the run starts anew."


def read(path: Path, run_id: str) -> dict[str, Any]:
    """Return the checkpoint in a file; nothing of it is executed, and it takes no more memory than the file is long.

    Raises:
        ValueError: if it is no checkpoint of that run, in words.
    """
    try:
        content = _content(path)
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes make of zipfile and torch
        raise ValueError(first_line(error) or type(error).__name__) from None
    if not isinstance(checkpoint, dict):
        raise ValueError("it holds no checkpoint")
    for key, kind in _FORM.items():
        if key not in checkpoint:
            raise ValueError(f"it lacks {key}")
        if not isinstance(checkpoint[key], kind) or isinstance(checkpoint[key], bool):
            raise ValueError(f"its {key} is of another kind")
    if unknown := checkpoint.keys() - _FORM.keys() - _OF_SOME:
        raise ValueError(f"it has {len(unknown)} unknown keys")
    if checkpoint["run_id"] != run_id:
        raise ValueError("it belongs to another run")
    if not (1 <= checkpoint["threads"] <= MOST_THREADS and checkpoint["processes"] >= 1):
        raise ValueError("its threads or processes are out of range")
    if checkpoint["memory_format"] not in ("contiguous", "channels_last"):
        raise ValueError("its memory_format is unknown")
    if not 0 <= checkpoint["peak_memory_bytes"] < 2**63:
        raise ValueError("its peak_memory_bytes is out of range")
    return checkpoint


def _content(path: Path) -> bytes:
    """Return the bytes before the digest, which is right, of an archive of torch that holds nothing compressed."""
    facts = path.lstat()
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("it is no file")
    if facts.st_size > psutil.virtual_memory().total:
        raise ValueError("it is larger than this machine's memory")
    content = path.read_bytes()
    if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        raise ValueError("it is truncated or altered")
    content = content[:-DIGEST_BYTES]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, as no checkpoint is")
    if sum(entry.file_size for entry in entries) > len(content):
        raise ValueError("its parts are longer than the file")
    return content


def evaluated_weights(path: Path, run_id: str, digest: object) -> dict[str, Any]:
    """Return the weights that the run of a kept checkpoint was evaluated with: the average of its own, or its own.

    Args:
        digest: `weights_sha256` of its own, as recorded.

    Raises:
        ValueError: if the checkpoint cannot be used, in words.
    """
    content = read(path, run_id)
    network, averaged = content["network"], content["averaged"]
    if not all(isinstance(value, Tensor) for value in network.values()) or pretrained.digest(network) != digest:
        raise ValueError("it has other weights than its run ended with")
    if averaged is None:
        return dict(network)
    return {name.removeprefix("module."): value for name, value in averaged.items() if name.startswith("module.")}


def save_weights(path: Path, weights: dict[str, Any]) -> None:
    """Write a network's state_dict.

    Raises:
        UserError: if the folder cannot be written or the disk is full.
    """
    write_atomically(path, lambda file: save_tensors(weights, file))


def remove(folder: Path) -> None:
    """Remove the checkpoints of a finished run but the one that it keeps: its folder then holds its record."""
    remove_temporaries(folder)
    for name in (INCOMING, NEWEST, PREVIOUS):
        (folder / name).unlink(missing_ok=True)


def weights_sha256(network: nn.Module) -> str:
    """Return a digest of every parameter and buffer, equal exactly for bit-identical networks."""
    return pretrained.digest(network.state_dict())
