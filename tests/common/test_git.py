"""The commit that a record names, and why one cannot be named."""

import shutil
import subprocess
from pathlib import Path

import pytest

from normlab.common import git

HERE = Path(git.__file__)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A copy of the code, as if it were the one that runs."""
    root = tmp_path / "normlab"
    copy = root / "src" / "normlab" / "common" / "git.py"
    copy.parent.mkdir(parents=True)
    shutil.copy(HERE, copy)
    (root / "pyproject.toml").touch()
    monkeypatch.setattr(git, "__file__", str(copy))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    git.state.cache_clear()
    yield root
    git.state.cache_clear()


def call(root: Path, *words: str) -> None:
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", *name, *words], cwd=root, check=True, capture_output=True)


def test_commit_and_changes_are_those_of_the_checkout(checkout) -> None:
    call(checkout, "init")
    call(checkout, "add", ".")
    call(checkout, "commit", "-m", "first")
    assert git.problem() == ""
    assert len(git.state()["commit"]) == 40
    assert git.state()["diff"] == ""
    git.state.cache_clear()
    with (checkout / "src" / "normlab" / "common" / "git.py").open("a") as file:
        file.write("# changed\n")
    assert "+# changed" in git.state()["diff"]


@pytest.mark.parametrize("case", ["no repository", "no commit", "not tracked", "foreign owner", "no git"])
def test_why_there_is_none_is_told(checkout, monkeypatch, case) -> None:
    if case != "no repository":
        call(checkout, "init")
    if case != "not tracked":
        (checkout / ".git").exists() and call(checkout, "add", ".")
    if case == "foreign owner":
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    if case == "no git":
        monkeypatch.setenv("PATH", "")
    why = {
        "no repository": "not a git repository",
        "no commit": "it has no commit yet",
        "not tracked": "does not track it",
        "foreign owner": "dubious ownership",
        "no git": "git is not installed",
    }[case]
    assert git.state()["commit"] is None
    assert why in git.problem()


def test_of_an_installed_package_there_is_none_and_nothing_is_told(checkout) -> None:
    (checkout / "pyproject.toml").unlink()
    assert git.state() is None
    assert git.problem() == ""
