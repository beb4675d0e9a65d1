"""A training step that is about to be made, and what may be asked of it without changing the run."""

import copy
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from normlab.norms import Steps

Parameters = dict[str, Tensor]


class StepSnapshot:
    """The moment before a training step: the network, its batch, and the optimizer that is about to change it.

    All of it is a copy, so that nothing done here, hooks included, reaches the run; the loop gives the global random
    numbers back. Every evaluation sees the step's own batch, random numbers, mode, autocast and buffers: what a layer
    writes into its buffers in one evaluation (moving averages, say) the next one does not see.

    Args:
        step: 0-based number of the update that is about to be made.
        lr: learning rate of the step, before its divisors.
        network: in training mode, told of the step (`Steps.begin`), without gradients.
        transform: changes gradients before the update, or None; copied with the network.
        loss: of outputs and targets, as in training.
        within: makes the context of a forward pass, e.g. autocast.
        seed: gives the random numbers of a step to the global generator.
        pulse: is called before each evaluation; an exception that it raises ends the measurement.
    """

    order: list[str]  # names of the modules that run, in order of execution; told by `Probes`

    def __init__(
        self,
        step: int,
        lr: float,
        images: Tensor,
        targets: Tensor,
        *,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        transform: Callable[[], None] | None,
        loss: Callable[[Tensor, Tensor], Tensor],
        within: Callable[[], AbstractContextManager[object]],
        seed: Callable[[int], object],
        pulse: Callable[[], object] = lambda: None,
    ) -> None:
        self.step, self.lr = step, lr
        self.images, self.targets = images, targets
        self._run = copy.deepcopy((network, optimizer, scaler, transform))
        self.network = self._run[0]
        self.scale = scaler.get_scale()  # 1 but for fp16
        self._loss, self._within, self._seed, self.pulse = loss, within, seed, pulse

    @property
    def parameters(self) -> Parameters:
        """Those that are trained, by name; without gradient."""
        named = self.network.named_parameters()
        return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}

    def loss(self, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The loss of the step's batch, at other parameters than the network's if they are given."""
        buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        return self._evaluate(lambda images: functional_call(self.network, {**(parameters or {}), **buffers}, images))

    def gradient(
        self, parameters: Parameters | None = None, of: Collection[str] | None = None
    ) -> tuple[Tensor, Parameters]:
        """The loss and its gradients by the trained parameters, or by those named in `of`, as backpropagation has
        them: before any clipping, preconditioning or weight decay; zero for what the loss does not depend on.
        """
        loss, _, gradients = self._backward(parameters or self.parameters, of, create_graph=False)
        return loss.detach(), gradients

    def differentiable(self) -> tuple[list[Tensor], list[Tensor]]:
        """The trained parameters as leaves of a graph, and the gradients by them, to be differentiated once more."""
        _, leaves, gradients = self._backward(self.parameters, None, create_graph=True)
        return list(leaves.values()), list(gradients.values())

    @cached_property
    def here(self) -> tuple[Tensor, Parameters]:
        """`gradient` at the network's own parameters, once for all probes."""
        return self.gradient()

    def updated(self) -> Parameters:
        """The trained parameters as the run's step will leave them: by its optimizer with its momentum and weight
        decay, its change of gradients, and what layers do after a step.
        """
        network, optimizer, scaler, transform = copy.deepcopy(self._run)
        loss = self._evaluate(network)
        scaler.scale(loss).backward()
        if transform:
            scaler.unscale_(optimizer)
            transform()
        scaler.step(optimizer)
        Steps(network).end()
        return {name: value.detach() for name, value in network.named_parameters() if value.requires_grad}

    def executed(self) -> list[str]:
        """The names of the modules that run in a forward pass, in the order in which they first end."""
        names: dict[str, None] = {}
        handles = [
            module.register_forward_hook(lambda *_, name=name: names.setdefault(name))
            for name, module in self.network.named_modules()
        ]
        self.look(handles)
        return list(names)

    def look(self, handles: Collection[Any]) -> None:
        """One forward pass for what hooks see of it; then they are removed."""
        try:
            with torch.no_grad():
                self.loss()
        finally:
            for handle in handles:
                handle.remove()

    def _backward(
        self, parameters: Parameters, of: Collection[str] | None, *, create_graph: bool
    ) -> tuple[Tensor, Parameters, Parameters]:
        wanted = parameters.keys() if of is None else of
        at = {name: value.detach().requires_grad_(name in wanted) for name, value in parameters.items()}
        loss = self.loss(at)
        leaves = {name: value for name, value in at.items() if name in wanted}
        found = torch.autograd.grad(
            loss * self.scale, list(leaves.values()), create_graph=create_graph, materialize_grads=True
        )
        return loss, leaves, {name: value / self.scale for name, value in zip(leaves, found, strict=True)}

    def _evaluate(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        self.pulse()
        self._seed(self.step)
        with self._within():
            return self._loss(network(self.images.clone()), self.targets)  # a network may work in place on its input
