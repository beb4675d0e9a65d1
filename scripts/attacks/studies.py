"""The study that is attacked, made by the code as it is, and its files, which are put back afterwards."""

import itertools
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from hydra import compose, initialize_config_dir

from attacks.watched import Ended, command, watched
from normlab import models, runs
from normlab.common.installation import CONF
from normlab.config import hydra, schema
from normlab.launchers import slurm
from normlab.report import build as build_report
from normlab.report import options, pack_study
from normlab.report.importing import import_runs
from normlab.report.study import index
from normlab.training.run import train_run

ROOT = Path(__file__).parents[2]
STUDY = "attacked"
SMALL = (
    *("model=custom", "model.target=small.SmallNet", "model.name=small", "dataset.train_size=160", "epochs=2"),
    *("dataset.test_size=40", "device=cpu", "threads=1", "memory_format=contiguous", "probe=[ics]", "batch=8"),
)
IMPORTED = "arm,seed,epoch,test_accuracy\n" + "".join(f"mine,{seed},2,0.{5 + seed}\n" for seed in (0, 1))
SET = {"dataset.name": "digits", "model.name": "small", "depth": 18, "batch": 8, "epochs": 2}


def settings_of(folder: Path, *words: str) -> dict[str, Any]:
    """Return the settings of a run of the study below `folder`/outputs."""
    folders = (f"study={STUDY}", f"output_dir={folder}/outputs", f"data_dir={folder}/data")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return schema.parse(hydra.settings_of(compose("config", [*SMALL, *folders, *words]))).as_dict()


def make(folder: Path, batches: Sequence[int] = (8, 16)) -> Path:
    """Make the study: finished runs of two norms, and some that were killed, interrupted, failed, diverged and planned;
    imported runs, notes, an order of jobs, a report, an index, and the study as one file."""
    folder.mkdir(exist_ok=True)
    study = folder / "outputs" / STUDY
    own = settings_of(folder, "checkpoint_seconds=0")
    for norm, batch, seed in itertools.product(("norm=bn", "norm=none"), batches, (0, 1)):
        train(settings_of(folder, norm) | {"batch": batch, "seed": seed})
    for seed, act in enumerate((kill, interrupt, fail, diverge), start=2):
        train(own | {"seed": seed}, act)
    runs.Run(own | {"seed": 6}).freeze()
    (folder / "results.csv").write_text(IMPORTED)
    words = {"source": str(folder / "results.csv"), "columns": None, "ignore": [], "set": SET, "percent": False}
    words |= {"pattern": None, "first_epoch": None, "steps_per_epoch": None, "replace": False}
    import_runs(STUDY, str(folder / "outputs"), words, quiet=True)
    (study / "notes.md").write_text("Made to be attacked.\n")
    submit(folder)
    with mock.patch.object(index, "WORTH", 1):
        build_report(STUDY, folder / "outputs", options(figures=False, quiet=True))
    pack_study(STUDY, folder / "outputs", quiet=True)
    return study


def submit(folder: Path) -> None:
    """Order a job of a SLURM that does nothing."""
    programs = folder / "programs"
    programs.mkdir()
    for name in ("sbatch", "scontrol", "squeue"):
        (programs / name).write_text(f"#!/bin/sh\n[ {name} = sbatch ] && cat >/dev/null && echo 1\nexit 0\n")
        (programs / name).chmod(0o755)
    words = ("hydra/launcher=slurm", "hydra.launcher.wait=false", "norm=none", "seed=7", *SMALL, f"study={STUDY}")
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    with mock.patch.object(slurm, "check_in_worker", return_value=None):  # which takes seconds
        ended = command(folder, "train.py", "-m", *words, PATH=path, PYTHONPATH=str(ROOT / "tests"))
    if ended.value:
        raise RuntimeError(ended.output)


def kill(inputs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(inputs: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail(inputs: Any) -> None:
    raise ValueError("it went wrong")


def diverge(inputs: Any) -> Any:
    return (inputs[0] * float("nan"),)


def train(settings: dict[str, Any], act: Callable[[Any], Any] = lambda _: None, batches: int = 60) -> Ended:
    """Train a run in a process of its own; `act` is called with what the network gets from this batch on."""
    build, numbers = models.build, itertools.count(1)

    def hook(module: Any, inputs: Any) -> Any:
        return act(inputs) if next(numbers) > batches else None

    def built(*arguments: Any, **options: Any) -> Any:
        network = build(*arguments, **options)
        network.register_forward_pre_hook(hook)
        return network

    with mock.patch.object(models, "build", built):
        return watched(lambda: train_run(schema.parse(settings)) and None)


class Tree:
    """The files below a folder, by their names within, as they are to be again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, _contents(folder)

    def restore(self) -> None:
        """Make the folder as it was, whatever became of it."""
        found = _contents(self.folder)
        for name in found:
            if found[name] != self.files.get(name):
                _remove(self.folder / name)
        for name, content in self.files.items():
            if found.get(name) != content:
                path = self.folder / name
                if path.parent.is_symlink() or not path.parent.is_dir():
                    _remove(path.parent)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def changed(self) -> list[str]:
        """Return the names of the files that are not as they were."""
        found = _contents(self.folder)
        return sorted(name for name in found.keys() | self.files.keys() if found.get(name) != self.files.get(name))


def _contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder; of what is none, such as a link, a description."""
    found = {}
    for where, folders, names in os.walk(folder):
        for path in (Path(where, name) for name in (*names, *folders)):
            if path.is_dir() and not path.is_symlink():
                continue
            plain = path.is_file() and not path.is_symlink()
            found[path.relative_to(folder).as_posix()] = path.read_bytes() if plain else b"\0no file\0"
    return found


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
