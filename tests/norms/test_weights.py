"""The weight reparametrizations of Gitman & Ginsburg 2017, against PyTorch's parametrization and plain formulas."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from norms.oracle import CASES, Oracle, compare, has_single_values, images, members, relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models.resnet import BasicBlock

from normlab.common.errors import UserError
from normlab.norms import (
    MeanOnlyWeightNorm,
    NormProp,
    TReLUWeightNorm,
    Variant,
    WeightNorm,
    data_dependent_start,
    parameter_roles,
    rewrite,
)
from normlab.norms.weights import ReparametrizedConv2d, WeightNormConv2d

WN = {"init": "weights", "eps": 1e-24}
MEAN = {**WN, "momentum": 0.1}
MAKE = {
    "wn": lambda **options: WeightNorm(**{**WN, **options}),
    "wn_mean": lambda **options: MeanOnlyWeightNorm(**{**MEAN, **options}),
    "wn_trelu": lambda **options: TReLUWeightNorm(**{"eps": 1e-6, **options}),
    "normprop": lambda **options: NormProp(**{"eps": 1e-12, **options}),
}
GAINED = ["wn", "wn_mean", "normprop"]


def plain(channels: int = 6, **options: object) -> nn.Conv2d:
    torch.manual_seed(3)
    return nn.Conv2d(channels, channels, 3, **{"padding": 1, "bias": False, **options}).double()  # type: ignore[arg-type]


def site(variant: Variant, convolution: nn.Conv2d) -> nn.Sequential:
    """Convolution, norm and ReLU as the variant makes them: modules "0", "1", "2"."""
    new = variant.convolution(convolution)
    after = variant.norm_and_activation(nn.BatchNorm2d(convolution.out_channels), nn.ReLU())
    return nn.Sequential(new, *after).double()


def unit(v: Tensor, eps: float = 0.0) -> Tensor:
    return torch.stack([row / torch.sqrt((row**2).sum() + eps) for row in v])


def filters(v: Tensor, g: Tensor) -> Tensor:
    return unit(v) * g.reshape(-1, 1, 1, 1)


class WeightNormOracle:
    """PyTorch's own parametrization."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        self.convolution = parametrizations.weight_norm(copy.deepcopy(convolution))
        self.convolution.bias = nn.Parameter(torch.zeros(convolution.out_channels, dtype=torch.float64))

    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        values = {
            "parametrizations.weight.original0": parameters["0.g"][:, None, None, None],
            "parametrizations.weight.original1": parameters["0.weight"],
            "bias": parameters["0.bias"],
        }
        return F.relu(torch.func.functional_call(self.convolution, values, (x,)))

    evaluate = train


class MeanOnlyOracle:
    def __init__(self, k: int | None = None) -> None:
        self.k = k
        self.running_mean = torch.zeros(6, dtype=torch.float64)

    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        t = F.conv2d(x, filters(parameters["0.weight"], parameters["0.g"]), padding=1)
        rows: list[Tensor] = [t[0]] * len(x)
        mean = torch.zeros(6, dtype=torch.float64)
        for member in members(len(x), self.k):
            mu = t[member].mean((0, 2, 3))
            mean += mu.detach() * len(member) / len(x)
            for n in member:
                rows[n] = t[n] - mu[:, None, None] + parameters["1.bias"][:, None, None]
        self.running_mean = 0.9 * self.running_mean + 0.1 * mean
        return F.relu(torch.stack(rows))

    def evaluate(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        t = F.conv2d(x, filters(parameters["0.weight"], parameters["0.g"]), padding=1)
        return F.relu(t - self.running_mean[:, None, None] + parameters["1.bias"][:, None, None])


class TReLUOracle:
    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        z = F.conv2d(x, unit(parameters["0.weight"], eps=1e-6), padding=1)
        return translated(z, parameters["1.bias"])

    evaluate = train


class NormPropOracle:
    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        z = F.conv2d(x, filters(parameters["0.weight"], parameters["0.g"]), parameters["0.bias"], padding=1)
        return propagated(z)

    evaluate = train


def translated(z: Tensor, b: Tensor) -> Tensor:
    """ReLU(z - b) + b: z where that is larger."""
    b = b[:, None, None].expand_as(z)
    return torch.where(z > b, z, b)


def propagated(z: Tensor) -> Tensor:
    rectified = torch.where(z > 0, z, torch.zeros_like(z))
    mean = 0.3989422804014327  # of a rectified standard normal, whose mean square is 1/2
    return (rectified - mean) / math.sqrt(0.5 - mean**2)


def oracle(name: str, convolution: nn.Conv2d, k: int | None = None) -> Oracle:
    if name == "wn":
        return WeightNormOracle(convolution)
    return MeanOnlyOracle(k) if name == "wn_mean" else {"wn_trelu": TReLUOracle, "normprop": NormPropOracle}[name]()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MAKE)
