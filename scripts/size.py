"""Print the size of the code: lines per folder, and public names without a docstring: scripts/size.py [ROOT ...]

A line is documentation if it is part of a docstring or holds a comment alone, and code if it is neither that nor blank.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def lines(text: str) -> Counter[str]:
    """Count the lines of a module by kind: code, documentation, blank."""
    documentation = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            documentation.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            documentation.add(token.start[0])
    counts = Counter(documentation=len(documentation))
    for number, line in enumerate(text.splitlines(), 1):
        if number not in documentation:
            counts["code" if line.strip() else "blank"] += 1
    return counts


def public(node: ast.AST) -> Iterator[DOCUMENTED]:
    """Yield the public classes, functions and methods of a module, and the module."""
    if isinstance(node, DOCUMENTED):
        yield node
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, DOCUMENTED) and not getattr(child, "name", "_").startswith("_"):
                yield from public(child)


def main(roots: list[str]) -> None:
    """Print a table per root."""
    for root in map(Path, roots):
        folders: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for path in sorted(root.rglob("*.py")):
            text, parts = path.read_text(), path.relative_to(root).parts[:-1]
            names = list(public(ast.parse(text)))
            counts = lines(text)
            counts["public"] = len(names)
            counts["undocumented"] = sum(ast.get_docstring(name) is None for name in names)
            counts["type: ignore"] = text.count("type: ignore")
            counts["Any"] = sum(
                bool(re.search(r"\bAny\b", line)) and "import" not in line for line in text.splitlines()
            )
            for folder in ("/".join(parts[:2]) or ".", "total"):
                folders[folder] += counts
        folders["total"] = folders.pop("total")
        columns = ["code", "documentation", "blank", "public", "undocumented", "type: ignore", "Any"]
        print(f"{root!s:28}", *(f"{column:>14}" for column in columns))
        for folder, counts in folders.items():
            print(f"  {folder:26}", *(f"{counts[column]:14}" for column in columns))


if __name__ == "__main__":
    main(sys.argv[1:] or ["src", "tests"])
