"""Carries out runs, alone or as one of several processes under torchrun, for training/test_distributed.py.

In float64. In float32 a rounding error now and then takes a value across the kink of a ReLU, after which two runs
differ by far more than by rounding; in float64 what is equal stays equal.
"""

import json
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from steps import Steps
from torch import nn

from normlab import models
from normlab.common.errors import InterruptedRunError
from normlab.config.schema import RunConfig
from normlab.training.distributed import process_group as distributed
from normlab.training.distributed.process_group import ProcessGroup, SingleProcess
from normlab.training.distributed.processes import find
from normlab.training.run import train_run

build = models.build


def build_double(*arguments: Any, **options: Any) -> nn.Module:
    network = build(*arguments, **options).double()
    network.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    return network


def fail() -> None:
    raise TypeError("a bug")


def train_here(
    settings: dict[str, Any], group: ProcessGroup | None = None, stop_at: int | None = None, fail_at: int | None = None
) -> None:
    """Carry out one run. The last process is requested to stop after step `stop_at`, or fails after step `fail_at`."""
    group, steps = group or SingleProcess(), Steps()
    if group.rank == group.world - 1:
        if stop_at:
            steps.stop_after(stop_at, signal.SIGUSR2)
        if fail_at:
            steps.after(fail_at, fail)
    with mock.patch.object(models, "build", build_double), steps.counted(), suppress(InterruptedRunError):
        train_run(RunConfig.model_validate(settings), group=group)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.join(find(), "cpu") as group:
        for plan in json.loads(Path(sys.argv[1]).read_text()):
            train_here(**plan, group=group)