def test_equals_the_oracle(name: str, case: str) -> None:
    compare(site(MAKE[name](), plain()), oracle(name, plain()), CASES[case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 3])
def test_mean_only_equals_the_oracle_in_groups(k: int, case: str) -> None:
    with pytest.raises(ValueError, match="more than one value") if has_single_values(case, k) else nullcontext():
        compare(site(MAKE["wn_mean"](norm_batch=k), plain()), oracle("wn_mean", plain(), k), CASES[case], steps=3)


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 6},
        {"groups": 3, "stride": 2},
        {"dilation": 2, "padding": 2, "padding_mode": "reflect"},
        {"padding": "same"},
        {"kernel_size": (2, 3), "padding": "same", "dilation": (3, 2), "padding_mode": "circular"},
        {"padding": "valid", "padding_mode": "replicate"},
        {"kernel_size": (1, 3), "padding": (0, 1), "padding_mode": "circular"},
    ],
    ids=str,
)
def test_weight_norm_of_every_kind_of_convolution_equals_pytorchs(options: dict[str, object]) -> None:
    """Depthwise and grouped ones among them; their hyper-parameters are those of the convolution it is made from."""
    convolution = nn.Conv2d(6, 6, **{"kernel_size": 3, "padding": 1, "bias": False, **options}).double()  # type: ignore[arg-type]
    compare(site(MAKE["wn"](), copy.deepcopy(convolution)), WeightNormOracle(convolution), CASES["plain"], steps=2)


@pytest.mark.parametrize("name", MAKE)
def test_float32_and_bfloat16_stay_close_to_float64(name: str) -> None:
    layer = site(MAKE[name](), plain())
    x = images(8, 6, 5, 4) + 1
    cotangent = images(8, 6, 5, 4, seed=9)

    def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        output = layer(x)
        output.backward(cotangent.to(output.dtype))
        return [output, x.grad, *(parameter.grad for parameter in layer.parameters())]  # type: ignore[list-item]

    expected = gradients(copy.deepcopy(layer), x)
    single = gradients(copy.deepcopy(layer).float(), x.float())
    assert max(relative_error(a.double(), b) for a, b in zip(single, expected, strict=True)) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients(copy.deepcopy(layer).float(), x.float())
    assert half[0].dtype == torch.bfloat16
    # bfloat16 has 8 bits; where an activation is rounded across its kink a gradient changes as a whole.
    assert max(relative_error(a.double(), b) for a, b in zip(half[:1], expected[:1], strict=True)) < 0.02
    assert max(float(((a.double() - b).norm() / b.norm()).detach()) for a, b in zip(half, expected, strict=True)) < 0.1


@pytest.mark.parametrize("name", MAKE)
def test_weights_are_computed_in_float32_under_autocast(name: str) -> None:
    layer = MAKE[name]().convolution(plain().float())
    expected = layer.effective_weight()
    with torch.autocast("cpu", torch.bfloat16):
        weight = layer.effective_weight()
        weight.sum().backward()
    assert weight.dtype == layer.weight.grad.dtype == torch.float32
    assert torch.equal(weight, expected)


def test_parameters_in_half_precision_are_normalized_in_float32() -> None:
    layer = MAKE["wn"]().convolution(plain()).bfloat16()
    v = layer.weight.double()
    torch.testing.assert_close(layer.effective_weight().double(), filters(v, layer.g.double()), rtol=1e-6, atol=0)
    assert layer(images(2, 6, 4, 4).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [False, True])
def test_weight_norm_starts_as_the_plain_convolution(bias: bool) -> None:
    convolution = plain(bias=bias)
    layer = MAKE["wn"]().convolution(copy.deepcopy(convolution))
    torch.testing.assert_close(layer(images(3, 6, 4, 4)), convolution(images(3, 6, 4, 4)), rtol=1e-14, atol=1e-14)
    assert torch.equal(layer.weight, convolution.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MAKE)
