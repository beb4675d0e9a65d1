"""Start a job from a snapshot of code, once its files are checked: `python start.py order.json`.

`launchers.snapshot` writes snapshots and copies this file into each as start.py. So it imports the standard library
alone, and nothing of the snapshot before the check.

<digest>/manifest.json   the SHA-256 of each file, and the state of the checkout; <digest> begins the SHA-256 of itself
<digest>/start.py        this file
<digest>/modules/        first in sys.path
"""

import hashlib
import importlib
import json
import os
import sys
from functools import cache
from pathlib import Path

VARIABLE = "NORMLAB_SNAPSHOT"  # the folder that this job's processes run from
MANIFEST, START, MODULES = "manifest.json", "start.py", "modules"


def digest_of(manifest: bytes) -> str:
    """Return the name of the snapshot that has this manifest."""
    return hashlib.sha256(manifest).hexdigest()[:16]


def fault(folder: Path) -> str:
    """Return what of a snapshot is not as it was written; nothing if all is."""
    try:
        if not (folder / MANIFEST).is_file():
            return f"it has no {MANIFEST}"
        content = (folder / MANIFEST).read_bytes()
        if digest_of(content) != folder.name:
            return f"{MANIFEST} was changed"
        known = json.loads(content)
        found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
        there = {name for name, path in found.items() if path.is_symlink() or not path.is_dir()} - {MANIFEST}
        there = {name for name in there if "__pycache__" not in Path(name).parts}
        for name in sorted(there ^ {*known["files"], *known["links"]}):
            return f"{name} was {'added' if name in there else 'removed'}"
        for name, target in known["links"].items():
            if not found[name].is_symlink() or str(found[name].readlink()) != target:
                return f"{name} was changed"
        for name, digest in known["files"].items():
            whole = found[name].is_file() and not found[name].is_symlink()
            if not whole or hashlib.sha256(found[name].read_bytes()).hexdigest() != digest:
                return f"{name} was changed"
    except OSError as error:
        return f"it cannot be read ({error})"
    return ""


def folder() -> Path | None:
    """Return the snapshot that this process runs from; None if it runs from none."""
    place = os.environ.get(VARIABLE, "")
    return Path(place) if place and str(Path(place) / MODULES) in sys.path else None


@cache
def checkout() -> dict[str, str | None] | None:
    """Return commit and uncommitted difference of normlab's code, as they were when the snapshot was taken."""
    place = folder()
    git: dict[str, str | None] | None = json.loads((place / MANIFEST).read_bytes())["git"] if place else None
    return git


def main() -> int:
    """Check the snapshot and carry out a job's task from it; return the exit status."""
    place = Path(__file__).resolve().parent
    if wrong := fault(place):
        print(
            f"The snapshot of code {place} is damaged: {wrong}. No run was started.\n"
            "The command that submitted the job submits its runs again, with the code as it is then.",
            file=sys.stderr,
            flush=True,
        )
        return 1
    modules = str(place / MODULES)
    sys.path[:] = [modules, *(each for each in sys.path if each not in (str(place), modules))]
    # Of processes that are started otherwise than by multiprocessing, which hands on sys.path.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [modules, os.environ.get("PYTHONPATH", "")]))
    os.environ[VARIABLE] = str(place)
    return int(importlib.import_module("normlab.launchers.slurm_task").main(Path(sys.argv[1])))


if __name__ == "__main__":
    sys.exit(main())
