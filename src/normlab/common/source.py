"""Digests of a user's own code, read from its source and not executed.

Own are the module of a network or norm and all that it imports from the user's folders, directly and through others.
The whole file of each counts, without comments, formatting and docstrings. Installed packages, the standard library and
normlab itself are left out: their versions are recorded. Imports computed at run time and files that the code reads are
not seen.
"""

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

_INSTALLED = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_NORMLAB = Path(__file__).resolve().parents[1]


def own_code(dotted: str) -> dict[str, Any] | None:
    """Return digests of the code behind a dotted path, or None if it is installed or normlab's, or not found.

    Returns:
        object: the dotted path.
        code: SHA-256 of all of it, comments left out.
        modules: SHA-256 of each module's code, by its dotted name.
    """
    return _own_code(dotted, Path.cwd())


@cache  # a process imports a module once, however its file changes
def _own_code(dotted: str, folder: Path) -> dict[str, Any] | None:
    here = str(folder)  # importable, see common.imports
    places = sys.path if here in sys.path else [here, *sys.path]
    modules: dict[str, str] = {}
    left, seen = [dotted], set[str]()  # the object itself may be a module, or be inside of a class
    while left:
        name = left.pop()
        if not name or name in seen:
            continue
        seen.add(name)
        left.append(name.rpartition(".")[0])  # a package, which importing carries out, too
        file = _own_file(name, places)
        if file:
            modules[name], imported = _read(file, name)
            left += imported
    code = hashlib.sha256(repr(sorted(modules.items())).encode()).hexdigest()
    return {"object": dotted, "code": code, "modules": dict(sorted(modules.items()))} if modules else None


def changed_modules(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the modules that differ between two results of `own_code`."""
    old, new = before.get("modules") or {}, after.get("modules") or {}
    return [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def _read(file: Path, name: str) -> tuple[str, list[str]]:
    """Return the digest of a module's code, and the names that it imports, which may be modules."""
    content = file.read_bytes()
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):
        return hashlib.sha256(content).hexdigest(), []
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    imported = list(_imports(tree, package))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body
        if documented and ast.get_docstring(node, clean=False) is not None:  # type: ignore[arg-type]
            del node.body[0]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.unparse(tree).encode(errors="replace")).hexdigest(), imported


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -(node.level - 1) or None] if node.level else []
            source = ".".join(filter(None, [*above, node.module]))
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def _own_file(module: str, places: Sequence[str]) -> Path | None:
    """Return the file of a module in the user's folders, found as an import would, without importing it."""
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
    path = Path(spec.origin).resolve() if spec and spec.origin else None
    if path is None or path.suffix != ".py" or any(path.is_relative_to(folder) for folder in (*_INSTALLED, _NORMLAB)):
        return None
    return path
