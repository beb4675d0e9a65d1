"""Carries out runs, alone or as one of several processes under torchrun, for training/test_distributed.py.

In float64. In float32 a rounding error now and then takes a value across the kink of a ReLU, after which two runs
differ by far more than by rounding; in float64 what is equal stays equal.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from normlab import models
from normlab.common.errors import InterruptedRunError
from normlab.config.schema import RunConfig
from normlab.training import engines
from normlab.training.distributed import process_group as distributed
from normlab.training.distributed.process_group import ProcessGroup, SingleProcess
from normlab.training.distributed.processes import find
from normlab.training.run import train_run

build, set_learning_rate = models.build, engines.set_learning_rate


def build_double(*arguments: Any, **options: Any) -> nn.Module:
    network = build(*arguments, **options).double()
    network.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    return network


@contextmanager
def before_step(number: int | None, act: Any) -> Iterator[None]:
    """Inside, `act` before training step `number`, counted from 1 and from here."""
    steps = iter(range(1, 10**9))

    def hooked(*arguments: Any) -> None:
        if next(steps) == number:
            act()
        set_learning_rate(*arguments)

    with mock.patch.object(engines, "set_learning_rate", hooked):
        yield


def stop() -> None:
    os.kill(os.getpid(), signal.SIGUSR2)


def fail() -> None:
    raise TypeError("a bug")


def train_here(
    settings: dict[str, Any], group: ProcessGroup | None = None, stop_at: int | None = None, fail_at: int | None = None
) -> None:
    """Carry out one run. The last process is requested to stop at step `stop_at`, or fails at step `fail_at`."""
    group = group or SingleProcess()
    last = group.rank == group.world - 1
    with (
        mock.patch.object(models, "build", build_double),
        before_step(stop_at or fail_at if last else None, stop if stop_at else fail),
        suppress(InterruptedRunError),
    ):
        train_run(RunConfig.model_validate(settings), group=group)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.join(find(), "cpu") as group:
        for plan in json.loads(Path(sys.argv[1]).read_text()):
            train_here(**plan, group=group)
