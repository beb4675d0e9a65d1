"""Digests of a user's own code, read from its source and not executed.

Of a module only what the object uses counts: whoever adds another network to the file of the first changes neither.
Comments, formatting and docstrings make no difference. Installed packages, the standard library and normlab itself are
left out: their versions are recorded. Imports computed at run time and files that the code reads are not seen.
"""

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

_INSTALLED = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_NORMLAB = Path(__file__).resolve().parents[1]
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def own_code(dotted: str) -> dict[str, Any] | None:
    """Return digests of the code behind a dotted path, or None if it is installed, normlab's or cannot be read.

    Returns:
        object: the dotted path.
        code: SHA-256 of all definitions that the object uses, directly and through what they use, comments left out.
        modules: SHA-256 of each module's file that has some of them, by its dotted name.
    """
    return _own_code(dotted, Path.cwd())


@cache  # a process imports a module once, however its file changes
def _own_code(dotted: str, folder: Path) -> dict[str, Any] | None:
    module, _, name = dotted.rpartition(".")
    walk = _Walk(folder)
    try:
        walk.visit(module, name)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return None
    modules = {name: found.sha256 for name, found in sorted(walk.modules.items()) if found}
    code = hashlib.sha256("\n".join(sorted(walk.parts)).encode()).hexdigest()
    return {"object": dotted, "code": code, "modules": modules} if modules else None


def changed_modules(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the modules that differ between two results of `own_code`; none if the code is the same."""
    if before.get("code") == after.get("code"):
        return []
    old, new = before.get("modules") or {}, after.get("modules") or {}
    return [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]  # none: another Python read it


class _Module:
    """The statements of a module's file, by the names that they bind.

    Attributes:
        bound: statements at the top that bind a name.
        always: other statements, which importing the module carries out whatever is used of it.
    """

    def __init__(self, name: str, path: Path) -> None:
        content = path.read_bytes()
        self.package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.bound: dict[str, list[ast.stmt]] = defaultdict(list)
        self.always: list[ast.stmt] = []
        for statement in _without_docstrings(ast.parse(content)).body:
            names = list(_bound_by(statement))
            for each in names:
                self.bound[each].append(statement)
            if not names and not _is_main_guard(statement):
                self.always.append(statement)

    @cached_property
    def all(self) -> list[ast.stmt]:
        return [*self.always, *(statement for statements in self.bound.values() for statement in statements)]


class _Walk:
    """Collects the definitions that an object uses.

    Attributes:
        modules: those that are the user's own, and None for others.
        parts: the definitions, as text.
    """

    def __init__(self, folder: Path) -> None:
        self.modules: dict[str, _Module | None] = {}
        self.parts: set[str] = set()
        self._seen: set[tuple[str, str]] = set()
        here = str(folder)  # importable, see common.imports
        self._places = sys.path if here in sys.path else [here, *sys.path]

    def visit(self, module: str, name: str) -> bool:
        """Add what `name` of a module uses, "" for all of the module; return whether the module is the user's own."""
        if (module, name) in self._seen:
            return self.modules.get(module) is not None
        self._seen.add((module, name))
        found = self._load(module)
        if found is None:
            return False
        parent = module.rpartition(".")[0]
        if parent:
            self.visit(parent, "__init__")  # which importing carries out, too
        is_whole = not name or (name not in found.bound and name != "__init__")
        for statement in found.all if is_whole else [*found.always, *found.bound.get(name, [])]:
            self._add(module, found, statement)
        return True

    def _load(self, module: str) -> _Module | None:
        if module not in self.modules:
            path = _own_file(module, self._places)
            self.modules[module] = _Module(module, path) if path else None
        return self.modules[module]

    def _add(self, module: str, found: _Module, statement: ast.stmt) -> None:
        self.parts.add(f"{module}: {ast.dump(statement)}")
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.visit(alias.name, "")
            elif isinstance(node, ast.ImportFrom):
                above = found.package.split(".")[: -(node.level - 1) or None] if node.level else []
                source = ".".join(filter(None, [*above, node.module]))
                for alias in node.names:
                    if not self.visit(f"{source}.{alias.name}", ""):  # a module of the package, or a name in it
                        self.visit(source, alias.name.replace("*", ""))
            elif isinstance(node, ast.Name) and node.id in found.bound:
                self.visit(module, node.id)


def _own_file(module: str, places: Sequence[str]) -> Path | None:
    """Return the file of a module in the user's folders, found as an import would, without importing it."""
    package, *parts = module.split(".")
    spec = PathFinder.find_spec(package, places)
    if spec is None and package not in sys.modules:
        spec = importlib.util.find_spec(package)  # by a hook of an editable install, for one
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            return None
        package = f"{package}.{part}"
        spec = PathFinder.find_spec(package, list(spec.submodule_search_locations))
    path = Path(spec.origin).resolve() if spec and spec.origin else None
    if path is None or path.suffix != ".py" or any(path.is_relative_to(folder) for folder in (*_INSTALLED, _NORMLAB)):
        return None
    return path


def _bound_by(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement at the top of a module binds; none for one that does more than that."""
    if isinstance(statement, _Definition):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        names = [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
        yield from names if "*" not in names else []
    elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        nodes = [node for target in targets for node in ast.walk(target)]
        if not any(isinstance(node, ast.Attribute | ast.Subscript) for node in nodes):
            yield from (node.id for node in nodes if isinstance(node, ast.Name))


def _is_main_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "__main__" in ast.dump(statement.test)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if (
            isinstance(node, _Definition | ast.Module)
            and node.body
            and ast.get_docstring(node, clean=False) is not None
        ):
            del node.body[0]
    return tree