def test_filters_of_zeros_have_finite_gradients_and_leave_zero(name: str, dtype: torch.dtype) -> None:
    """Networks start the last convolution of a residual branch at zero."""
    convolution = plain()
    nn.init.zeros_(convolution.weight[:2])
    layer = site(MAKE[name](), convolution).to(dtype)
    for bias in (p for key, p in layer.named_parameters() if key.endswith("bias")):
        nn.init.constant_(bias, -0.1 if name == "wn_trelu" else 0.1)  # away from the kink, where no gradient passes
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(4):
        optimizer.zero_grad()
        output = layer(images(5, 6, 4, 4).to(dtype))
        (output - images(5, 6, 4, 4, seed=1).to(dtype)).square().sum().backward()
        assert torch.isfinite(output).all()
        for parameter in layer.parameters():
            assert torch.isfinite(parameter.grad).all()
        optimizer.step()
    assert layer[0].effective_weight()[:2].abs().amax((1, 2, 3)).min() > 0


def test_a_filter_of_zeros_gets_the_plain_convolutions_gradient() -> None:
    convolution = plain()
    nn.init.zeros_(convolution.weight)
    layer = MAKE["wn"]().convolution(copy.deepcopy(convolution))
    for module in (layer, convolution):
        module(images(3, 6, 4, 4)).sin().mul(images(3, 6, 4, 4, seed=1)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, convolution.weight.grad, rtol=1e-12, atol=0)


# --- in a network


def block() -> nn.Sequential:
    """torchvision's residual block with a convolution in its shortcut, as at the head of a stage."""
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
    return nn.Sequential(BasicBlock(8, 12, stride=2, downsample=shortcut)).double()


