"""Shared fixtures: a composed configuration as a user would get it, kept away from the user's own folders."""

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from terminal import ASKED

from normlab.config import hydra as cli
from normlab.config import schema as config

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; commands that tests start inherit it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; tests press Ctrl-C in what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)

for name in ASKED:  # of the terminal or the CI that runs the tests, which would color and break the lines they read
    os.environ.pop(name, None)

ROOT = Path(__file__).parents[1]
Make = Callable[..., config.RunConfig]


@functools.cache
def composed(*overrides: str) -> config.RunConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return config.parse(cli.settings_of(compose("config", list(overrides))))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make("norm=affine", "batch=8")`: the checked configuration of a run below a temporary folder."""
    folders = (f"output_dir={tmp_path}/outputs", f"data_dir={tmp_path}/data")
    return lambda *overrides: composed(*folders, *overrides)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """`command("train.py", "norm=bnn")`: exit status, stdout and stderr of a script in the test's folder."""
    from commands import run_command  # which imports torch

    return functools.partial(run_command, tmp_path)


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
