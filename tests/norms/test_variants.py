"""The arms of Peerthum & Stamp 2023: exact identities, and layers against independent derivations."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import torchvision
from norms.oracle import CASES, compare, has_single_values, members
from small import SmallResNet
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.norms import (
    NAMED,
    Affine,
    BatchNorm,
    BatchNormMinus,
    ChannelAffine,
    GroupedBatchNorm2d,
    NoNorm,
    Variant,
    find_sites,
    named,
    parameter_roles,
    rewrite,
)

EPS = 1e-5
BN = {"eps": EPS, "momentum": 0.1}


def batch(images: int = 6, size: int = 8) -> Tensor:
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def output_and_gradients(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    images = images.clone().requires_grad_()
    output = network(images)
    output.square().sum().backward()
    assert images.grad is not None
    weights = {n: p.grad for n, p in network.named_parameters() if p.grad is not None and "conv" in n}
    return output, images.grad, weights


@pytest.mark.parametrize(
    ("scaled", "plain"),
    [(BatchNorm(**BN), BatchNormMinus(**BN)), (Affine(), NoNorm(conv_bias=False))],
)
def test_at_unit_scale_and_zero_shift_an_arm_equals_the_one_without(scaled: Variant, plain: Variant) -> None:
    base = SmallResNet(10)
    ours, theirs = (rewrite(copy.deepcopy(base), variant).double() for variant in (scaled, plain))
    for a, b in zip(output_and_gradients(ours, batch()), output_and_gradients(theirs, batch()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_affine_folds_into_the_convolution_before_it() -> None:
    convolution = nn.Conv2d(3, 5, 3, bias=False).double()
    affine = ChannelAffine(5).double()
    nn.init.normal_(affine.weight)
    nn.init.normal_(affine.bias)
    folded = F.conv2d(batch(), convolution.weight * affine.weight[:, None, None, None], affine.bias)
    for layer in (affine, copy.deepcopy(affine).eval()):
        torch.testing.assert_close(layer(convolution(batch())), folded, rtol=1e-12, atol=1e-12)


def test_none_with_biases_starts_at_the_same_function_as_none_without() -> None:
    base = SmallResNet(10).double()
    with_biases = rewrite(copy.deepcopy(base), NoNorm(conv_bias=True)).double()
    without = rewrite(copy.deepcopy(base), NoNorm(conv_bias=False)).double()
    torch.testing.assert_close(with_biases(batch()), without(batch()), rtol=0, atol=0)
    added = sum(p.numel() for p in with_biases.parameters()) - sum(p.numel() for p in without.parameters())
    assert added == sum(m.num_features for m in base.modules() if isinstance(m, nn.BatchNorm2d))


class GroupOracle:
    """Group after group; averages of the unbiased variance."""

    def __init__(self, k: int | None) -> None:
        self.k = k
        self.mean, self.var = torch.zeros(6).double(), torch.ones(6).double()

    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        output, mean, var = torch.empty_like(x), torch.zeros(6).double(), torch.zeros(6).double()
        for index in members(len(x), self.k):
            part = x[index]
            biased = ((part - part.mean((0, 2, 3), keepdim=True)) ** 2).mean((0, 2, 3))
            output = output.index_put(
                (torch.tensor(index),), self.normalized(part, part.mean((0, 2, 3)), biased, parameters)
            )
            mean += part.mean((0, 2, 3)).detach() * len(index) / len(x)
            var += part.var((0, 2, 3), correction=1).detach() * len(index) / len(x)
        self.mean, self.var = 0.9 * self.mean + 0.1 * mean, 0.9 * self.var + 0.1 * var
        return output

    def evaluate(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return self.normalized(x, self.mean, self.var, parameters)

    @staticmethod
    def normalized(x: Tensor, mean: Tensor, var: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        xhat = (x - mean[:, None, None]) / torch.sqrt(var + EPS)[:, None, None]
        return xhat * parameters["weight"][:, None, None] + parameters["bias"][:, None, None]


@pytest.mark.parametrize("k", [None, 1, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_grouped_batch_norm_equals_the_formula_per_group(case: str, k: int | None) -> None:
    layer = GroupedBatchNorm2d(6, norm_batch=k, eps=EPS, momentum=0.1)
    refused = pytest.raises(ValueError, match=r"more than (1|one) value")
    with refused if k and has_single_values(case, k) else nullcontext():
        compare(layer, GroupOracle(k), CASES[case])
        assert layer.num_batches_tracked == 4


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", [BatchNorm(**BN), BatchNormMinus(**BN), BatchNorm(**BN, norm_batch=2), Affine()])
def test_half_precision_input_gives_half_precision_output_close_to_float32(variant: object, half: torch.dtype) -> None:
    layer = variant.norm(nn.BatchNorm2d(3))  # type: ignore[attr-defined]
    images = batch().float() + 20  # a mean that half-precision statistics would lose
    expected = copy.deepcopy(layer)(images.to(half).float())
    with torch.autocast("cpu", dtype=half):
        output = layer(images.to(half))
    assert output.dtype == half
    tolerance = 2 * torch.finfo(half).eps * expected.abs().max().item()
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=tolerance)
    if hasattr(layer, "running_mean"):
        assert layer.running_mean.dtype == torch.float32


def test_sites_of_a_resnet_are_all_its_norms_each_with_its_convolution() -> None:
    with torch.device("meta"):
        network = torchvision.models.resnet50(weights=None)
    sites = find_sites(network)
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert sorted(site.norm for site in sites) == sorted(norms)
    pairs = {site.norm: site.convolution for site in sites}
    assert pairs["bn1"] == "conv1"
    assert pairs["layer1.0.bn3"] == "layer1.0.conv3"
    assert pairs["layer1.0.downsample.1"] == "layer1.0.downsample.0"
    activations = {site.norm: site.activation for site in sites}
    assert activations["bn1"] == "relu"
    assert activations["layer1.0.bn3"] is None  # the residual sum comes first


def test_a_norm_before_its_convolution_is_a_site_without_one() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3))
    (site,) = find_sites(network)
    assert (site.norm, site.convolution) == ("0", None)
    for name in (name for name, cls in NAMED.items() if cls.needs_convolution):
        with pytest.raises(UserError, match=f"norm={name} rewrites the convolution before each norm, and 0 of Seq"):
            rewrite(copy.deepcopy(network), named(name))


def test_a_network_without_batch_norm_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="has no batch normalization layer"):
        find_sites(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))


def test_a_network_that_branches_on_values_is_refused_in_a_sentence() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match=r"cannot be traced by torch\.fx"):
        find_sites(Branching())


SCALED = [
    *("affine", "bn", "gn", "ln", "in", "renorm", "lp1", "lp2", "lpinf", "mabn", "powernorm"),
    *("frn", "evonorm_s0", "evonorm_b0", "bn_var", "bn_mean", "online", "dyt", "derf"),
]


@pytest.mark.parametrize("norm_batch", [None, 4])
@pytest.mark.parametrize("name", SCALED)
def test_a_scale_and_a_shift_start_as_the_networks_own(name: str, norm_batch: int | None) -> None:
    bn = nn.BatchNorm2d(32)
    nn.init.zeros_(bn.weight)
    nn.init.constant_(bn.bias, 0.5)
    layer, _ = named(name, norm_batch=norm_batch).norm_and_activation(bn, nn.ReLU())
    parameters = dict(layer.named_parameters())
    assert parameters["weight"].abs().max() == 0
    assert parameters["bias"].eq(0.5).all()
    roles = {id(parameter): role for parameter, role, _ in parameter_roles(layer)}
    assert (roles[id(parameters["weight"])], roles[id(parameters["bias"])]) == ("scale", "shift")