def composed(name: str, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The block by hand, from the parameters of the rewritten one."""

    def convolve(x: Tensor, convolution: str, norm: str, **options: int) -> Tensor:
        v = p[f"0.{convolution}.weight"]
        if name == "wn_trelu":
            return F.conv2d(x, unit(v, 1e-6), **options)
        t = F.conv2d(x, filters(v, p[f"0.{convolution}.g"]), **options)
        shift = p[f"0.{norm}.bias" if name == "wn_mean" else f"0.{convolution}.bias"]
        mean = t.mean((0, 2, 3), keepdim=True) if name == "wn_mean" else 0
        return t - mean + shift[:, None, None]

    y = convolve(x, "conv1", "bn1", stride=2, padding=1)
    activate = {"wn_trelu": lambda z: translated(z, p["0.bn1.bias"]), "normprop": propagated}.get(name, F.relu)
    y = activate(y)
    y = convolve(y, "conv2", "bn2", padding=1)
    return F.relu(y + convolve(x, "downsample.0", "downsample.1", stride=2))


@pytest.mark.parametrize("name", MAKE)
def test_a_residual_block_equals_an_independent_composition(name: str) -> None:
    network = rewrite(block(), MAKE[name]()).double().train()
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * images(*parameter.shape, seed=i))
    parameters = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    x = images(4, 8, 6, 6)
    output, expected = network(x), composed(name, x, parameters)
    cotangent = images(*expected.shape, seed=5)
    output.backward(cotangent)
    expected.backward(cotangent)
    assert relative_error(output, expected) < 1e-11
    for key, parameter in network.named_parameters():
        assert relative_error(parameter.grad, parameters[key].grad) < 1e-10, key


@pytest.mark.parametrize("name", MAKE)
def test_roles_of_parameters(name: str) -> None:
    network = rewrite(block(), MAKE[name]())
    roles = {id(parameter): role for parameter, role, _ in parameter_roles(network)}
    for key, parameter in network.named_parameters():
        own = {"weight": "weight", "g": "scale", "bias": "bias" if "conv" in key or "sample.0" in key else "shift"}
        assert roles[id(parameter)] == own[key.rsplit(".", 1)[1]], key


@pytest.mark.parametrize("name", GAINED)
def test_networks_own_start_of_gamma_and_beta_is_kept(name: str) -> None:
    network = block()
    nn.init.zeros_(network[0].bn2.weight)
    nn.init.constant_(network[0].bn1.bias, 0.5)
    untouched = rewrite(block(), MAKE[name]())
    network = rewrite(network, MAKE[name]())
    assert network.get_submodule("0.conv2").g.abs().max() == 0  # type: ignore[union-attr,operator]
    conv1 = network.get_submodule("0.conv1")
    assert torch.equal(conv1.g, untouched.get_submodule("0.conv1").g)  # type: ignore[arg-type]
    shift = network.get_submodule("0.bn1").bias if name == "wn_mean" else conv1.bias
    assert (shift == 0.5).all()  # type: ignore[union-attr]
    network.double()(images(2, 8, 4, 4)).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())  # type: ignore[arg-type]


def test_biases_of_the_networks_convolutions_stay_where_the_formula_has_one() -> None:
    for name, stays in {"wn": True, "normprop": True, "wn_mean": False, "wn_trelu": False}.items():
        convolution = plain(bias=True)
        bias = MAKE[name]().convolution(copy.deepcopy(convolution)).bias
        assert torch.equal(bias, convolution.bias) if stays else bias is None  # type: ignore[arg-type]


# --- the data-dependent start


@pytest.mark.parametrize("name", ["wn", "wn_mean"])
def test_the_start_from_data_is_the_papers_layer_after_layer(name: str) -> None:
    first, second = plain(stride=2), plain()
    v = [first.weight.detach().clone(), second.weight.detach().clone()]
    variant = MAKE[name](init="data")
    network = nn.Sequential(*site(variant, first), *site(variant, second))
    x = images(8, 6, 8, 8, scale=3, shift=1)
    data_dependent_start(network, x)
    h = x
    for weight, layer, stride in zip(v, [network[0], network[3]], [2, 1], strict=True):
        t = F.conv2d(h, unit(weight), padding=1, stride=stride)
        std, mean = t.std((0, 2, 3), correction=0), t.mean((0, 2, 3))
        torch.testing.assert_close(layer.g, 1 / std, rtol=1e-12, atol=0)  # type: ignore[arg-type]
        if name == "wn":  # the other subtracts each batch's mean
            torch.testing.assert_close(layer.bias, -mean / std, rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]
        h = F.relu((t - mean[:, None, None]) / std[:, None, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_that_are_constant_on_the_batch_keep_their_scale(dtype: torch.dtype) -> None:
    layer = MAKE["wn"](init="data").convolution(plain(padding=0).to(dtype))
    nn.init.zeros_(layer.weight[1])
    layer = WeightNormConv2d.of(layer, gain_start="data", eps=1e-24)
    g = layer.g.detach().clone()
    constant = (2.5 + 1e-6 * images(4, 6, 8, 8)).to(dtype)  # but for rounding
    data_dependent_start(layer, constant)
    torch.testing.assert_close(layer.g, g, rtol=0, atol=0)
    assert layer(constant).abs().max() < 1e-4
    data_dependent_start(layer, images(4, 6, 8, 8).to(dtype))
    assert torch.isfinite(layer.g).all()
    assert layer.g[1] == g[1]
    assert (layer.g != g).sum() == 5


def test_the_start_from_data_leaves_everything_else_as_it_was() -> None:
    network = nn.Sequential(*site(MAKE["wn_mean"](init="data"), plain()), nn.Dropout(0.5), nn.Dropout(0.5).eval())
    network.append(MAKE["wn"](init="data").convolution(plain()))
    network[1].running_mean.normal_()
    network[0].eval()
    state = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    rng = torch.get_rng_state()
    data_dependent_start(network, images(4, 6, 5, 5))
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)  # dropout is off
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, state[name])}
    assert changed == {"0.g", "5.g", "5.bias"}
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert network[0].g.requires_grad
    assert network[0].g.grad_fn is None


def test_the_start_from_data_gives_buffers_back_when_the_forward_pass_fails() -> None:
    network = nn.Sequential(*site(MAKE["wn_mean"](init="data"), plain()), nn.Linear(1, 1))
    network.eval()
    with pytest.raises(RuntimeError):
        data_dependent_start(network, images(4, 6, 5, 5))
    assert network[1].running_mean.abs().max() == 0
    assert not any(module.training for module in network.modules())


# --- what is refused


@pytest.mark.parametrize("name", ["wn_trelu", "normprop"])
def test_activations_other_than_relu_are_refused(name: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.SiLU())
    with pytest.raises(UserError, match=f"norm={name} replaces ReLU .* has SiLU after a norm"):
        rewrite(copy.deepcopy(network), MAKE[name]())
    rewrite(network, MAKE["wn"]())


def test_a_subclass_says_only_what_its_weights_are() -> None:
    class Doubled(ReparametrizedConv2d):
        def effective_weight(self) -> Tensor:
            return 2 * super().effective_weight()

    convolution = plain(stride=2, groups=2, bias=True).eval()
    layer = Doubled.of(copy.deepcopy(convolution))
    x = images(2, 6, 5, 5)
    expected = F.conv2d(x, 2 * convolution.weight, convolution.bias, stride=2, padding=1, groups=2)
    torch.testing.assert_close(layer(x), expected)
    assert not layer.training
    assert repr(layer).startswith("Doubled(6, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=2")
