"""One optimization step on one screen: from a batch to the updated network."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normlab.config.schema import RunConfig
from normlab.norms import Steps
from normlab.training.average import Average
from normlab.training.device import autocast
from normlab.training.optimizers import updating
from normlab.training.tasks import Task


@dataclass(frozen=True)
class TrainingStep:
    """A step, with all that it changes.

    The host reads no value of it (but for the first update of an average), so that an engine may capture a step once
    and replay it.

    Attributes:
        parallel: `network`, or a wrapper of it that adds up its gradients over processes.
        layers: the layers that do something of their own before or after a step.
        transform: changes gradients before each update, or None.
        averaged: moving average of the network's weights, or None.
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

    def __call__(self, images: Tensor, labels: Tensor, batch_images: int) -> tuple[Tensor, Tensor]:
        """Train on a batch, or on a share of a batch of `batch_images` images.

        Returns its loss and its number of correct classifications, scalars on the device.
        """
        self.layers.start()
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.config, self.device):
            outputs = self.parallel(images)
            loss = self.task.share(self.task.loss(outputs, labels), len(labels), batch_images)
        torch.autograd.backward(self.scaler.scale(loss))
        if self.transform:
            self.scaler.unscale_(self.optimizer)
            self.transform()
        with updating(self.device):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.layers.end(lambda: self._outputs(images))
        if self.averaged:
            self.averaged.update_parameters(self.network)
        return loss.detach(), self.task.correct(outputs, labels)

    def _outputs(self, images: Tensor) -> Tensor:
        with autocast(self.config, self.device):
            outputs: Tensor = self.parallel(images)
        return outputs
