"""What the package says about itself: one version everywhere, a citation, docstrings; and that asking is cheap."""

import importlib
import inspect
import itertools
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import normlab

ROOT = Path(__file__).parents[2]


def test_the_version_is_that_of_the_installed_package_the_changelog_and_the_citation() -> None:
    headings = re.findall(r"^## (\d\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert [version("normlab"), headings[0], citation["version"]] == [normlab.__version__] * 3


def test_the_versions_that_ci_installs_are_of_all_requirements_and_sorted() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert len(pinned) == sum("==" in line for line in lines), "one line for each"
    assert list(pinned) == sorted(pinned, key=str.lower)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [
        project["dependencies"],
        *(extras[name] for name in ("test", "docs", "tensorboard", "mlflow", "wandb", "timm")),
    ]
    versions = {canonicalize_name(name): version for name, version in pinned.items()}
    for requirement in map(Requirement, itertools.chain(*listed)):
        if requirement.name != "normlab":
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_the_citation_has_the_five_papers_by_the_names_that_the_claims_have() -> None:
    claims = (ROOT / "src" / "normlab" / "report" / "claims" / "claims.yaml").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    papers = set()
    for reference in citation["references"]:
        names = [author.get("family-names") or author["name"] for author in reference["authors"]]
        papers.add(f"{' & '.join(names)} {reference['year']}")
        [identifier] = reference["identifiers"]
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", identifier["value"])
    assert len(papers) == 5
    assert papers <= set(re.findall(r"^  paper: (.+ \d{4})$", claims, re.MULTILINE))


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys; before = set(sys.modules); import normlab; print(normlab.__version__, *set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [normlab.__version__, "normlab"]


@pytest.mark.parametrize("module", ["normlab.norms", "normlab.report", "normlab.models", "normlab.probes"])
def test_every_public_name_has_a_docstring_of_its_own(module) -> None:
    public = importlib.import_module(module)
    assert not [name for name in public.__all__ if not _docstring(getattr(public, name))]


def _docstring(thing: object) -> str | None:
    """A class's own: neither inherited nor the signature that a dataclass gets for want of one."""
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else inspect.getdoc(thing)
    return None if text and text.startswith(f"{getattr(thing, '__name__', '')}(") else text
