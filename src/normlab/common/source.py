"""The user's own code: its modules, and their digests, read from the source and not executed.

Own are the module of a network or norm and all that it imports from the user's folders, directly and through others.
The whole file of each counts, without comments, formatting and docstrings. Installed packages, the standard library and
normlab itself are left out: their versions are recorded. Imports computed at run time and files that the code reads are
not seen.
"""

import ast
import contextlib
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from normlab.common import frozen
from normlab.common.imports import search_path

_INSTALLED = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
# Of the user, of the system, or of a cluster's module that sets PYTHONPATH: not in the paths of a virtual environment.
_OF_PACKAGES = {"site-packages", "dist-packages"}
NORMLAB = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class OwnModule:
    """A module in the user's folders.

    Attributes:
        file: its source, or its compiled code; links are followed.
        folder: where it was found, which is another folder than the file's if it is a link.
        package: whether modules can be inside of it.
        code: SHA-256 of its code, comments left out; empty for compiled code.
    """

    file: Path
    folder: Path
    package: bool
    code: str = ""


def is_installed(path: Path) -> bool:
    """Return whether a file, its links resolved, belongs to the interpreter or to an installed package."""
    return not _OF_PACKAGES.isdisjoint(path.parts) or any(path.is_relative_to(folder) for folder in _INSTALLED)


def own_code(dotted: str) -> dict[str, Any] | None:
    """Return digests of the code behind a dotted path, or None if it is installed or normlab's, or not found.

    Returns:
        object: the dotted path.
        code: SHA-256 of all of it, comments left out.
        modules: SHA-256 of each module's code, by its dotted name.
    """
    modules = {name: module.code for name, module in sorted(own_modules(dotted).items()) if module.code}
    code = hashlib.sha256(repr(list(modules.items())).encode()).hexdigest()
    return {"object": dotted, "code": code, "modules": modules} if modules else None


def own_modules(dotted: str) -> Mapping[str, OwnModule]:
    """Return the modules of the code behind a dotted path, by dotted name; none if it is not the user's own."""
    return _own_modules(dotted, Path.cwd())  # which is importable


@cache  # a process imports a module once, however its file changes
def _own_modules(dotted: str, folder: Path) -> dict[str, OwnModule]:
    places = search_path()
    modules: dict[str, OwnModule] = {}
    left, seen = [dotted], set[str]()  # the object itself may be a module, or be inside of a class
    while left:
        name = left.pop()
        if not name or name in seen:
            continue
        seen.add(name)
        left.append(name.rpartition(".")[0])  # a package, which importing carries out, too
        spec = _spec(name, places)
        file = _own_file(spec.origin if spec else None)
        if spec and file:
            package = spec.submodule_search_locations is not None
            code, imported = _read(file, name if package else name.rpartition(".")[0])
            modules[name] = OwnModule(file, _folder(spec.origin), package, code)
            left += imported
    return modules


def loaded_modules() -> dict[str, OwnModule]:
    """Return the user's own modules that this process has imported, however they were named."""
    found = {}
    for name, module in list(sys.modules.items()):
        origin = getattr(getattr(module, "__spec__", None), "origin", None)  # torch.ops has an untrue __file__
        file = _own_file(origin)
        if file and not name.startswith("__"):  # __mp_main__, for one
            found[name] = OwnModule(file, _folder(origin), hasattr(module, "__path__"))
    return found


def outside_of_snapshot() -> list[str]:
    """Return own modules that this process imported, but not from the snapshot of code that it runs from, if any."""
    place = frozen.folder()
    if place is None:
        return []
    found = {name: module.file for name, module in sorted(loaded_modules().items())}
    return [f"{name} ({file})" for name, file in found.items() if not file.is_relative_to(place)]


def changed_modules(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the modules that differ between two results of `own_code`."""
    old, new = before.get("modules") or {}, after.get("modules") or {}
    return [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def _read(file: Path, package: str) -> tuple[str, list[str]]:
    """Return the digest of the code of a module of `package`, and the names that it imports, which may be modules."""
    if file.suffix != ".py":
        return "", []
    content = file.read_bytes()
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):
        return hashlib.sha256(content).hexdigest(), []
    imported = list(_imports(tree, package))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body
        if documented and ast.get_docstring(node, clean=False) is not None:  # type: ignore[arg-type]
            del node.body[0]  # type: ignore[attr-defined]
    with contextlib.suppress(RecursionError):  # of a sum of many terms
        content = ast.unparse(tree).encode(errors="replace")
    return hashlib.sha256(content).hexdigest(), imported


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -(node.level - 1) or None] if node.level else []
            source = ".".join(filter(None, [*above, node.module]))
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def _spec(module: str, places: Sequence[str]) -> ModuleSpec | None:
    """Find a module as an import would, without importing it."""
    package, *parts = module.split(".")
    spec = PathFinder.find_spec(package, places)
    if spec is None:
        loaded = sys.modules.get(package)  # by a hook of an editable install, for one
        spec = getattr(loaded, "__spec__", None) if loaded else importlib.util.find_spec(package)
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            return None
        package = f"{package}.{part}"
        spec = PathFinder.find_spec(package, list(spec.submodule_search_locations))
    return spec


def _folder(origin: object) -> Path:
    return Path(str(origin)).parent.resolve()


def _own_file(origin: object) -> Path | None:
    """Return the file of a module if it is in the user's folders."""
    if not isinstance(origin, str) or not origin.endswith((".py", *EXTENSION_SUFFIXES)):
        return None
    path = Path(origin).resolve()
    if is_installed(path) or path.is_relative_to(NORMLAB) or not path.is_file():  # but in an archive, say
        return None
    return path
