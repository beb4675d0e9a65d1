"""Fixup and normalizer-free networks: whole networks against forward passes by hand from the papers' formulas."""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from norms.oracle import CASES, compare, images, relative_error
from torch import Tensor, fx, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from normlab import models
from normlab.common.errors import UserError
from normlab.norms import Fixup, NormalizerFree, find_branches, parameter_roles, rewrite
from normlab.norms.normalizer_free import ScalarAffine, ScalarBias, ScalarScale, ScaledStandardConv2d, activation_gain

# The oracle's relative_error takes the float of a tensor with a gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")

Parameters = dict[str, Tensor]
ALPHA, EPS = 0.2, 1e-4
RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))
LAYERS = (2, 1, 2, 1)  # stages with and without a second block, whose entry has another variance
VARIANTS = {"fixup": Fixup(), "fixup, paper": Fixup(stem_shift=True), "nf": NormalizerFree(alpha=ALPHA, eps=EPS)}
BLOCKS = [BasicBlock, Bottleneck]


def small_resnet(block: type[nn.Module] = BasicBlock) -> nn.Module:
    torch.manual_seed(0)
    return ResNet(block, list(LAYERS), num_classes=10)


@functools.cache
def _started(name: str, block: type[nn.Module]) -> nn.Module:
    return rewrite(small_resnet(block), copy.deepcopy(VARIANTS[name])).double()


def started(name: str, block: type[nn.Module] = BasicBlock) -> nn.Module:
    return copy.deepcopy(_started(name, block))


def trained(name: str, block: type[nn.Module] = BasicBlock) -> nn.Module:
    """Parameters away from their start, where zeros would hide errors."""
    network = started(name, block)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.05)
    return network


# The oracles: residual networks of torchvision's layout, one block after the other, parameters by name.


def blocks(block: type[nn.Module]) -> Iterator[tuple[str, bool, list[tuple[int, int]]]]:
    """Name, whether the shortcut has a convolution, and (stride, padding) of each convolution."""
    for stage, count in enumerate(LAYERS):
        for i in range(count):
            stride = 2 if stage > 0 and i == 0 else 1
            projected = i == 0 and (stage > 0 or block is Bottleneck)
            sizes = [(stride, 1), (1, 1)] if block is BasicBlock else [(1, 0), (stride, 1), (1, 0)]
            yield f"layer{stage + 1}.{i}", projected, sizes


