"""FRN and EvoNorm against their formulas in plain autograd, and the sites they take."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import torchvision
from norms.oracle import CASES, compare, compare_rounded, has_single_values, images, members, relative_error
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.norms import (
    EvoNormB0,
    EvoNormS0,
    FilterResponseNorm,
    Variant,
    parameter_roles,
    rewrite,
)

FRN_EPS = 1e-6
EPS = 1e-5
MOMENTUM = 0.1
FRN = FilterResponseNorm(eps=FRN_EPS, learned_eps=False)
FRN_LEARNED = FilterResponseNorm(eps=FRN_EPS, learned_eps=True)
S0 = EvoNormS0(groups=3, eps=EPS)
B0 = EvoNormB0(eps=EPS, momentum=MOMENTUM)


def per_channel(parameter: Tensor) -> Tensor:
    return parameter[None, :, None, None]


class FrnOracle:
    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        p = {name: per_channel(value) for name, value in parameters.items() if value.dim()}
        eps = FRN_EPS + (abs(parameters["learned_eps"]) if "learned_eps" in parameters else 0)
        nu2 = (x**2).sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
        y = p["weight"] * x / torch.sqrt(nu2 + eps) + p["bias"]
        return torch.maximum(y, p["tau"]) if "tau" in p else y

    evaluate = train


class S0Oracle:
    """Group after group."""

    groups = 3

    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        weight, bias, v = (per_channel(parameters[name]) for name in ("weight", "bias", "v"))
        stds = []
        for part in x.split(x.shape[1] // self.groups, dim=1):
            variance = ((part - part.mean((1, 2, 3), keepdim=True)) ** 2).mean((1, 2, 3), keepdim=True)
            stds.append(torch.sqrt(variance + EPS).expand(-1, part.shape[1], 1, 1))
        gate = (1 + torch.tanh(v * x / 2)) / 2  # the logistic function, without the overflow of exp
        return x * gate / torch.cat(stds, 1) * weight + bias

    evaluate = train


class B0Oracle:
    def __init__(self, channels: int = 6, norm_batch: int | None = None, *, unbiased: bool = False) -> None:
        self.norm_batch, self.unbiased = norm_batch, unbiased
        self.running_var = torch.ones(channels, dtype=torch.float64)

    def divide(self, x: Tensor, batch_var: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        weight, bias, v = (per_channel(parameters[name]) for name in ("weight", "bias", "v"))
        instance_var = ((x - x.mean((2, 3), keepdim=True)) ** 2).mean((2, 3), keepdim=True)
        batch_std = torch.sqrt(batch_var + EPS).expand_as(x)
        return x / torch.maximum(batch_std, v * x + torch.sqrt(instance_var + EPS)) * weight + bias

    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        outputs, newest = {}, torch.zeros_like(self.running_var)
        for group in members(len(x), self.norm_batch):
            part = x[group]
            variance = ((part - part.mean((0, 2, 3), keepdim=True)) ** 2).mean((0, 2, 3), keepdim=True)
            outputs |= dict(zip(group, self.divide(part, variance, parameters), strict=True))
            count = part.numel() / part.shape[1]
            correction = count / (count - 1) if self.unbiased else 1
            newest += variance.detach().flatten() * correction * len(group) / len(x)
        self.running_var = (1 - MOMENTUM) * self.running_var + MOMENTUM * newest
        return torch.stack([outputs[n] for n in range(len(x))])

    def evaluate(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return self.divide(x, per_channel(self.running_var), parameters)


def layer_of(variant: Variant, channels: int = 6, activation: nn.Module | None = None) -> nn.Module:
    return variant.norm_and_activation(nn.BatchNorm2d(channels), activation or nn.ReLU())[0]


ALL: dict[str, tuple[Variant, Callable[[], object]]] = {
    "frn": (FRN, FrnOracle),
    "frn, learned eps": (FRN_LEARNED, FrnOracle),
    "evonorm_s0": (S0, S0Oracle),
    "evonorm_b0": (B0, B0Oracle),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ALL)
def test_equals_the_formula(name: str, case: str) -> None:
    variant, oracle = ALL[name]
    # A 1x1 map becomes its sign: 1 - xhat² of the gradient is about eps / x² = 1e-6, and loses those digits.
    bound = 1e-8 if (name, case) == ("frn", "1x1 maps") else 1e-10
    compare(layer_of(variant), oracle(), CASES[case], bound=bound)


@pytest.mark.parametrize("case", CASES)
def test_frn_without_activation_equals_the_formula_without_threshold(case: str) -> None:
    layer, activation = FRN_LEARNED.norm_and_activation(nn.BatchNorm2d(6), None)
    assert activation is None
    assert "tau" not in dict(layer.named_parameters())
    compare(layer, FrnOracle(), CASES[case])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_b0_in_groups_equals_the_formula_per_group(case: str, k: int) -> None:
    variant = EvoNormB0(eps=EPS, momentum=MOMENTUM, norm_batch=k)
    with pytest.raises(ValueError, match="more than one value") if has_single_values(case, k) else nullcontext():
        compare(layer_of(variant), B0Oracle(norm_batch=k), CASES[case])


@pytest.mark.parametrize("k", [None, 3])
def test_b0_averages_the_unbiased_variance_if_asked(k: int | None) -> None:
    variant = EvoNormB0(eps=EPS, momentum=MOMENTUM, norm_batch=k, unbiased_average=True)
    compare(layer_of(variant), B0Oracle(norm_batch=k, unbiased=True), CASES["odd sizes"])


@pytest.mark.parametrize("name", ALL)
def test_lower_precision_is_close_to_the_formula(name: str) -> None:
    """float32: 2e-6 of the largest value; half precision: its rounding of input and output, once each."""
    variant, oracle = ALL[name]
    layer = layer_of(variant)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    compare_rounded(layer, oracle(), torch.float32, lambda step: images(4, 6, 8, 8), bound=2e-6)
    for half in (torch.bfloat16, torch.float16):
        bound = torch.finfo(half).eps
        compare_rounded(layer, oracle(), half, lambda step: images(4, 6, 8, 8) + 20, bound=bound)


def test_tlu_at_threshold_zero_is_relu_of_frn_and_its_gradient() -> None:
    """Also where y = tau: in channels of zeros, which plain maximum would half pass."""
    layer = layer_of(FRN).double()
    x = images(3, 6, 4, 4)
    x[:, 2] = 0
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    output = layer(ours)
    expected = F.relu(theirs / torch.sqrt((theirs**2).mean((2, 3), keepdim=True) + FRN_EPS))
    cotangent = images(3, 6, 4, 4, seed=1)
    output.backward(cotangent)
    expected.backward(cotangent)
    assert relative_error(output, expected) < 1e-14
    assert relative_error(ours.grad, theirs.grad) < 1e-12


class StemAndBlock(nn.Module):
    """A stem and one of torchvision's BasicBlocks, with its shared ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        down = nn.Sequential(nn.Conv2d(6, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
        self.block = torchvision.models.resnet.BasicBlock(6, 12, stride=2, downsample=down)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(F.relu(self.bn(self.conv(x))))


