"""Import objects by the dotted paths in a user's configuration."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from normlab.common import frozen
from normlab.common.errors import UserError, did_you_mean


def search_path() -> list[str]:
    """Return where imports are searched: first in the current folder, but in a job after its snapshot of code."""
    here, first = str(Path.cwd()), 1 if frozen.folder() else 0
    return sys.path if here in sys.path else [*sys.path[:first], here, *sys.path[first:]]


def locate(dotted: str, setting: str) -> Any:
    """Import the object that `dotted` names: of a module, or inside of a class. The current folder is importable.

    Raises:
        UserError: naming the setting, if there is no such module or name, or importing it fails.
    """
    sys.path[:] = search_path()
    found: Any
    found, path = _module(dotted, setting)
    for name in dotted.removeprefix(f"{path}.").split("."):
        if not hasattr(found, name):
            public = [each for each in vars(found) if not each.startswith("_")] if hasattr(found, "__dict__") else []
            hint = did_you_mean(name, public, f"{setting}={path}.")
            raise UserError(f"{setting}={dotted}: {path} has no {name}.{hint}")
        found, path = getattr(found, name), f"{path}.{name}"
    return found


def _module(dotted: str, setting: str) -> tuple[ModuleType, str]:
    """Import the longest part of `dotted` that is a module, its last name left out; return it with that part."""
    name = dotted.rpartition(".")[0]
    while True:
        try:
            return importlib.import_module(name), name
        except Exception as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing and "." in missing and f"{name}.".startswith(f"{missing}."):  # it may be a class
                name = missing.rpartition(".")[0]
                continue
            raise UserError(
                f"{setting}={dotted}: importing {name} failed: {type(error).__name__}: {error}.\n"
                "It must be importable from the current folder or be installed in this environment."
            ) from error