def fixup_by_hand(p: Parameters, x: Tensor, block: type[nn.Module]) -> Tensor:
    x = F.conv2d(x + p.get("conv1_shift.bias", 0), p["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(F.relu(x + p["bn1.bias"]), 3, 2, 1)
    for name, projected, sizes in blocks(block):
        first = y = x + p[f"{name}.conv1_shift.bias"]
        for i, (stride, padding) in enumerate(sizes, start=1):
            if i > 1:
                y = F.relu(y + p[f"{name}.bn{i - 1}.bias"]) + p[f"{name}.conv{i}_shift.bias"]
            y = F.conv2d(y, p[f"{name}.conv{i}.weight"], stride=stride, padding=padding)
        if projected:
            stride = max(s for s, _ in sizes)
            x = F.conv2d(first, p[f"{name}.downsample.0.weight"], stride=stride)
        x = F.relu(x + y * p[f"{name}.conv{i}_affine.weight"] + p[f"{name}.conv{i}_affine.bias"])
    return F.linear(x.mean((2, 3)) + p["fc_shift.bias"], p["fc.weight"], p["fc.bias"])


def standardized(v: Tensor, gain: Tensor, eps: float = EPS) -> Tensor:
    rows = v.flatten(1)
    centered = rows - rows.sum(1, keepdim=True) / rows.shape[1]
    filters = gain[:, None] * centered / torch.sqrt((centered * centered).sum(1, keepdim=True) + eps)
    return filters.unflatten(1, v.shape[1:])


def nf_by_hand(p: Parameters, x: Tensor, block: type[nn.Module]) -> Tensor:
    def conv(name: str, x: Tensor, stride: int, padding: int) -> Tensor:
        weight = standardized(p[f"{name}.weight"], p[f"{name}.gain"])
        return F.conv2d(x, weight, p[f"{name}.bias"], stride, padding)

    x = F.max_pool2d(RELU_GAIN * F.relu(conv("conv1", x, 2, 3)), 3, 2, 1)
    variance = 1.0
    for name, projected, sizes in blocks(block):
        y = down = x / math.sqrt(variance)
        for i, (stride, padding) in enumerate(sizes, start=1):
            y = conv(f"{name}.conv{i}", y if i == 1 else RELU_GAIN * F.relu(y), stride, padding)
        branch = ALPHA * p[f"{name}.conv{i}_scale.weight"] * y
        if projected:
            x = RELU_GAIN * F.relu(conv(f"{name}.downsample.0", down, max(s for s, _ in sizes), 0) + branch)
            variance = 1 + ALPHA**2
        else:
            x = F.relu(x + branch)
            variance = variance + ALPHA**2
    return F.linear(x.mean((2, 3)), p["fc.weight"], p["fc.bias"])


BY_HAND = {"fixup": fixup_by_hand, "fixup, paper": fixup_by_hand, "nf": nf_by_hand}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", VARIANTS)
def test_network_equals_the_one_written_by_hand(name: str, block: type[nn.Module]) -> None:
    network = trained(name, block).train()
    parameters = {key: p.detach().clone().requires_grad_() for key, p in network.named_parameters()}
    ours, theirs = images(2, 3, 17, 17).requires_grad_(), images(2, 3, 17, 17).requires_grad_()
    output, expected = network(ours), BY_HAND[name](parameters, theirs, block)
    cotangent = images(2, 10, seed=1)
    output.backward(cotangent)
    expected.backward(cotangent)
    pairs = {"output": (output.detach(), expected.detach()), "input": (ours.grad, theirs.grad)}
    pairs |= {key: (p.grad, parameters[key].grad) for key, p in network.named_parameters()}
    errors = {key: relative_error(*pair) for key, pair in pairs.items()}
    assert {key: error for key, error in errors.items() if not error <= 1e-10} == {}
    assert torch.equal(network.eval()(ours), output)


def test_fixup_starts_with_the_output_zero_and_the_scaled_weights() -> None:
    network, base = started("fixup"), small_resnet().double()
    assert network(images(2, 3, 17, 17)).abs().max() == 0
    factor = 6 ** (-1 / 2)  # 6 branches of 2 convolutions
    for key in ("conv1.weight", "layer2.0.downsample.0.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight"):
        expected = base.get_parameter(key) * (factor if key.endswith("0.conv1.weight") else 1)
        torch.testing.assert_close(network.get_parameter(key), expected, rtol=1e-6, atol=0)
    scalars = {key: p.item() for key, p in network.named_parameters() if p.numel() == 1}
    assert all(value == (1.0 if "affine.weight" in key else 0.0) for key, value in scalars.items())
    assert len(scalars) == 6 * 2 + (1 + 6) + 2 * 6 + 1  # convolutions of branches, activations, branches, fc
    paper = [p for p in started("fixup, paper").parameters() if p.numel() == 1]
    assert len(paper) == len(scalars) + 1  # before the first convolution


def test_a_shortcut_without_parameters_gets_the_first_bias_of_its_branch(make: Any) -> None:
    """The ResNet of He et al. for 32x32 images, whose shortcuts take every second pixel and add channels of zeros."""
    config = make("model=cifar_resnet", "depth=20", "norm=fixup")
    network = models.build(config, num_classes=10, image_size=16).double()
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.add_(images(*parameter.shape, seed=i), alpha=0.1)
    p, x = dict(network.named_parameters()), images(2, 3, 16, 16)
    y = F.relu(F.conv2d(x, p["conv1.weight"], padding=1) + p["bn1.bias"])
    names = [name.removesuffix(".conv2_affine.weight") for name in p if name.endswith(".conv2_affine.weight")]
    assert len(names) == 9
    for number, name in enumerate(names):
        down = number in (3, 6)
        first = y + p[f"{name}.conv1_shift.bias"]
        z = F.relu(
            F.conv2d(first, p[f"{name}.conv1.weight"], stride=2 if down else 1, padding=1) + p[f"{name}.bn1.bias"]
        )
        z = F.conv2d(z + p[f"{name}.conv2_shift.bias"], p[f"{name}.conv2.weight"], padding=1)
        z = z * p[f"{name}.conv2_affine.weight"] + p[f"{name}.conv2_affine.bias"]
        if down:
            y = torch.cat([first[:, :, ::2, ::2], torch.zeros_like(first[:, :, ::2, ::2])], 1)
        y = F.relu(y + z)
    expected = F.linear(y.mean((2, 3)) + p["fc_shift.bias"], p["fc.weight"], p["fc.bias"])
    torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)


def test_roles_of_parameters() -> None:
    for name, expected in {
        "fixup": {"layer1.0.conv1_shift.bias": "shift", "layer1.0.conv2_affine.weight": "scale", "bn1.bias": "shift"},
        "nf": {"layer1.0.conv2_scale.weight": "scale", "conv1.gain": "scale", "conv1.weight": "weight"},
    }.items():
        network = started(name)
        names = {parameter: key for key, parameter in network.named_parameters()}
        roles = {names[parameter]: role for parameter, role, _ in parameter_roles(network)}
        assert expected.items() <= roles.items()


def test_both_start_from_the_weights_that_the_network_has() -> None:
    base = small_resnet().double()
    nf = started("nf")
    for key, weight in base.named_parameters():
        if "bn" not in key and "downsample.1" not in key:
            torch.testing.assert_close(nf.get_parameter(key), weight, rtol=1e-6, atol=0)


# The layers.


class Formula:
    """The oracle of a layer that is the same in training and evaluation."""

    def __init__(self, formula: Callable[[Tensor, Parameters], Tensor]) -> None:
        self.train = self.evaluate = formula


def standard_conv(groups: int = 1) -> ScaledStandardConv2d:
    torch.manual_seed(0)
    return ScaledStandardConv2d.of(nn.Conv2d(6, 4, 3, padding=1, groups=groups, bias=False), eps=EPS)


@pytest.mark.parametrize("case", CASES)
def test_layers_equal_their_formulas(case: str) -> None:
    compare(ScalarBias(), Formula(lambda x, p: x + p["bias"]), CASES[case])
    compare(ScalarAffine(), Formula(lambda x, p: p["weight"] * x + p["bias"]), CASES[case])
    compare(ScalarScale(0.3), Formula(lambda x, p: 0.3 * p["weight"] * x), CASES[case])
    for groups in (1, 2):

        def convolved(x: Tensor, p: Parameters, groups: int = groups) -> Tensor:
            return F.conv2d(x, standardized(p["weight"], p["gain"]), p["bias"], padding=1, groups=groups)

        compare(standard_conv(groups), Formula(convolved), CASES[case])


def test_a_constant_filter_gives_zero_and_finite_gradients() -> None:
    layer = standard_conv()
    nn.init.constant_(layer.weight, 0.3)
    output = layer(images(2, 6, 5, 5).float())
    output.square().sum().backward()
    assert output.abs().max() < 1e-2  # of 0.3 less a float32 mean of 0.3
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.LeakyReLU(0.1)])
def test_the_gain_of_an_activation_makes_a_standard_normal_keep_its_variance(activation: nn.Module) -> None:
    knots, weights = np.polynomial.hermite_e.hermegauss(180)
    y = activation(torch.from_numpy(knots)).numpy()
    mean = (weights @ y) / weights.sum()
    std = math.sqrt(weights @ (y - mean) ** 2 / weights.sum())
    smooth = isinstance(activation, (nn.SiLU, nn.GELU))  # Gauss-Hermite is exact to rounding for these alone
    assert activation_gain(activation) == pytest.approx(1 / std, rel=1e-10 if smooth else 2e-3)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_lower_precision_stays_close_to_float64(name: str, precision: str, bound: float) -> None:
    network = trained(name)
    x = images(2, 3, 17, 17)
    expected = network(x)
    low = copy.deepcopy(network).float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        output = low(x.float())
    output.float().square().sum().backward()
    assert output.dtype == getattr(torch, precision)
    assert relative_error(output.detach().double(), expected.detach()) <= bound
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in low.parameters())


