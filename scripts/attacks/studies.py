"""The study that is attacked, made by the code as it is, and its files, which are put back afterwards."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from attacks.watched import Ended, watched
from normlab import models, runs
from normlab.config import schema
from normlab.report import build as build_report
from normlab.report import options, pack_study
from normlab.report.importing import import_runs
from normlab.report.study import index
from normlab.runs import files
from normlab.training.run import train_run

ROOT = Path(__file__).parents[2]
STUDY = "attacked"
SMALL = (
    *("model=custom", "model.target=small.SmallNet", "model.name=small", "dataset.train_size=160", "epochs=2"),
    *("dataset.test_size=40", "device=cpu", "threads=1", "memory_format=contiguous", "probe=[ics]"),
)
IMPORTED = "arm,seed,epoch,test_accuracy\n" + "".join(f"mine,{seed},2,0.{5 + seed}\n" for seed in (0, 1))
SET = {"dataset.name": "digits", "model.name": "small", "depth": 18, "batch": 8, "epochs": 2}


def sweep(folder: Path, *settings: str) -> None:
    """Train runs of the study below `folder`/outputs."""
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "train.py"), "-m", *SMALL, f"study={STUDY}", *settings]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def make(folder: Path) -> Path:
    """Make the study: eight finished runs, and seeds 2 to 6 that were killed, interrupted, failed, diverged
    and planned, imported runs, notes, an order of jobs, a report, an index, and the study as one file."""
    sweep(folder, "norm=bn,none", "batch=8,16", "seed=0,1")
    study = folder / "outputs" / STUDY
    settings = runs.read_config(runs.find(study)[0])
    own = settings | {"checkpoint_seconds": 0.0, "output_dir": str(folder / "outputs")}
    for seed, act in enumerate((kill, interrupt, fail, diverge), start=2):
        train_until(own | {"seed": seed}, 60, act)
    runs.Run(own | {"seed": 6}).freeze()
    (folder / "results.csv").write_text(IMPORTED)
    words = {"source": str(folder / "results.csv"), "columns": None, "ignore": [], "set": SET, "percent": False}
    words |= {"pattern": None, "first_epoch": None, "steps_per_epoch": None, "replace": False}
    import_runs(STUDY, str(folder / "outputs"), words, quiet=True)
    (study / "notes.md").write_text("Made to be attacked.\n")
    (study / "slurm").mkdir()
    tasks = [[{"folder": str(runs.Run(own).folder), "settings": own | {"seed": 7}}]]
    files.write_json(study / "slurm" / "order.json", {"command": [], "submitted": "", "slots": 1, "tasks": tasks})
    with mock.patch.object(index, "WORTH", 1):
        build_report(STUDY, folder / "outputs", options(figures=False, quiet=True))
    pack_study(STUDY, folder / "outputs", quiet=True)
    return study


def kill(inputs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(inputs: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail(inputs: Any) -> None:
    raise ValueError("it went wrong")


def diverge(inputs: Any) -> Any:
    return (inputs[0] * float("nan"),)


def train_until(settings: dict[str, Any], batches: int, act: Callable[[Any], Any]) -> Ended:
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
