"""Online normalization against a transcription of both passes in NumPy that goes from image to image."""

from typing import Any

import numpy as np
import pytest
import torch
from norms.oracle import CASES, compare, compare_rounded, images, members
from torch import Tensor, nn

from normlab import models
from normlab.common.errors import UserError
from normlab.norms import Steps, named
from normlab.norms.online import average, powers, recurrence

OPTIONS: dict[str, Any] = {"eps": 1e-5, "alpha_forward": 0.9, "alpha_backward": 0.8}


class ByHand(torch.autograd.Function):
    """The norm alone: gamma, beta and the guard are left to autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, oracle: "Transcription") -> Tensor:  # type: ignore[override]
        ctx.oracle = oracle
        return torch.from_numpy(oracle.forward(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        return torch.from_numpy(ctx.oracle.backward(dy.numpy())), None


class Transcription:
    """Every group begins where the batch before has ended; the mean of their ends, weighted by images, is its end."""

    def __init__(self, k: int | None = None, guard: str = "layer_scaling", **options: Any) -> None:
        options = OPTIONS | options
        self.k, self.guard = k, guard
        self.eps, self.a, self.b = options["eps"], options["alpha_forward"], options["alpha_backward"]
        self.m, self.s2, self.v, self.u = np.zeros(6), np.ones(6), np.zeros(6), np.zeros(6)

    def forward(self, x: Any) -> Any:
        self.y, self.deviation = np.empty_like(x), np.empty(x.shape[:2])
        ends_m, ends_s2 = np.zeros(6), np.zeros(6)
        for index in members(len(x), self.k):
            m, s2 = self.m.copy(), self.s2.copy()
            for i in index:
                self.deviation[i] = np.sqrt(s2 + self.eps)
                self.y[i] = (x[i] - m[:, None, None]) / self.deviation[i][:, None, None]
                mu = x[i].mean((1, 2))
                var = ((x[i] - mu[:, None, None]) ** 2).mean((1, 2))
                s2 = self.a * s2 + (1 - self.a) * var + self.a * (1 - self.a) * (mu - m) ** 2
                m = self.a * m + (1 - self.a) * mu
            ends_m += m * len(index) / len(x)
            ends_s2 += s2 * len(index) / len(x)
        self.m, self.s2 = ends_m, ends_s2
        return self.y.copy()

    def backward(self, dy: Any) -> Any:
        dx, ends_v, ends_u = np.empty_like(dy), np.zeros(6), np.zeros(6)
        for index in members(len(dy), self.k):
            v, u = self.v.copy(), self.u.copy()
            for i in index:
                g = dy[i] - (1 - self.b) * v[:, None, None] * self.y[i]
                v = v + (g * self.y[i]).mean((1, 2))
                dx[i] = g / self.deviation[i][:, None, None] - (1 - self.b) * u[:, None, None]
                u = u + dx[i].mean((1, 2))
            ends_v += v * len(index) / len(dy)
            ends_u += u * len(index) / len(dy)
        self.v, self.u = ends_v, ends_u
        return dx

    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return self.guarded(ByHand.apply(x, self), parameters)

    def evaluate(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        m, deviation = torch.from_numpy(self.m), torch.from_numpy(np.sqrt(self.s2 + self.eps))
        return self.guarded((x - m[:, None, None]) / deviation[:, None, None], parameters)

    def guarded(self, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        z = parameters["weight"][:, None, None] * y + parameters["bias"][:, None, None]
        if self.guard == "clamp":
            return torch.where(z > 1.5, 1.5, torch.where(z < -1.5, -1.5, z))
        if self.guard == "none":
            return z
        return torch.stack([image / torch.sqrt((image**2).sum() / image.numel() + self.eps) for image in z])


def make(k: int | None = None, guard: str = "layer_scaling", **options: Any) -> nn.Module:
    return named("online", norm_batch=k, guard=guard, clamp=1.5, **OPTIONS | options).norm(nn.BatchNorm2d(6))


def steps_of(layer: nn.Module) -> Any:
    """Returns what ends each step before the next, as a training loop does."""
    steps = Steps(layer)
    return lambda step: steps.end() if step else None


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_formula(case: str) -> None:
    layer = make()
    compare(layer, Transcription(), CASES[case], before_step=steps_of(layer), bound=1e-9 if case == "huge" else 1e-10)


@pytest.mark.parametrize("guard", ["clamp", "none"])
def test_other_guards_are_their_formulas(guard: str) -> None:
    layer = make(guard=guard)
    compare(layer, Transcription(guard=guard), CASES["plain"], before_step=steps_of(layer))


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("case", ["odd sizes", "constant channels", "channels last", "1x1 maps"])
def test_groups_inside_the_batch_are_the_formula_for_each(case: str, k: int) -> None:
    layer = make(k)
    compare(layer, Transcription(k), CASES[case], before_step=steps_of(layer))


def test_a_batch_is_its_images_one_by_one() -> None:
    """At batch 1 as at any other: the same outputs, gradients and statistics."""
    (one, other), x, g = (make().double() for _ in range(2)), images(7, 6, 3, 3), images(7, 6, 3, 3, seed=1)
    whole, parts = x.clone().requires_grad_(), x.clone().requires_grad_()
    one(whole).backward(g)
    Steps(one).end()
    for i in range(7):
        other(parts[i : i + 1]).backward(g[i : i + 1])
        Steps(other).end()
    torch.testing.assert_close(whole.grad, parts.grad, rtol=1e-10, atol=1e-12)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_close_to_the_formula(dtype: torch.dtype) -> None:
    layer, bound = make(), 2e-5 if dtype == torch.float32 else 2e-2
    case = lambda step: images(8, 6, 4, 4, seed=step, shift=1.0)  # noqa: E731
    compare_rounded(layer, Transcription(), dtype, case, bound=bound, steps=3, before_step=steps_of(layer))


def test_gradients_become_orthogonal_to_the_output_and_to_constants() -> None:
    """What the two averages of the backward pass are for."""
    layer = make(guard="none", alpha_forward=0.99, alpha_backward=0.95).double()
    steps, generator = Steps(layer), torch.Generator().manual_seed(0)
    shares = []
    for step in range(200):
        x = images(8, 6, 4, 4, seed=step, shift=2.0).requires_grad_()
        y = layer(x)
        noise = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        y.backward(noise + 0.5 * y.detach() + 0.3)
        steps.end()
        shares.append((x.grad.mean(), (x.grad * y.detach()).mean()))
    late = torch.tensor(shares[100:]).mean(0)
    assert late.abs().max() < 0.02
    assert torch.tensor(shares[:1]).abs().max() > 0.2


@pytest.mark.parametrize("count", [1, 2, 3, 8, 129])
def test_recurrences_are_what_their_steps_one_by_one_come_to(count: int) -> None:
    factor, added, start = images(count, 5, seed=1), images(count, 5, seed=2), images(5, seed=3)
    factor[count // 2] = 0
    expected, constant = [start], [start]
    for i in range(count):
        expected.append(factor[i] * expected[-1] + added[i])
        constant.append(0.97 * constant[-1] + added[i])
    torch.testing.assert_close(recurrence(factor, added, start), torch.stack(expected), rtol=1e-12, atol=1e-12)
    ours = average(powers(0.97, count, added.device), added, start)
    torch.testing.assert_close(ours, torch.stack(constant), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("setting", ["sync_stats=true", "precision=fp16", "probe=[sharpness]"])
def test_what_it_cannot_have_is_refused(tiny, setting: str) -> None:
    with pytest.raises(UserError, match="norm=online cannot have"):
        models.build(tiny("norm=online", setting), num_classes=10, image_size=8)
