"""Import objects by the dotted paths in a user's configuration."""

import importlib
import sys
from pathlib import Path
from typing import Any

from normlab.common.errors import UserError, did_you_mean


def locate(dotted: str, setting: str) -> Any:
    """Import the object that `dotted` names; the current folder is importable.

    Raises:
        UserError: naming the setting, if there is no such module or name, or importing it fails.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    module_name, _, name = dotted.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"{setting}={dotted}: importing {module_name} failed: {type(error).__name__}: {error}.\n"
            "It must be importable from the current folder or be installed in this environment."
        ) from error
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        hint = did_you_mean(name, public, f"{setting}={module_name}.")
        raise UserError(f"{setting}={dotted}: {module_name} has no {name}.{hint}")
    return getattr(module, name)
