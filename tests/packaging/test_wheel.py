"""The wheel: what it and the sdist hold, and that it works in an empty folder, without the repository.

Its environment has the packages of the tests' own (scripts/try_wheel makes one that downloads them), but not the
checkout.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from normlab import report

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SOURCES = (
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"),
    *("train.py", "report.py", "conf", "docs", "src"),
)
SMALL = (
    *("model=cifar_resnet", "depth=20", "dataset.train_size=128", "dataset.test_size=20", "epochs=1"),
    *("device=cpu", "memory_format=contiguous"),
)
# Of the commands: the checkout is not to be found.
ALONE = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "NORMLAB_DATA")}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of a copy of the repository, in which dist/ has been built."""
    copy = tmp_path_factory.mktemp("build") / "normlab"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, copy)
    for stray in ("tests/test_stray.py", "outputs/study/config.yaml", "data/images.npy"):
        (copy / stray).parent.mkdir(parents=True)
        (copy / stray).touch()
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation"], cwd=copy, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return copy


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """An environment with the wheel, and the packages that these tests use behind it."""
    [wheel] = (built / "dist").glob("*.whl")
    return environment(tmp_path_factory.mktemp("environment"), str(wheel))


def environment(folder: Path, *words: str) -> Path:
    """Make an environment in which pip installed `words`, with the packages that these tests use behind it."""
    venv.create(folder, symlinks=True)
    [site_packages] = folder.glob("lib/python*/site-packages")
    others = dict.fromkeys(path for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))
    (site_packages / "others.pth").write_text("\n".join([*others, sysconfig.get_path("purelib")]))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--disable-pip-version-check"]
    offline = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    subprocess.run([*pip, "install", *offline, *words], check=True, env=ALONE, timeout=300)
    return folder


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("empty")


def run(installed: Path, empty: Path, *words: str) -> tuple[int, str, str]:
    """A command of the environment in the empty folder; returns exit status, stdout, stderr."""
    command = [str(installed / "bin" / words[0]), *words[1:]]
    env = {**ALONE, "COLUMNS": "200"}
    done = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_the_wheel_holds_the_package_its_data_and_the_configuration_and_nothing_else(built) -> None:
    [wheel] = (built / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        about = {Path(name).name for name in archive.namelist() if ".dist-info/" in name}
    source = {name for name in files(built / "src") if ".egg-info/" not in name}
    assert held == source | {f"normlab/conf/{name}" for name in files(built / "conf")}
    assert {
        "normlab/conf/norm/bn.yaml",
        "normlab/report/claims/claims.yaml",
        "normlab/py.typed",
        "hydra_plugins/normlab_launchers.py",
    } <= held
    assert {"LICENSE", "entry_points.txt"} <= about


def test_the_sdist_holds_what_a_checkout_needs_to_run(built) -> None:
    [sdist] = (built / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert set(SOURCES) <= {name.partition("/")[0] for name in held}
    assert {f"conf/{name}" for name in files(built / "conf")} <= held
    assert not {name for name in held if name.startswith(("tests", "outputs", "data"))}


def test_the_package_is_the_wheels_and_the_checkout_is_out_of_sight(installed, empty) -> None:
    code = "import sys, normlab, hydra_plugins.normlab_launchers as plugin; print(normlab.__file__, plugin.__file__)"
    code += "; print(*sys.path, sep='\\n')"
    status, out, error = run(installed, empty, "python", "-c", code)
    assert status == 0, error
    package, plugin, *path = (Path(word).resolve() for word in out.split())
    assert package.is_relative_to(installed.resolve())
    assert plugin.is_relative_to(installed.resolve())
    assert not {ROOT, ROOT / "src"} & set(path)


def test_an_editable_install_reads_the_configuration_of_the_checkout(built, tmp_path) -> None:
    python = environment(tmp_path / "environment", "--editable", str(built)) / "bin" / "python"
    code = "from normlab.common.installation import CONF; import hydra_plugins.normlab_launchers; print(CONF)"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=ALONE, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).samefile(built / "conf")


def test_help_names_the_command_and_where_its_manual_is(installed, empty) -> None:
    for command, manual in (("normlab-train", "config.yaml"), ("normlab-report", "report.yaml")):
        status, out, error = run(installed, empty, command, "--help")
        assert status == 0, error
        assert f"\n  {command} " in out
        assert "python train.py" not in out
        [named] = [word.strip("(") for word in out.split() if word.endswith(f"conf/{manual}")]
        assert Path(named).is_file()


def test_mistakes_are_answered_in_the_commands_name(installed, empty) -> None:
    status, _, error = run(installed, empty, "normlab-train", "nrom=bn")
    assert (status, "Did you mean norm" in error) == (1, True)
    status, _, error = run(installed, empty, "normlab-train", "norm=null")
    assert (status, "`normlab-train --help`" in error) == (1, True)
    status, _, error = run(installed, empty, "normlab-report", "study=nothing")
    assert (status, "normlab-train -m study=nothing" in error) == (1, True)


def test_a_sweep_and_its_report_in_an_empty_folder(installed, empty) -> None:
    sweep = ("normlab-train", "-m", "norm=bn,none", "batch=32,128", "hydra.launcher.slots=1", *SMALL)
    status, out, error = run(installed, empty, *sweep)
    assert status == 0, out + error
    study = report.load(empty / "outputs" / "default")
    assert len(study.runs) == 4
    assert set(study.runs["state"]) == {"done"}
    assert all(study.configs)

    status, out, error = run(installed, empty, "normlab-report")
    assert status == 0, out + error
    assert (empty / "outputs" / "default" / "report" / "report.md").is_file()


def test_what_hydra_offers_works_without_a_checkout(installed, empty) -> None:
    (empty / "own" / "optimizer").mkdir(parents=True)
    (empty / "own" / "optimizer" / "mine.yaml").write_text("defaults: [sgd]\nlr: 0.123\n")
    experiment = ("-m", "experiment=ioffe2017_small", "budget=smoke")
    for words in (
        ("doctor", "hydra/launcher=plan", *SMALL),
        (*experiment, "hydra/launcher=plan", "hydra.launcher.calibrate_seconds=0"),
        ("--config-dir", "own", "optimizer=mine", "--cfg", "job"),
    ):
        status, out, error = run(installed, empty, "normlab-train", *words)
        assert status == 0, out + error
    assert "lr: 0.123" in out
