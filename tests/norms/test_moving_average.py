"""MABN and PowerNorm against step-by-step transcriptions of both passes, in NumPy, with windows as lists."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from norms.oracle import CASES, compare, compare_rounded, images, members, relative_error
from torch import Tensor, nn

from normlab.norms import MABN, PowerNorm, Steps, Variant, batch_statistics
from normlab.norms.layer_statistics import keep_for_backward

EPS = 1e-5
STEPS = 8
MABN_OPTIONS: dict[str, Any] = {
    "eps": EPS,
    "momentum": 0.02,
    "window": 3,
    "rmax": 5.0,
    "warmup": 0.25,
    "r_from": 0.625,
    "unit": "fraction",
}
POWER_OPTIONS: dict[str, Any] = {"eps": EPS, "alpha": 0.9, "alpha_backward": 0.8, "warmup": 0.5, "unit": "fraction"}


class Transcription:
    """What both papers share, group after group. `step` is the training step it is at, from 0."""

    step = 0

    def __init__(self, options: dict[str, Any], k: int | None = None) -> None:
        self.options, self.k = options, k
        self.running: Any = None
        self.batches = 0

    def until(self, option: str, step: int) -> bool:
        return step / (STEPS if self.options["unit"] == "fraction" else 1) < self.options[option]

    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return ByHand.apply(self.before(x), parameters["weight"], parameters["bias"], self)  # type: ignore[no-any-return]

    def evaluate(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        divisor = torch.from_numpy(np.sqrt(self.running + EPS))[:, None, None]
        return self.before(x) / divisor * parameters["weight"][:, None, None] + parameters["bias"][:, None, None]

    def before(self, x: Tensor) -> Tensor:
        return x

    def groups(self, x: Any) -> list[list[list[int]]]:
        """The groups that are normalized together, in the order of the windows: the last, smaller one is apart."""
        *full, last = members(len(x), self.k)
        return [[*full, last]] if not full or len(full[0]) == len(last) else [full, [last]]

    forward: Callable[[Any, Any, Any], Any]
    backward: Callable[[Any, Any], tuple[Any, Any, Any]]


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
    """The window is a list of groups, over which the newest groups of a batch slide one after the other."""

    def __init__(self, options: dict[str, Any] = MABN_OPTIONS, k: int | None = None) -> None:
        super().__init__(options, k)
        self.chis: list[Any] = []
        self.psis: list[Any] = []
        self.ratios: list[Any] = []

    def forward(self, x: Any, gamma: Any, beta: Any) -> Any:
        y = np.empty_like(x)
        window, rmax = self.options["window"], self.options["rmax"]
        self.saved, mean_s = [], 0.0
        for together in self.groups(x):
            own = self.until("warmup", self.step + 1) or len(self.chis) < window
            for index in together:
                self.chis.append((x[index] ** 2).mean((0, 2, 3)))
                s = self.chis[-1] if own else np.mean(self.chis[-window:], axis=0)
                r = np.ones_like(s)
                if not self.until("r_from", self.step) and self.batches:
                    r = np.clip(np.sqrt(s + EPS) / np.sqrt(self.running + EPS), 1 / rmax, rmax)
                z = x[index] / np.sqrt(s + EPS)[:, None, None]
                y[index] = (gamma * r)[:, None, None] * z + beta[:, None, None]
                self.saved.append((index, z, s, r, own))
                self.ratios.append(r)
                of_ema = self.chis[-1] if self.options.get("ema_of") == "batch" else s
                mean_s = mean_s + of_ema * len(index) / len(x)
        first = self.options.get("ema_start") == "first"
        momentum = max(self.options["momentum"], float(not self.batches) if first else 1 / (self.batches + 1))
        self.running = mean_s * momentum + (0 if self.running is None else self.running * (1 - momentum))
        self.batches += 1
        return y

    def backward(self, dy: Any, gamma: Any) -> tuple[Any, Any, Any]:
        dx, dgamma = np.empty_like(dy), 0.0
        *_, (last, *_) = self.saved
        smaller = len(last) < len(self.saved[0][0])  # the last group's backward pass is first
        for index, z, s, r, own in self.saved[-1:] + self.saved[:-1] if smaller else self.saved:
            g = dy[index] * (gamma * r)[:, None, None]
            self.psis.append((g * z).mean((0, 2, 3)))
            psi = (
                self.psis[-1] if own else np.sum(self.psis[-self.options["window"] :], axis=0) / self.options["window"]
            )
            dx[index] = (g - z * psi[:, None, None]) / np.sqrt(s + EPS)[:, None, None]
            dgamma = dgamma + (dy[index] * z * r[:, None, None]).sum((0, 2, 3))
        return dx, dgamma, dy.sum((0, 2, 3))


class PowerNormByHand(Transcription):
    def __init__(self, options: dict[str, Any] = POWER_OPTIONS, k: int | None = None) -> None:
        super().__init__(options, k)
        self.nu: Any = 0.0

    def before(self, x: Tensor) -> Tensor:
        if self.options.get("scale_channels", True):
            return x / torch.sqrt((x**2).sum(1, keepdim=True) / x.shape[1] + EPS)
        return x

    def forward(self, x: Any, gamma: Any, beta: Any) -> Any:
        y = np.empty_like(x)
        self.saved, mean_chi = [], 0.0
        running = np.ones(x.shape[1]) if self.running is None else self.running
        for index in itertools.chain(*self.groups(x)):
            chi = (x[index] ** 2).mean((0, 2, 3))
            phi = chi if self.until("warmup", self.step) else running
            z = x[index] / np.sqrt(phi + EPS)[:, None, None]
            y[index] = gamma[:, None, None] * z + beta[:, None, None]
            self.saved.append((index, z, phi if self.options.get("backward_rms") == "running" else chi))
            mean_chi = mean_chi + chi * len(index) / len(x)
        self.batches += 1
        if self.until("warmup", self.step + 1):
            running = running * (self.batches - 1) / self.batches + mean_chi / self.batches
        self.running = self.options["alpha"] * running + (1 - self.options["alpha"]) * mean_chi
        return y

    def backward(self, dy: Any, gamma: Any) -> tuple[Any, Any, Any]:
        """With the authors' nu, which is ours over 1 - alpha_backward."""
        dx, dgamma, change = np.empty_like(dy), 0.0, 0.0
        for index, z, square in self.saved:
            q = dy[index] * gamma[:, None, None]
            q = q - (1 - self.options["alpha_backward"]) * np.multiply(z, np.reshape(self.nu, (-1, 1, 1)))
            dx[index] = q / np.sqrt(square + EPS)[:, None, None]
            dgamma = dgamma + (dy[index] * z).sum((0, 2, 3))
            change = change + (q * z).mean((0, 2, 3)) * len(index) / len(dy)
        self.nu = self.nu + change
        return dx, dgamma, dy.sum((0, 2, 3))


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
            Steps(layer).end()
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
    options = options | {"unit": "steps", "warmup": 5} | ({"r_from": 6} if "r_from" in options else {})
    compare_with(layer_of(variant(**options)), oracle(options), CASES["plain"])


