"""MABN and PowerNorm against step-by-step transcriptions of both passes, in NumPy, with windows as lists."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from norms.oracle import CASES, compare, compare_rounded, images, members, relative_error
from torch import Tensor, nn

from normlab.norms import MABN, PowerNorm, Variant, batch_statistics
from normlab.norms.layer_statistics import keep_for_backward

EPS = 1e-5
STEPS = 8
MABN_OPTIONS: dict[str, Any] = {
    "eps": EPS,
    "momentum": 0.02,
    "window": 3,
    "rmax": 5.0,
    "warmup": 0.25,
    "r_from": 0.5,
    "unit": "fraction",
}
POWER_OPTIONS: dict[str, Any] = {"eps": EPS, "alpha": 0.9, "alpha_backward": 0.8, "warmup": 0.25, "unit": "fraction"}


class Transcription:
    """What both papers share, group after group. `step` is the training step it is at."""

    step = 0

    def __init__(self, options: dict[str, Any], k: int | None = None) -> None:
        self.options, self.k = options, k
        self.running: Any = None
        self.chis: list[Any] = []
        self.ratios: list[Any] = []

    @property
    def warming(self) -> bool:
        return self.before("warmup")

    def before(self, option: str) -> bool:
        return self.step / (STEPS if self.options["unit"] == "fraction" else 1) < self.options[option]

    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return ByHand.apply(x, parameters["weight"], parameters["bias"], self)  # type: ignore[no-any-return]

    def evaluate(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        divisor = torch.from_numpy(np.sqrt(self.running + EPS))[:, None, None]
        return x / divisor * parameters["weight"][:, None, None] + parameters["bias"][:, None, None]

    def forward(self, x: Any, gamma: Any, beta: Any) -> Any:
        y = np.empty_like(x)
        self.saved, mean_chi = [], 0.0
        for index in members(len(x), self.k):
            chi = (x[index] ** 2).mean((0, 2, 3))
            s, r = self.divisor(chi)
            z = x[index] / np.sqrt(s + EPS)[:, None, None]
            y[index] = (gamma * r)[:, None, None] * z + beta[:, None, None]
            self.saved.append((index, z, s, r))
            self.ratios.append(r)
            mean_chi = mean_chi + chi * len(index) / len(x)
        self.chis.append(mean_chi)
        newest = max(self.momentum(), 1 / len(self.chis))
        self.running = mean_chi if self.running is None else (1 - newest) * self.running + newest * mean_chi
        return y

    def backward(self, dy: Any, gamma: Any) -> tuple[Any, Any, Any]:
        dx, dgamma = np.empty_like(dy), 0.0
        mean_psi, mean_zz = 0.0, 0.0
        for index, z, s, r in self.saved:
            g = dy[index] * (gamma * r)[:, None, None]
            psi, zz = (g * z).mean((0, 2, 3)), (z * z).mean((0, 2, 3))
            used = psi if self.warming else self.psi(psi)
            dx[index] = (g - z * used[:, None, None]) / np.sqrt(s + EPS)[:, None, None]
            dgamma = dgamma + (dy[index] * z * r[:, None, None]).sum((0, 2, 3))
            mean_psi = mean_psi + psi * len(index) / len(dy)
            mean_zz = mean_zz + zz * len(index) / len(dy)
        self.gradients(mean_psi, mean_zz)
        return dx, dgamma, dy.sum((0, 2, 3))

    divisor: Callable[[Any], tuple[Any, Any]]
    psi: Callable[[Any], Any]
    gradients: Callable[[Any, Any], None]
    momentum: Callable[[], float]


class ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, transcription: Transcription) -> Tensor:  # type: ignore[override]
        ctx.transcription, ctx.gamma = transcription, gamma.detach().numpy()
        y = transcription.forward(x.detach().numpy(), ctx.gamma, beta.detach().numpy())
        return torch.from_numpy(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        return *map(torch.from_numpy, ctx.transcription.backward(dy.numpy(), ctx.gamma)), None


class MABNByHand(Transcription):
    def __init__(self, options: dict[str, Any] = MABN_OPTIONS, k: int | None = None) -> None:
        super().__init__(options, k)
        self.psis: list[Any] = []

    def windowed(self, history: list[Any], newest: Any) -> Any:
        window = [*history, newest][-self.options["window"] :]
        return sum(window) / len(window)

    def divisor(self, chi: Any) -> tuple[Any, Any]:
        s = chi if self.warming else self.windowed(self.chis, chi)
        if self.before("r_from"):
            return s, np.ones_like(s)
        rmax = self.options["rmax"]
        return s, np.clip(np.sqrt(s + EPS) / np.sqrt(self.running + EPS), 1 / rmax, rmax)

    def psi(self, psi: Any) -> Any:  # type: ignore[override]
        return self.windowed(self.psis, psi)

    def gradients(self, psi: Any, zz: Any) -> None:  # type: ignore[override]
        self.psis.append(psi)

    def momentum(self) -> float:  # type: ignore[override]
        return float(self.options["momentum"])


class PowerNormByHand(Transcription):
    def __init__(self, options: dict[str, Any] = POWER_OPTIONS, k: int | None = None) -> None:
        super().__init__(options, k)
        self.nu: Any = 0.0

    def divisor(self, chi: Any) -> tuple[Any, Any]:
        return (chi if self.warming else self.running), np.ones_like(chi)

    def psi(self, psi: Any) -> Any:  # type: ignore[override]
        return self.nu

    def gradients(self, psi: Any, zz: Any) -> None:  # type: ignore[override]
        new = 1 - self.options["alpha_backward"]
        self.nu = self.nu * (1 - new * zz) + new * psi

    def momentum(self) -> float:  # type: ignore[override]
        return float(1 - self.options["alpha"])


BOTH = pytest.mark.parametrize(
    ("variant", "options", "oracle"),
    [(MABN, MABN_OPTIONS, MABNByHand), (PowerNorm, POWER_OPTIONS, PowerNormByHand)],
    ids=["mabn", "powernorm"],
)


def layer_of(variant: Variant, channels: int = 6) -> Any:
    return variant.norm(nn.BatchNorm2d(channels)).double().train()


def stepping(layer: Any, oracle: Transcription) -> Callable[[int], None]:
    def before_step(step: int) -> None:
        if step:
            layer.after_step()
        oracle.step = step
        layer.clock.at_step(step, STEPS)

    return before_step


def compare_with(layer: Any, oracle: Transcription, case: Callable[[int], Tensor], bound: float = 1e-10) -> None:
    compare(layer, oracle, case, steps=STEPS, before_step=stepping(layer, oracle), bound=bound)


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_equals_the_transcription(variant: Any, options: Any, oracle: Any, case: str) -> None:
    compare_with(layer_of(variant(**options)), oracle(), CASES[case])


@BOTH
@pytest.mark.parametrize("case", ["odd sizes", "channels last", "one image"])
@pytest.mark.parametrize("k", [1, 3])
def test_equals_the_transcription_in_groups(variant: Any, options: Any, oracle: Any, case: str, k: int) -> None:
    compare_with(layer_of(variant(**options, norm_batch=k)), oracle(k=k), CASES[case])


@pytest.mark.parametrize("window", [1, 2, 20])
def test_mabn_equals_the_transcription_with_windows_of_all_lengths(window: int) -> None:
    options = MABN_OPTIONS | {"window": window}
    compare_with(layer_of(MABN(**options, norm_batch=3)), MABNByHand(options, 3), CASES["odd sizes"])


@BOTH
def test_phases_can_be_in_steps(variant: Any, options: Any, oracle: Any) -> None:
    options = options | {"unit": "steps", "warmup": 3} | ({"r_from": 6} if "r_from" in options else {})
    compare_with(layer_of(variant(**options)), oracle(options), CASES["plain"])


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_mabn_clips_r(factor: float) -> None:
    oracle = MABNByHand()
    compare_with(layer_of(MABN(**MABN_OPTIONS)), oracle, lambda step: images(4, 6, 3, 3, seed=step) * factor**step)
    assert (oracle.ratios[0], oracle.ratios[-1]) == (pytest.approx(1), pytest.approx(min(max(factor, 0.2), 5)))


def exact(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return (
        F.rms_norm(x.transpose(0, 1), list(x.transpose(0, 1).shape[1:]), eps=EPS).transpose(0, 1) * gamma[:, None, None]
        + (beta[:, None, None])
    )


def warm(variant: Any, options: Any, **more: Any) -> Any:
    """A layer past its phases, after some steps."""
    layer = layer_of(variant(**options, **more))
    for step in range(STEPS - 1):
        layer.clock.at_step(step, STEPS)
        layer(images(6, 6, 4, 4, seed=step)).backward(images(6, 6, 4, 4, seed=step + 50))
        layer.after_step()
    layer.clock.at_step(STEPS - 1, STEPS)
    return layer


def gradient_state(layer: Any) -> dict[str, Tensor]:
    names = ("gradient", "nu")
    return {name: buffer.clone() for name, buffer in layer.named_buffers() if name.startswith(names)}


@BOTH
def test_a_forward_pass_without_backward_leaves_the_gradient_averages(variant: Any, options: Any, oracle: Any) -> None:
    layer = warm(variant, options)
    before = gradient_state(layer)
    layer(images(6, 6, 4, 4, seed=1))
    with torch.no_grad():
        layer(images(6, 6, 4, 4, seed=2))
    layer.after_step()
    torch.testing.assert_close(gradient_state(layer), before, rtol=0, atol=0)
    layer(images(6, 6, 4, 4)).backward(images(6, 6, 4, 4))
    layer.after_step()
    assert any((state != before[name]).any() for name, state in gradient_state(layer).items())


@BOTH
def test_gradients_that_overflowed_are_left_out_of_the_averages(variant: Any, options: Any, oracle: Any) -> None:
    layer = warm(variant, options)
    before = gradient_state(layer)
    layer(images(6, 6, 4, 4)).backward(torch.full((6, 6, 4, 4), torch.inf, dtype=torch.float64))
    layer.after_step()
    torch.testing.assert_close(gradient_state(layer), before, rtol=0, atol=0)


@BOTH
@pytest.mark.parametrize("k", [None, 4])
def test_batch_statistics_in_evaluation_are_the_groups_own_and_change_nothing(
    variant: Any, options: Any, oracle: Any, k: int | None
) -> None:
    layer = warm(variant, options, norm_batch=k).eval()
    before = copy.deepcopy(layer.state_dict())
    x = images(6, 6, 4, 4, scale=3.0).requires_grad_()
    with batch_statistics(layer):
        output = layer(x)
    output.sum().backward()
    parts = [range(6)] if k is None else [range(4), range(4, 6)]
    for part in parts:
        expected = exact(x[part], layer.weight, layer.bias)
        torch.testing.assert_close(output[part], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_close_to_the_transcription(variant: Any, options: Any, oracle: Any, dtype: Any) -> None:
    layer, reference = layer_of(variant(**options, norm_batch=4)).float(), oracle(k=4)
    # bfloat16 rounds the output and the input's gradient once or twice, each to 2^-8 of its size.
    compare_rounded(
        layer,
        reference,
        dtype,
        lambda step: images(6, 6, 8, 8, seed=step, scale=2.0, shift=3.0),
        bound=1e-5 if dtype == torch.float32 else 2**-7,
        steps=STEPS,
        before_step=stepping(layer, reference),
    )
    assert relative_error(layer.running_square.double(), torch.from_numpy(reference.running)) < 1e-5


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("k", [None, 4])
def test_compiled_as_one_graph_it_is_the_same(variant: Any, options: Any, oracle: Any, k: int | None) -> None:
    """Both passes see the averages from before the step, although the forward pass goes on to move them."""
    torch.compiler.reset()
    layer = layer_of(variant(**options, norm_batch=k))
    network = nn.Sequential(nn.Conv2d(3, 6, 1), layer, nn.ReLU()).double()
    reference = copy.deepcopy(network)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for step in range(STEPS):
        ours, theirs = (images(6, 3, 4, 4, seed=step).requires_grad_() for _ in range(2))
        for net, run, x in ((network, compiled, ours), (reference, reference, theirs)):
            net[1].clock.at_step(step, STEPS)
            run(x).square().sum().backward()
            net[1].after_step()
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(network.state_dict(), reference.state_dict())


@pytest.mark.slow
def test_what_is_held_is_not_recomputed_from_a_buffer_that_has_changed_since() -> None:
    torch.compiler.reset()
    buffer = torch.ones(3)

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            factor = keep_for_backward(buffer.clone() * 2)
        y = (x * factor).relu() * factor
        buffer.add_(1)
        return y

    x = torch.ones(3, requires_grad=True)
    torch.compile(step, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert x.grad is not None
    assert (x.grad.tolist(), buffer.tolist()) == ([4.0] * 3, [2.0] * 3)


def test_centered_convolutions_ignore_constants_and_pass_gradients_through_the_mean() -> None:
    convolution = nn.Conv2d(3, 5, 3, bias=False).double()
    centered = MABN(**MABN_OPTIONS).convolution(copy.deepcopy(convolution))
    x = images(2, 3, 6, 6)
    torch.testing.assert_close(centered(x), centered(x + 7), rtol=0, atol=1e-12)
    weight = convolution.weight.detach().clone().requires_grad_()
    flat = weight.flatten(1)
    F.conv2d(x, (flat - flat.mean(1, keepdim=True)).view_as(weight)).square().sum().backward()
    output = centered(x)
    output.square().sum().backward()
    (parameter,) = centered.parameters()
    torch.testing.assert_close(parameter.grad, weight.grad, rtol=1e-12, atol=1e-12)
    assert parameter.grad.sum((1, 2, 3)).abs().max() < 1e-12  # type: ignore[union-attr]
