"""A moment of a training, of any network and loss, and what a probe finds at it."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.probes import StepSnapshot, Subject


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum()


def moment(network: nn.Module, images: Tensor, targets: Tensor, *, lr: float = 0.1, **given: Any) -> StepSnapshot:
    """The one before step 3, with plain SGD and cross-entropy unless told otherwise."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {
        "optimizer": torch.optim.SGD(trained, lr),
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "transform": None,
        "loss": F.cross_entropy,
        "within": nullcontext,
        "seed": torch.manual_seed,
        **given,
    }
    made = StepSnapshot(3, lr, images, targets, network=network.train(), **options)
    made.order = made.executed()
    return made


def rows(kind: Any, settings: Any, moment: StepSnapshot, network: nn.Module, **subject: Any) -> list[dict[str, Any]]:
    """What a new probe of a network finds at a moment."""
    return list(kind(settings, Subject(network, **subject)).measure(moment))


class Chain(nn.Module):
    """y = w2 · w1 · x for numbers, as two linear layers."""

    def __init__(self, w1: float, w2: float) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.one.weight.fill_(w1)
            self.two.weight.fill_(w2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))
