"""The code that is running: its commit, where it runs from a checkout."""

import subprocess
from functools import cache
from pathlib import Path


@cache
def state() -> dict[str, str] | None:
    """Commit, and the uncommitted difference of code and configuration; None where this is no checkout of normlab."""
    here = Path(__file__)

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here.parent, capture_output=True, text=True, errors="replace", timeout=10, check=True
        ).stdout

    try:
        if f"src/normlab/common/{here.name}" not in ask("ls-files", "--full-name", here.name):
            return None  # some other repository that this package happens to be installed in
        return {"commit": ask("rev-parse", "HEAD").strip(), "diff": ask("diff", "HEAD", "--", ":/src", ":/conf")}
    except (OSError, subprocess.SubprocessError):
        return None
