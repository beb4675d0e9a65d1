"""The state of the code that is running, where it runs from a checkout."""

import hashlib
import subprocess
from functools import cache
from pathlib import Path

from normlab.common import frozen
from normlab.common.errors import first_line

MOST_OF_DIFF = 100_000  # characters


@cache
def state() -> dict[str, str | None] | None:
    """Return commit and uncommitted difference of code and configuration; None where normlab is installed.

    In a snapshot of a checkout they are those of when it was taken. Of a checkout whose commit cannot be read, the
    commit is None and `error` says why.
    """
    here = Path(__file__)
    snapshot = frozen.folder()
    if snapshot and here.resolve().is_relative_to(snapshot.resolve()):
        return frozen.checkout()
    if not (here.parents[3] / "pyproject.toml").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here.parent, capture_output=True, text=True, errors="replace", timeout=10, check=True
        ).stdout

    try:
        if f"src/normlab/common/{here.name}" not in git("ls-files", "--full-name", here.name):
            return {"commit": None, "error": "the git repository around it does not track it"}
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "diff": _short(git("diff", "HEAD", "--", ":/src", ":/conf")),
        }
    except FileNotFoundError:
        error = "git is not installed"
    except subprocess.TimeoutExpired:
        error = "git does not answer"
    except subprocess.CalledProcessError as failed:
        no_commit = "rev-parse" in failed.cmd
        error = "it has no commit yet" if no_commit else first_line(failed.stderr).removeprefix("fatal: ")
    except OSError as failed:
        error = str(failed)
    return {"commit": None, "error": error}


def _short(diff: str) -> str:
    """Return a difference; the start of a long one, with its digest: a file of a record has a limited size."""
    if len(diff) <= MOST_OF_DIFF:
        return diff
    digest = hashlib.sha256(diff.encode()).hexdigest()
    return f"{diff[:MOST_OF_DIFF]}\n... of {len(diff)} characters, SHA-256 {digest}\n"


def problem() -> str:
    """Return a sentence for a checkout whose commit is not recorded with its runs; else nothing."""
    error = (state() or {}).get("error")
    return f"The runs' records will not name the commit of normlab's code: {error}." if error else ""
