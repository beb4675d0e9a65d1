"""Shared fixtures: a composed configuration as a user would get it, kept away from the user's own folders."""

import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hydra import compose, initialize_config_dir

from normlab.config import hydra as cli
from normlab.config import schema as config

if TYPE_CHECKING:
    from steps import Steps

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; commands that tests start inherit it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; tests press Ctrl-C in what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
Make = Callable[..., config.RunConfig]


@functools.cache
def composed(*overrides: str) -> config.RunConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return config.parse(cli.settings_of(compose("config", list(overrides))))


# A run of a second: 40 of the digits, two epochs of three steps, one thread, a small network with dropout.
TINY = (
    *("model=custom", "model.target=small.SmallNet", "model.name=small", "dataset.train_size=40"),
    *("dataset.test_size=20", "batch=16", "epochs=2", "threads=1", "device=cpu", "memory_format=contiguous"),
)


def config_in(folder: Path, *overrides: str) -> config.RunConfig:
    """The checked configuration of a run below a folder."""
    return composed(f"output_dir={folder}/outputs", f"data_dir={folder}/data", *overrides)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make("norm=affine", "batch=8")`: the checked configuration of a run below a temporary folder."""
    return functools.partial(config_in, tmp_path)


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
