"""What a check on a GPU needs, and what is missing. By the standard library alone, as packages may be missing."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

IMAGES = "images.tar.xz"  # of a bundle
NEEDED = (
    "It needs Python 3.11 or newer, PyTorch with CUDA and a GPU, what pyproject.toml lists, and pytest; Lightning is an"
    " opponent where it is found. No network."
)
AFTER = {  # what is left out without a package that is not required
    "pytest": "the tests marked gpu cannot be run",
    "lightning": "it is no opponent in the stage speed",
}


def required(pyproject: Path) -> list[str]:
    """The requirements of normlab, as pyproject.toml has them."""
    listed: list[str] = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    return listed


def name_of(requirement: str) -> str:
    """`Jinja2>=3.1` -> jinja2, as package indices compare names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0]).lower()


def lacking(pyproject: Path, packages: Path) -> list[str]:
    """A sentence for each package that is neither installed nor in the folder."""
    there = {name_of(one.metadata["Name"]) for one in metadata.distributions(path=[*sys.path, str(packages)])}
    bundle = "bring it along: scripts/gpu_check bundle"
    sentences = [f"Missing: {each}; {bundle}." for each in required(pyproject) if name_of(each) not in there]
    return sentences + [f"Missing: {name}; {what}." for name, what in AFTER.items() if name not in there]
