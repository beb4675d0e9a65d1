"""The setting `model.weights`: a name that the network's library knows, or a file."""

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from normlab.common.errors import UserError

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors")
DEFAULT = "DEFAULT"  # the library's own choice, of torchvision or timm


def is_file(weights: object) -> bool:
    """Return whether the setting is the path of a file: by its look, so that it is the same on every machine."""
    return isinstance(weights, str) and (weights.endswith(SUFFIXES) or os.sep in weights)


def label(weights: object) -> object:
    """Return the setting as it identifies a run: the name of a library, or of a file without the path.

    A run's own weights.pt has the name of its folder, too, as all are called so.
    """
    if not is_file(weights):
        return weights
    path = Path(str(weights))
    return "/".join(path.parts[-2:]) if path.name == "weights.pt" else path.name


def check_file(weights: str) -> Path:
    """Return the path of the file.

    Raises:
        UserError: if there is none that can be read, or it is empty.
    """
    path = Path(weights)
    remedy = "Give the path of a file that torch.save or safetensors wrote, or the name of weights of the library."
    try:
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file" if path.exists() else "not there"
            raise UserError(f"model.weights={weights} is {kind}.\n{remedy}")
        if not path.stat().st_size:
            raise UserError(f"model.weights={weights} is empty.\n{remedy}")
        with path.open("rb"):
            return path
    except (OSError, ValueError) as error:
        raise UserError(f"model.weights={weights} cannot be read: {error}.\n{remedy}") from None


def sha256(weights: str) -> str:
    """Return the SHA-256 of the file's bytes, 64 hex digits, which is taken once per process of an unchanged file.

    Raises:
        UserError: see `check_file`.
    """
    path = check_file(weights)
    return _sha256(path, *state(path))


def change(weights: str | None, recorded: object) -> str:
    """Return how the file differs from what a run recorded of its trained weights; "" if it does not, or is unknown.

    Raises:
        UserError: see `check_file`.
    """
    before = recorded.get("sha256") if isinstance(recorded, Mapping) else None
    now = sha256(weights) if before and weights and is_file(weights) else before
    return "" if now == before else f"SHA-256 {str(before)[:7]} then, {str(now)[:7]} now"


def state(path: Path) -> tuple[int, int, int]:
    """Return size and times of a file in ns, which tell whether it has been written since."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, written: int, changed: int) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"model.weights={path} cannot be read: {error}.\nStart again with a file that can.") from None