@pytest.mark.parametrize("k", [None, 2])
def test_settings_of_the_papers_where_the_authors_codes_differ(k: int | None) -> None:
    for changed in ({"ema_of": "batch"}, {"ema_start": "first"}):
        options = MABN_OPTIONS | changed
        compare_with(layer_of(MABN(**options, norm_batch=k)), MABNByHand(options, k), CASES["plain"])
    for changed in ({"scale_channels": False}, {"backward_rms": "running"}):
        options = POWER_OPTIONS | changed
        compare_with(layer_of(PowerNorm(**options, norm_batch=k)), PowerNormByHand(options, k), CASES["plain"])


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
        Steps(layer).end()
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
    Steps(layer).end()
    torch.testing.assert_close(gradient_state(layer), before, rtol=0, atol=0)
    layer(images(6, 6, 4, 4)).backward(images(6, 6, 4, 4))
    Steps(layer).end()
    assert any((state != before[name]).any() for name, state in gradient_state(layer).items())


@BOTH
def test_gradients_that_overflowed_are_left_out_of_the_averages(variant: Any, options: Any, oracle: Any) -> None:
    layer = warm(variant, options)
    before = gradient_state(layer)
    layer(images(6, 6, 4, 4)).backward(torch.full((6, 6, 4, 4), torch.inf, dtype=torch.float64))
    Steps(layer).end()
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
        expected = exact(oracle().before(x)[part], layer.weight, layer.bias)
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
            Steps(net).end()
        torch.testing.assert_close(ours.grad, theirs.grad)
        for one, other in zip(network.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(network.state_dict(), reference.state_dict())


@pytest.mark.slow
def test_what_is_held_is_not_recomputed_from_a_buffer_that_has_changed_since() -> None:
    torch.compiler.reset()
    buffer = torch.ones(3)

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            (factor,) = keep_for_backward(buffer.clone() * 2)
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
