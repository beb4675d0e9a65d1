"""Comparing a layer with an oracle: a second derivation from the formula, in plain autograd and float64."""

import copy
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn


class Oracle(Protocol):
    """The formula, with its own state. `parameters` are the layer's, by name, as leaves that require gradients."""

    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """One training step: the output; moving averages, counters and the like move on."""

    def evaluate(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Evaluation by the state as it stands."""


def images(*shape: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift


def _constant(seed: int) -> Tensor:
    x = images(5, 6, 4, 3, seed=seed)
    x[:, 1] = 2.5
    x[:, 4] = 0.0
    return x


# Each makes the input (N, 6, H, W) of a step from its number. Six channels: divisible by 1, 2, 3, 6.
CASES: dict[str, Callable[[int], Tensor]] = {
    "plain": lambda step: images(8, 6, 5, 4, seed=step, scale=1.5, shift=0.3),
    "one image": lambda step: images(1, 6, 5, 4, seed=step),
    "two images": lambda step: images(2, 6, 4, 4, seed=step),
    "odd sizes": lambda step: images(7, 6, 3, 5, seed=step),
    "1x1 maps": lambda step: images(9, 6, 1, 1, seed=step),
    "constant channels": _constant,
    "huge": lambda step: images(4, 6, 4, 4, seed=step, scale=1e6, shift=1e5),
    "tiny": lambda step: images(4, 6, 4, 4, seed=step, scale=1e-6),
    "channels last": lambda step: images(4, 6, 5, 4, seed=step).contiguous(memory_format=torch.channels_last),
    "not contiguous": lambda step: images(4, 12, 4, 5, seed=step)[:, ::2].transpose(2, 3),
    "batch size changes": lambda step: images(4 + step, 6, 4, 4, seed=step),
}


def members(count: int, k: int | None) -> list[list[int]]:
    """The images of each group: image n below G·k is in group n mod G, the rest apart."""
    k = min(k or count, count)
    groups = count // k
    rest = list(range(groups * k, count))
    return [list(range(g, groups * k, groups)) for g in range(groups)] + ([rest] if rest else [])


def has_single_values(case: str, k: int) -> bool:
    """Whether groups of k, or the last one, have one value per channel: statistics of that are refused."""
    return case == "1x1 maps" and 1 in (k, len(CASES[case](0)) % k)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value (over 1e-8, if all are smaller: a gradient that is zero)."""
    return float(((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-8)).detach())


def compare(
    layer: nn.Module,
    oracle: Oracle,
    case: Callable[[int], Tensor],
    *,
    steps: int = 4,
    bound: float = 1e-10,
    before_step: Callable[[int], None] = lambda step: None,
    randomise: bool = True,
) -> None:
    """Several training steps and an evaluation after each: outputs, gradients of the input and of all parameters.

    `before_step(step)` may tell the layer where a run is. The layer becomes float64, and its parameters random
    (around 1) if `randomise`; they change from step to step as in training.
    """
    layer.double().train()
    generator = torch.Generator().manual_seed(7)
    for step in range(steps):
        if randomise:
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        before_step(step)
        ours = case(step).requires_grad_()
        theirs = case(step).clone().requires_grad_()
        parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
        layer.zero_grad()
        output, expected = layer(ours), oracle.train(theirs, parameters)
        assert output.shape == expected.shape
        cotangent = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
        output.backward(cotangent)
        expected.backward(cotangent)
        errors = {"output": relative_error(output, expected), "input": relative_error(ours.grad, theirs.grad)}
        for name, parameter in layer.named_parameters():
            zero = torch.zeros_like(parameter)
            grads = (parameter.grad, parameters[name].grad)
            errors[name] = relative_error(*(zero if grad is None else grad for grad in grads))
        evaluated = copy.deepcopy(layer).eval()(ours.detach())
        errors["evaluation"] = relative_error(evaluated, oracle.evaluate(theirs.detach(), parameters).detach())
        wrong = {name: error for name, error in errors.items() if not error <= bound}
        assert not wrong, f"step {step}: {wrong}"


def compare_rounded(
    layer: nn.Module,
    oracle: Oracle,
    dtype: torch.dtype,
    case: Callable[[int], Tensor],
    *,
    bound: float,
    steps: int = 1,
    before_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Training steps of a float32 layer on inputs of `dtype`, under autocast if it is half precision.

    Output and gradient of the input have that dtype and are the oracle's for the same input, up to `bound`; buffers
    stay float32.
    """
    for step in range(steps):
        before_step(step)
        ours = case(step).to(dtype).requires_grad_()
        theirs = ours.detach().double().requires_grad_()
        with torch.autocast("cpu", dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32):
            output = layer(ours)
        expected = oracle.train(theirs, {name: p.detach().double() for name, p in layer.named_parameters()})
        cotangent = images(*expected.shape, seed=step + 50).to(dtype)
        output.backward(cotangent)
        expected.backward(cotangent.double())
        assert output.dtype == dtype
        assert relative_error(output.double(), expected) < bound
        assert relative_error(ours.grad.double(), theirs.grad) < bound
    assert all(buffer.dtype == torch.float32 for buffer in layer.buffers() if buffer.is_floating_point())
