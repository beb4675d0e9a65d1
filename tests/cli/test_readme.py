"""Every command of README.md, run as it stands in a copy of the repository: each section after the quickstart.

What is appended makes it small; what is different is in INSTEAD and EXCEPT, each with its reason.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import run_command
from filelock import FileLock
from PIL import Image

from normlab import runs

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
SMALL = "dataset.train_size=160 dataset.test_size=20 epochs=1 device=cpu threads=1 memory_format=contiguous"
NETWORK = " model=cifar_resnet depth=20"  # where the command names none: it has a fortieth of ResNet-18's weights
INSTEAD = {  # what is run in place of a word
    "seed=0,1,2": "seed=0,1",  # two are a list, too
    "+tuning=lr": "+tuning=lr optimizer.lr=0.02,0.1",  # a grid of two, which takes the place of seven
    # The size that an experiment has for tests; all of its runs have one of their own.
    "budget=laptop": "budget=smoke seed=0 dataset.test_size=40 epochs=1 device=cpu threads=1 hydra/launcher=basic",
    "image_size=64": "image_size=16",  # of photos that are larger
    "dataset=cifar10": f"dataset=cifar10 hydra/launcher=plan hydra.launcher.calibrate_seconds=0 {SMALL}",  # no network
}
SIZED = [INSTEAD["budget=laptop"], INSTEAD["dataset=cifar10"]]  # have a size already
EXCEPT = {
    "./scripts/test": "it is what runs this test",
    "pip install .": "tests/packaging installs the wheel; here the packages are those of the tests",
}
STUDIES = ("cifar10_jpeg_laptop", "santurkar2018_noise_laptop")  # of outputs/reference: enough to make a page of
LOCAL = subprocess.run([ROOT / "scripts" / "local_slurm", "status"], capture_output=True, text=True)


def sections() -> dict[str, list[str]]:
    """The commands of each section that has some, without comments."""
    found: dict[str, list[str]] = {}
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE):
        blocks = re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        lines = [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]
        if lines:
            found[section.splitlines()[0].removeprefix("# ")] = lines
    return found


def run(command: str, folder: Path) -> str:
    """What the command prints; it is run by bash, as a reader would, or, if it is one of Python alone, as a fork."""
    alone = re.fullmatch(r"python (train|report)\.py [^|&;<>$\\]*", command + " ")
    if alone and "slurm" not in command:  # a fork has the conf/ of this checkout, and a site is described in another
        status, out, error = run_command(folder, *shlex.split(command)[1:])
        assert status == 0, f"{command}\n{out}\n{error}"
        return out + error
    paths = [str(folder / "src"), str(folder), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    conf = re.search(r"SLURM_CONF=(\S+)", LOCAL.stdout)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **({"SLURM_CONF": conf[1]} if conf else {}),
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the repository with what a reader would have beside it: an environment, own images, an own network."""
    folder = tmp_path_factory.mktemp("readme") / "normlab"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("conf", "src", "scripts", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("train.py", "report.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    (folder / "outputs" / "reference").mkdir(parents=True)
    for study in STUDIES:
        shutil.copy(ROOT / "outputs" / "reference" / f"{study}.normlab.zip", folder / "outputs" / "reference")
    (folder / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (folder / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    sums = ["bash", "-c", "cat pyproject.toml src/normlab/__init__.py | cksum"]
    wanted = subprocess.run(sums, cwd=folder, capture_output=True, text=True, check=True).stdout
    for mark in ("installed", "installed-test"):  # as scripts/environment leaves it: nothing is to be installed
        (folder / ".venv" / mark).write_text(wanted)
    return folder


def with_own_files(folder: Path) -> None:
    for split in ("train", "test"):
        for label in ("one", "other"):
            (folder / "photos" / split / label).mkdir(parents=True)
            for i in range(110):
                Image.new("RGB", (70, 66), (2 * i, 40, 90)).save(folder / "photos" / split / label / f"{i}.png")
    (folder / "my_package").mkdir()
    (folder / "my_package" / "my_module.py").write_text("from small import SmallResNet as MyNet\n")
    (folder / "data").mkdir()
    (folder / "data" / "cifar-10-python.tar.gz").touch()
    recipe = (ROOT / "docs" / "extending.md").read_text()
    variant, options = re.findall(r"^```(?:python|yaml)\n(.*?)^```$", recipe, re.MULTILINE | re.DOTALL)[:2]
    (folder / "half_norm.py").write_text(variant)
    (folder / "own" / "norm").mkdir(parents=True)
    (folder / "own" / "norm" / "half.yaml").write_text(options)
    (folder / "results.csv").write_text("arm,seed,batch,test_accuracy\ntheirs,0,8,93.1\ntheirs,0,32,92.4\n")


def small(command: str) -> str:
    for word, other in INSTEAD.items():
        command = command.replace(word, other)
    if command in ("python report.py", "normlab-report"):
        return f"{command} figures=false"  # other commands draw them
    trains = command.startswith(("python train.py", "torchrun", "normlab-train"))
    if not trains or "doctor" in command or any(word in command for word in SIZED):
        return f"{command} {SMALL}{NETWORK}" if command.startswith("./scripts/quickstart") else command
    # In this process, without a pool of others: the quickstart starts one, and the command with slots=2.
    launcher = " hydra/launcher=basic" if " -m " in command and "launcher" not in command else ""
    return f"{command} {SMALL}{'' if 'model' in command or 'depth' in command else NETWORK}{launcher}"


@pytest.mark.slow
@pytest.mark.parametrize("section", [name for name in sections() if name != "My cluster"])
def test_the_commands_of_a_section_run(section: str, checkout: Path) -> None:
    outputs, kept = checkout / "outputs" / "default", checkout / "kept"
    if not kept.exists():
        with_own_files(checkout)
        run(f"python train.py -m norm=bn,none batch=8,32 {SMALL}{NETWORK}", checkout)
        shutil.copytree(outputs, kept)
    shutil.rmtree(outputs, ignore_errors=True)
    shutil.copytree(kept, outputs)  # the study as the quickstart leaves it, whatever sections were run before
    for command in sections()[section]:
        if command not in EXCEPT:
            run(small(command), checkout)


@pytest.mark.slow
def test_a_run_on_one_machine_and_several_processes(checkout: Path) -> None:
    for command in sections()["My cluster"]:
        if "launcher=slurm" not in command:
            run(small(command), checkout)


@pytest.mark.slow
@pytest.mark.slurm
def test_the_line_for_slurm(checkout: Path) -> None:
    if LOCAL.returncode:
        pytest.skip(LOCAL.stderr.strip())
    [command] = [line for line in sections()["My cluster"] if "launcher=slurm" in line]
    (checkout / "conf" / "cluster" / "my_site.yaml").write_text("defaults:\n  - default\n  - _self_\n")
    finished = ["done"] * 4  # of two norms with two seeds
    with FileLock(Path("/tmp/normlab-test-slurm.lock")):
        run(small(command) + " study=of_slurm", checkout)
        for _ in range(300):
            states = [
                (runs.read_status(run) or {}).get("state") for run in runs.find(checkout / "outputs" / "of_slurm")
            ]
            if states == finished:
                break
            time.sleep(1)
    assert states == finished


def test_the_readme_has_what_it_must_have() -> None:
    assert len(sections()) >= 8
    every = " ".join(line for lines in sections().values() for line in lines)
    for word in ("./scripts/quickstart", "./scripts/test", "launcher=slurm", "report.py", "--config-dir", "reproduce"):
        assert word in every


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
