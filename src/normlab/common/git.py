"""The state of the code that is running, where it runs from a checkout."""

import subprocess
from functools import cache
from pathlib import Path


@cache
def state() -> dict[str, str] | None:
    """Return commit and uncommitted difference of code and configuration; None outside a checkout of normlab."""
    here = Path(__file__)

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here.parent, capture_output=True, text=True, errors="replace", timeout=10, check=True
        ).stdout

    try:
        if f"src/normlab/common/{here.name}" not in git("ls-files", "--full-name", here.name):
            return None  # some other repository that this package happens to be installed in
        return {"commit": git("rev-parse", "HEAD").strip(), "diff": git("diff", "HEAD", "--", ":/src", ":/conf")}
    except (OSError, subprocess.SubprocessError):
        return None
