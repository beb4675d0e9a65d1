"""Shared fixtures: a composed configuration as a user would get it, kept away from the user's own folders."""

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from normlab.config import hydra as cli
from normlab.config import schema as config

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


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make("norm=affine", "batch=8")`: the checked configuration of a run below a temporary folder.

    The folders come after composing, which takes a tenth of a second, so that tests share what is composed.
    """
    folders = {"output_dir": f"{tmp_path}/outputs", "data_dir": f"{tmp_path}/data"}

    def below(*overrides: str) -> config.RunConfig:
        named = {override.split("=")[0] for override in overrides}
        return composed(*overrides).model_copy(update={k: v for k, v in folders.items() if k not in named})

    return below


@pytest.fixture
def tiny(make: Make) -> Make:
    """The same for a run of a second: 40 of the digits, two epochs, one thread, a small network with dropout."""
    small = (
        "model=custom",
        "model.target=small.SmallNet",
        "model.name=small",
        "dataset.train_size=40",
        "dataset.test_size=20",
        "batch=16",
        "epochs=2",
        "threads=1",
        "device=cpu",
        "memory_format=contiguous",
    )
    return lambda *overrides: make(*small, *overrides)
