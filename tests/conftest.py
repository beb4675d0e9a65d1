"""Shared fixtures: a composed configuration as a user would get it, kept away from the user's own folders."""

import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hydra import compose, initialize_config_dir
from terminal import ASKED

from normlab.config import hydra as cli
from normlab.config import schema as config

if TYPE_CHECKING:
    from steps import Steps

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; commands that tests start inherit it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; tests press Ctrl-C in what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "NORMLAB_PRETENDED_GPU" in os.environ:  # see tests/training/test_pretended.py
    import torch

    torch._C._ensureCUDADeviceGuardSet()

for name in (*ASKED, "CONSTRAINTS", "VENV"):  # of the terminal or the CI that runs the tests, not of what they start
    os.environ.pop(name, None)

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that wait for a cluster, so that others run meanwhile; measure no coverage of slow ones.

    Measuring takes them as long again, and most of what they run is run by quick ones, too: see docs/testing.md.
    """
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker("no_cover")


Make = Callable[..., config.RunConfig]


# What a test of every norm has to add for norm=tbbn: classes that come task after task, and what these cannot have.
TASKS = ("sampler=class_incremental", "sampler.memory_batch=2", "norm_batch=null", "eval_stats=running", "epochs=2")


@functools.cache
def composed(*overrides: str) -> config.RunConfig:
    if "norm=tbbn" in overrides and not any(override.startswith("sampler=") for override in overrides):
        overrides += TASKS
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return config.parse(cli.settings_of(compose("config", list(overrides))))


# A run of a second: 40 of the digits, two epochs of three steps, one thread, a small network with dropout.
TINY = (
    *("model=custom", "model.target=small.SmallNet", "model.name=small", "dataset.train_size=40"),
    *("dataset.test_size=20", "batch=16", "epochs=2", "threads=1", "device=cpu", "memory_format=contiguous"),
)


def config_in(folder: Path, *overrides: str) -> config.RunConfig:
    """The checked configuration of a run below a folder.

    The folders come after composing, which takes a tenth of a second, so that tests share what is composed.
    """
    if any(override.startswith("model=") and override != "model=custom" for override in overrides):
        overrides = tuple(override for override in overrides if override not in TINY[:3])  # another network
    named = {override.split("=")[0] for override in overrides}
    folders = {"output_dir": f"{folder}/outputs", "data_dir": f"{folder}/data"}
    return composed(*overrides).model_copy(update={key: value for key, value in folders.items() if key not in named})


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make("norm=affine", "batch=8")`: the checked configuration of a run below a temporary folder."""
    return functools.partial(config_in, tmp_path)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """`command("train.py", "norm=bnn")`: exit status, stdout and stderr of a script in the test's folder."""
    from commands import run_command  # which imports torch

    return functools.partial(run_command, tmp_path)


@pytest.fixture
def tiny(tmp_path: Path) -> Make:
    """The same for a run of a second, `TINY`."""
    return functools.partial(config_in, tmp_path, *TINY)


@pytest.fixture
def steps() -> "Iterator[Steps]":
    """The training steps that this test takes: `steps.taken`, `steps.interrupt(config, after=3)`."""
    from steps import Steps  # imports torch

    with Steps().counted() as counted:
        yield counted
