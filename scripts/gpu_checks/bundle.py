"""Packages and images for a bare machine without network, which scripts/gpu_check uses there by itself.

FOLDER (default: gpu_check.bundle) gets wheels/, with what pyproject.toml lists and all that it needs, less what is on
that machine already; and, with --data, images.tar.xz with a part of CIFAR-10 (JPEG), as many images of every class.
Only this needs a network, and pip. Git ignores the folder: it is never committed.

scripts/gpu_check bundle --data ~/cifar10-images.tar.xz
"""

import argparse
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from email.parser import Parser
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement

from gpu_checks.needs import IMAGES, name_of, required

ROOT = Path(__file__).parents[2]
THERE = (
    *(
        "torch",
        "torchvision",
        "pandas",
        "matplotlib",
        "scipy",
        "pytest",
        "lightning",
        "tensorboard",
        "jinja2",
        "psutil",
    ),
    # ... and what those bring, as far as normlab's other packages need it
    *("numpy", "pillow", "filelock", "pyyaml", "packaging", "typing-extensions"),
)
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64")
FOLDER_OF_IMAGES = "cifar10_jpeg"
MIB = 2**20


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "scripts/gpu_check bundle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=ROOT / "gpu_check.bundle")
    add("--python", default="3.12", help="the machine's; default: %(default)s")
    add("--platform", nargs="+", default=PLATFORMS, help="default: Linux on x86_64")
    add("--there", nargs="*", default=THERE, help="packages that are there; default: %(default)s")
    add("--also", nargs="*", default=[], help="further packages to bring")
    add("--data", type=Path, help="CIFAR-10 (JPEG): a folder with train/CLASS/* and test/CLASS/*, or a tar file of it")
    add("--images", type=int, default=20_000, help="images to train on; default: %(default)s")
    add("--test-images", type=int, default=4_000, help="images to test on; default: %(default)s")
    add("--mib", type=float, default=64, help="the size that it may have; default: %(default)s")
    chosen = parser.parse_args(words)
    new = chosen.folder.with_name(f"{chosen.folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    (new / "wheels").mkdir(parents=True)
    wheels = Wheels(new / "wheels", chosen.python, chosen.platform)
    wheels.collect([*required(ROOT / "pyproject.toml"), *chosen.also], map(name_of, chosen.there))
    if chosen.data:
        pack_images(chosen.data, new / IMAGES, {"train": chosen.images, "test": chosen.test_images})
    sizes = {path.relative_to(new): path.stat().st_size for path in sorted(new.rglob("*")) if path.is_file()}
    for path, size in sizes.items():
        print(f"{size / MIB:7.2f} MiB  {path}")
    total = sum(sizes.values()) / MIB
    print(f"{total:7.2f} MiB  in all")
    if total > chosen.mib:
        shutil.rmtree(new)
        sys.exit(
            f"{total:.1f} MiB are more than the {chosen.mib:g} that it may have. Bring fewer --images, or say --mib."
        )
    shutil.rmtree(chosen.folder, ignore_errors=True)
    new.rename(chosen.folder)
    print(f"Written to {chosen.folder}. scripts/gpu_check uses it where it lies beside it, or --bundle names it.")


class Wheels:
    """A folder of wheels for another machine: a version of Python, and names of platforms."""

    def __init__(self, folder: Path, python: str, platforms: Iterable[str]) -> None:
        self.folder, self.python = folder, python
        self._options = ["--only-binary=:all:", "--python-version", python]
        self._options += chain.from_iterable(("--platform", platform) for platform in platforms)

    def collect(self, requirements: Iterable[str], there: Iterable[str]) -> None:
        """Get what is required, and what that requires, but for the packages that are there."""
        known, left = set(there), list(requirements)
        while left:
            requirement = left.pop(0)
            if name_of(requirement) in known or not self._applies(requirement):
                continue
            known.add(name_of(requirement))
            left += self._requires(self._get(requirement))

    def _applies(self, requirement: str) -> bool:
        marker = Requirement(requirement).marker
        machine = {"python_version": self.python, "python_full_version": f"{self.python}.0", "extra": ""}
        return marker is None or marker.evaluate({**machine, "sys_platform": "linux", "platform_system": "Linux"})

    def _get(self, requirement: str) -> Path:
        """The wheel: of the versions that the tests have, if there is one; built here, if there is none."""
        package = requirement.split(";")[0]
        constraint = ["--constraint", str(ROOT / "constraints.txt")]
        download, wheel = ["download", *self._options, "--dest"], ["wheel", "--wheel-dir"]
        before = set(self.folder.iterdir())
        for words, more in ((download, constraint), (download, []), (wheel, constraint), (wheel, [])):
            done = pip(*words, str(self.folder), "--no-deps", *more, package)
            if done.returncode == 0:
                break
        else:
            sys.exit(f"{package} cannot be had: {done.stderr.strip().splitlines()[-1]}")
        (path,) = set(self.folder.iterdir()) - before
        if words is wheel and not path.name.endswith("-none-any.whl"):
            sys.exit(f"{package} has no wheel for that machine, and {path.name}, built here, is for this one only.")
        return path

    def _requires(self, wheel: Path) -> list[str]:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            return Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])


def pip(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pip", words[0], "--quiet", "--disable-pip-version-check", *words[1:]]
    return subprocess.run(command, capture_output=True, text=True)


def pack_images(source: Path, target: Path, wanted: dict[str, int]) -> None:
    """Write the first images of each class by name, the same number of each, with the layout of the source."""
    names = set(chosen_names(listed(source), wanted))
    with tarfile.open(target, "w:xz") as packed:
        for name, content in contents(source, names):
            entry = tarfile.TarInfo(f"{FOLDER_OF_IMAGES}/{name}")
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))


def chosen_names(names: Iterable[str], wanted: dict[str, int]) -> list[str]:
    """Of `part/class/file` as many as are wanted of each part, evenly over its classes."""
    classes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(names):
        part, kind, _ = name.split("/")
        classes[part][kind].append(name)
    found = []
    for part, number in wanted.items():
        each = number // max(1, len(classes[part]))
        if not each or any(len(files) < each for files in classes[part].values()):
            counts = {kind: len(files) for kind, files in classes[part].items()}
            sys.exit(f"{number} images of {part}/ cannot be had evenly over its classes: {counts or 'it has none'}.")
        found += [name for files in classes[part].values() for name in files[:each]]
    return found


def listed(source: Path) -> Iterator[str]:
    """The images of a folder or a tar file, as part/class/file."""
    if source.is_dir():
        yield from (path.relative_to(source).as_posix() for path in source.glob("*/*/*") if path.is_file())
        return
    with tarfile.open(source) as archive:
        for member in archive:
            if member.isfile() and member.name.removeprefix("./").count("/") == 2:
                yield member.name.removeprefix("./")


def contents(source: Path, names: set[str]) -> Iterator[tuple[str, bytes]]:
    if source.is_dir():
        yield from ((name, (source / name).read_bytes()) for name in sorted(names))
        return
    with tarfile.open(source) as archive:  # read once, in its order
        for member in archive:
            name = member.name.removeprefix("./")
            if name in names and (file := archive.extractfile(member)):
                yield name, file.read()
