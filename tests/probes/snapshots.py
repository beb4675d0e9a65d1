"""A step of a training, of any network and loss, and the rows of a probe at it."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.probes import Probe, ProbedNetwork, StepSnapshot


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum()


def moment(network: nn.Module, images: Tensor, targets: Tensor, *, lr: float = 0.1, **given: Any) -> StepSnapshot:
    """The snapshot before step 3, with plain SGD and cross-entropy unless `given` has others."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {
        "optimizer": torch.optim.SGD(trained, lr),
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "transform": None,
        "criterion": F.cross_entropy,
        "forward_context": nullcontext,
        "seed": torch.manual_seed,
        **given,
    }
    return StepSnapshot(3, lr, images, targets, network=network.train(), **options)


def rows(
    kind: type[Probe], at: StepSnapshot, network: nn.Module, sites: tuple[str, ...] = (), **options: Any
) -> list[dict[str, Any]]:
    """The rows of a new probe of a network at a step."""
    return list(kind(ProbedNetwork(network, sites), **options).measure(at))


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
