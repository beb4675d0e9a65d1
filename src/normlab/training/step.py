"""One optimisation step on one screen: from a batch to the updated network."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normlab.config.schema import RunConfig
from normlab.norms import Steps
from normlab.training.average import Average
from normlab.training.device import autocast
from normlab.training.tasks import Task


@dataclass(frozen=True)
class Step:
    """What a step changes, and how. No value of it is read by the host (but for the first update of an average), so
    that an engine may capture a step once and replay it.

    `parallel` is `network`, or what adds up its gradients over processes; `transform` changes gradients before each
    update; `averaged` follows the network; `layers` are those that do something of their own after a step.
    """

    config: RunConfig
    device: torch.device
    task: Task
    network: nn.Module
    parallel: nn.Module
    layers: Steps
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    transform: Callable[[], None] | None = None
    averaged: Average | None = None

    def __call__(self, images: Tensor, labels: Tensor, of: int) -> tuple[Tensor, Tensor]:
        """Train on a batch, or on a share of a batch `of` so many images; its loss and its number of hits, on the
        device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.config, self.device):
            outputs = self.parallel(images)
            loss = self.task.share(self.task.loss(outputs, labels), len(labels), of)
        self.scaler.scale(loss).backward()
        if self.transform:
            self.scaler.unscale_(self.optimizer)
            self.transform()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.layers.end()
        if self.averaged:
            self.averaged.update_parameters(self.network)
        return loss.detach(), self.task.hits(outputs, labels)
