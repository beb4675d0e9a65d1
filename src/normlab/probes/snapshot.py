"""A training step that is about to be made, to be evaluated without changing the run."""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call

from normlab.norms import Steps

Parameters = dict[str, Tensor]


@dataclass(eq=False)
class StepSnapshot:
    """The state before a training step: the network, its batch, and the optimizer that is about to change it.

    All of it is a copy, so that nothing done here, hooks included, reaches the run; the loop restores the global random
    numbers. Every evaluation sees the step's own batch, random numbers, mode, autocast and buffers: what a layer
    writes into its buffers in one evaluation (moving averages, say) the next one does not see.

    Attributes:
        step: 0-based number of the update that is about to be made.
        lr: learning rate of the step, before its divisors.
        network: in training mode, after `Steps.begin` of the step, without gradients.
        transform: changes gradients before the update, or None; copied with the network.
        criterion: the loss of outputs and targets, as in training.
        forward_context: makes the context of a forward pass, e.g. autocast.
        seed: seeds the global generator for the step of a given number.
        on_evaluation: is called before each evaluation; an exception that it raises ends the measurement.
    """

    step: int
    lr: float
    images: Tensor
    targets: Tensor
    _: KW_ONLY
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    transform: Callable[[], None] | None
    criterion: Callable[[Tensor, Tensor], Tensor]
    forward_context: Callable[[], AbstractContextManager[object]]
    seed: Callable[[int], object]
    on_evaluation: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        self._run = copy.deepcopy((self.network, self.optimizer, self.scaler, self.transform))
        self.network, self.optimizer, self.scaler, self.transform = self._run
        self.loss_scale = self.scaler.get_scale()  # 1 but for fp16

    @property
    def parameters(self) -> Parameters:
        """The trained parameters by name, without gradient."""
        return _trained(self.network)

    def loss(self, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the loss of the step's batch, at other parameters than the network's if they are given."""
        buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        return self._evaluate(lambda images: functional_call(self.network, {**(parameters or {}), **buffers}, images))

    def gradient(
        self, parameters: Parameters | None = None, of: Collection[str] | None = None
    ) -> tuple[Tensor, Parameters]:
        """Return the loss and its gradients by the trained parameters, or by those named in `of`.

        They are those of backpropagation, before any clipping, preconditioning or weight decay; zero for what the loss
        does not depend on.
        """
        loss, _, gradients = self._backward(parameters or self.parameters, of, create_graph=False)
        return loss.detach(), gradients

    def differentiable_gradient(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the trained parameters as leaves of a graph, and gradients by them that can be differentiated."""
        _, leaves, gradients = self._backward(self.parameters, None, create_graph=True)
        return list(leaves.values()), list(gradients.values())

    @cached_property
    def loss_and_gradient(self) -> tuple[Tensor, Parameters]:
        """`gradient` at the network's own parameters, once for all probes."""
        return self.gradient()

    def updated(self) -> Parameters:
        """Return the trained parameters as the run's step will leave them.

        That is by its optimizer with its momentum and weight decay, its change of gradients, and what layers do after a
        step.
        """
        network, optimizer, scaler, transform = copy.deepcopy(self._run)
        torch.autograd.backward(scaler.scale(self._evaluate(network)))
        if transform:
            scaler.unscale_(optimizer)
            transform()
        scaler.step(optimizer)
        Steps(network).end()
        return _trained(network)

    @cached_property
    def execution_order(self) -> list[str]:
        """The names of the modules that run in a forward pass, in the order in which they first end."""
        names: dict[str, None] = {}
        modules = [name for name, _ in self.network.named_modules()]
        self.forward_with_hooks({name: lambda *_, name=name: names.setdefault(name) for name in modules})
        return list(names)

    def in_order(self, layers: Iterable[str]) -> list[str]:
        """Return those of `layers` that run, in order of execution."""
        chosen = set(layers)
        return [name for name in self.execution_order if name in chosen]

    def forward_with_hooks(self, hooks: Mapping[str, Callable[..., None]]) -> None:
        """Run one forward pass with a forward hook at each of the named modules, and remove them."""
        handles = [self.network.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
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
        leaves = {name: value for name, value in at.items() if name in wanted}
        loss = self.loss(at)
        scaled = torch.autograd.grad(
            loss * self.loss_scale, list(leaves.values()), create_graph=create_graph, materialize_grads=True
        )
        return loss, leaves, {name: value / self.loss_scale for name, value in zip(leaves, scaled, strict=True)}

    def _evaluate(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        self.on_evaluation()
        self.seed(self.step)
        with self.forward_context():
            outputs = network(self.images.clone())  # a network may work in place on its input
            return self.criterion(outputs, self.targets)


def _trained(network: nn.Module) -> Parameters:
    return {name: value.detach() for name, value in network.named_parameters() if value.requires_grad}