@pytest.mark.parametrize("layer", [ScalarBias(), ScalarAffine(), ScalarScale(0.2), standard_conv()])
def test_half_precision_in_and_out(layer: nn.Module) -> None:
    with torch.autocast("cpu", dtype=torch.float16):
        assert layer(images(2, 6, 4, 4).half()).dtype == torch.float16


def variances(network: nn.Module, x: Tensor) -> dict[str, float]:
    """Of what every node of the graph gives, by the node's name."""
    seen: dict[str, float] = {}

    class Watch(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            output = super().run_node(node)
            if isinstance(output, Tensor):
                seen[node.name] = float(output.var())
            return output

    with torch.no_grad():
        Watch(network).run(x)
    return seen


# What else a variant must stand.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_b0", "regnet_y_400mf"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_residual_networks_start_with_their_shortcuts(name: str, variant: str) -> None:
    torch.manual_seed(0)
    base = torchvision.models.get_model(name, weights=None, num_classes=10)
    network = rewrite(base, copy.deepcopy(VARIANTS[variant])).eval()
    branches = find_branches(network)
    assert len(branches) == {"efficientnet_b0": 9, "regnet_y_400mf": 16}[name]
    seen = variances(network, images(1, 3, 32, 32).float())
    assert [seen[branch.end.name] for branch in branches] == [0.0] * len(branches)
    assert all(math.isfinite(value) for value in seen.values())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def plain_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU()),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)),
    )


def test_nf_of_a_network_without_branches_is_the_convolutions_and_gains() -> None:
    network = rewrite(plain_network(), copy.deepcopy(VARIANTS["nf"])).double()
    p = dict(network.named_parameters())
    x = images(2, 3, 6, 6)
    y = F.conv2d(x, standardized(p["0.weight"], p["0.gain"]), p["0.bias"])
    y = F.conv2d(activation_gain(nn.SiLU()) * F.silu(y), standardized(p["3.weight"], p["3.gain"]), p["3.bias"])
    expected = F.linear((RELU_GAIN * F.relu(y)).flatten(1), p["7.weight"], p["7.bias"])
    torch.testing.assert_close(network(x), expected, rtol=1e-12, atol=1e-12)


def test_fixup_of_a_network_without_branches_is_refused() -> None:
    with pytest.raises(UserError, match="norm=fixup is about residual branches, and Sequential has none"):
        rewrite(plain_network(), Fixup())
