"""What to send to the authors when an error is none that the user can mend."""

import platform
import shlex
import sys
import sysconfig
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import normlab
from normlab.common import git
from normlab.common.errors import described

_PACKAGES = ("torch", "torchvision", "hydra-core", "omegaconf", "pydantic", "numpy")


def blame(error: BaseException) -> str:
    """Return a sentence that says whose an unforeseen error is: normlab's, or that of a user's own code in between."""
    paths = sysconfig.get_paths()
    ours = [str(Path(normlab.__file__).parent), *(paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib"))]
    scripts = ("train.py", "report.py", "normlab-train", "normlab-report", "<")
    frames = traceback.extract_tb(error.__traceback__)
    if frames and frames[-1].name == "return_value":  # of another process, as joblib's are
        return "The log of the run that failed, run.log in its folder, says where it comes out of."
    for frame in reversed(frames):
        name = frame.filename
        known = name.startswith(tuple(ours)) or Path(name).name.startswith(scripts) or "hydra_plugins" in name
        if not known and Path(name).is_file():
            return f"It comes out of {name}, line {frame.lineno}: unless that is wrong, this is an error of normlab."
    return "This is an error of normlab, and no mistake of yours."


def told(error: BaseException) -> str:
    """Return an unforeseen error on one line, with whose it is; a run's log has its traceback."""
    return f"{described(error)}. {blame(error)}"


def report(error: BaseException, command: str | None = None) -> str:
    """Return the lines below a traceback that say whose error it is, and what to send to the authors of normlab.

    Args:
        error: what was raised.
        command: the word in front of the settings, which sys.argv has not.
    """
    code = git.state()
    commit = (
        f", commit {code['commit'] or code.get('error')}{' with changes' if code.get('diff') else ''}" if code else ""
    )
    versions = [f"{name} {_version(name)}" for name in _PACKAGES]
    program = Path(sys.argv[0]).name
    return "\n".join(
        (
            f"{blame(error)}\nPlease send its authors the traceback above, and these lines:",
            f"  command: {shlex.join([program, *([command] if command else []), *sys.argv[1:]])}",
            f"  normlab {normlab.__version__}{commit}",
            f"  Python {platform.python_version()}, {', '.join(versions)}",
            f"  {platform.platform()}",
        )
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "n/a"
