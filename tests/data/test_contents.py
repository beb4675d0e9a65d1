import errno
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from normlab.common.errors import UserError
from normlab.data.contents import contents_digest, listing_digest

PATHS = ("a/1.bin", "a/2.bin", "b/1.bin")


@pytest.fixture
def root(tmp_path) -> Path:
    for number, path in enumerate(PATHS):
        file = tmp_path / "set" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes([number]) * 3)
        os.utime(file, ns=(number, number))
    return tmp_path / "set"


def test_the_digests_are_of_paths_sizes_and_times_and_of_paths_and_bytes(root) -> None:
    listing = "".join(f"{path}\0{3} {number} {(root / path).stat().st_ctime_ns}\0" for number, path in enumerate(PATHS))
    assert listing_digest(root, PATHS) == hashlib.sha256(listing.encode()).hexdigest()
    contents = "".join(
        f"{path}\0{hashlib.sha256(bytes([number]) * 3).hexdigest()}\0" for number, path in enumerate(PATHS)
    )
    assert contents_digest(root, PATHS) == hashlib.sha256(contents.encode()).hexdigest()


@pytest.mark.parametrize(
    ("change", "listing", "contents"),
    [
        ("nothing", False, False),
        ("copy with times", True, False),
        ("time", True, False),
        ("bytes, at the same size and time", True, True),
        ("swapped names, at the same size and time", True, True),
        ("addition", True, True),
    ],
)
def test_what_changes_which_digest(root, tmp_path, change, listing, contents) -> None:
    before, paths = (listing_digest(root, PATHS), contents_digest(root, PATHS)), PATHS
    first, second = root / PATHS[0], root / PATHS[1]
    if change == "copy with times":
        root = shutil.copytree(root, tmp_path / "other" / "copy")
    elif change == "time":
        os.utime(first, ns=(7, 7))
    elif change == "addition":
        shutil.copy2(first, root / "a/3.bin")
        paths = (*PATHS, "a/3.bin")
    elif change != "nothing":
        one, two = first.read_bytes(), second.read_bytes()
        first.write_bytes(two)
        if change.startswith("swapped"):
            second.write_bytes(one)
        os.utime(first, ns=(0, 0))
        os.utime(second, ns=(1, 1))
    assert listing_digest(root, paths) != before[0] if listing else listing_digest(root, paths) == before[0]
    assert contents_digest(root, paths) != before[1] if contents else contents_digest(root, paths) == before[1]


@pytest.mark.parametrize("digest", [listing_digest, contents_digest])
def test_a_file_that_is_gone_is_named(root, digest) -> None:
    with pytest.raises(UserError, match=r"set/a/9\.bin cannot be read: No such file"):
        digest(root, [*PATHS, "a/9.bin"])


def test_an_error_that_may_pass_is_no_fact_about_a_file(root, monkeypatch) -> None:
    def fails(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("hashlib.file_digest", fails)
    with pytest.raises(UserError, match=r"set/a/1\.bin cannot be read: Input/output error"):
        contents_digest(root, PATHS, lenient=True)


def test_needs_no_torch() -> None:
    code = "import sys, normlab.data.contents; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