@pytest.mark.parametrize("name", ["frn", "evonorm_s0", "evonorm_b0"])
def test_a_network_is_its_independently_composed_forward_pass(name: str) -> None:
    torch.manual_seed(0)
    variant = ALL[name][0]
    network = rewrite(StemAndBlock(), variant).double()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    state = {key: value.detach().clone().requires_grad_() for key, value in network.named_parameters()}

    def norm(x: Tensor, place: str, activated: bool) -> Tensor:
        parameters = {
            key.removeprefix(f"{place}."): value for key, value in state.items() if key.startswith(f"{place}.")
        }
        if activated or name == "frn":
            oracle = {"frn": FrnOracle, "evonorm_s0": S0Oracle, "evonorm_b0": lambda: B0Oracle(x.shape[1])}[name]()
            assert ("tau" in parameters or "v" in parameters) == activated
            return oracle.train(x, parameters)
        return x * per_channel(parameters["weight"]) + per_channel(parameters["bias"])

    x = images(4, 3, 8, 8)
    stem = norm(F.conv2d(x, state["conv.weight"], padding=1), "bn", True)
    inner = norm(F.conv2d(stem, state["block.conv1.weight"], stride=2, padding=1), "block.bn1", True)
    outer = norm(F.conv2d(inner, state["block.conv2.weight"], padding=1), "block.bn2", False)
    shortcut = norm(F.conv2d(stem, state["block.downsample.0.weight"], stride=2), "block.downsample.1", False)
    expected = (outer + shortcut).clamp_min(0)
    output = network(x)
    assert relative_error(output, expected) < 1e-10
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    expected.backward(cotangent)
    for key, parameter in network.named_parameters():
        assert relative_error(parameter.grad, state[key].grad) < 1e-9, key


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.ReLU6(), nn.GELU(), nn.LeakyReLU(0.1)])
def test_other_activations_stay_after_frn_and_go_with_evonorm(activation: nn.Module) -> None:
    layer, after = FRN.norm_and_activation(nn.BatchNorm2d(6), activation)
    assert after is activation
    assert layer.tau is None
    for variant in (S0, B0):
        assert isinstance(variant.norm_and_activation(nn.BatchNorm2d(6), activation)[1], nn.Identity)


def test_all_start_at_the_papers_values() -> None:
    frn = dict(layer_of(FRN_LEARNED).named_parameters())
    assert frn["tau"].abs().max() == 0
    assert frn["learned_eps"].item() == pytest.approx(1e-4)
    for variant in (S0, B0):
        assert torch.equal(layer_of(variant).v, torch.ones(6))


def test_the_threshold_is_a_shift_and_v_a_scale() -> None:
    for variant in (FRN_LEARNED, S0, B0):
        layer = layer_of(variant)
        names = {parameter: name for name, parameter in layer.named_parameters()}
        roles = {names[parameter]: role for parameter, role, _ in parameter_roles(layer)}
        expected = {"weight": "scale", "bias": "shift", "tau": "shift", "v": "scale", "learned_eps": "scale"}
        assert roles == {name: expected[name] for name in names.values()}


def test_the_groups_proposed_divide_the_channels() -> None:
    with pytest.raises(UserError, match=r"norm\.groups=4 does not divide the 6 channels .* norm\.groups=3"):
        EvoNormS0(groups=4, eps=EPS).check([6])
