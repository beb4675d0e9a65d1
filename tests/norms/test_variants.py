"""The arms of Peerthum & Stamp 2023: exact identities, and layers against independent derivations."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.norms import (
    Affine,
    BatchNorm,
    BatchNormMinus,
    ChannelAffine,
    GroupedBatchNorm2d,
    NoNorm,
    find_sites,
    rewrite,
)

EPS = 1e-5
BN = {"eps": EPS, "momentum": 0.1}


def small_resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10).double()


def batch(images: int = 6, size: int = 40) -> Tensor:
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def output_and_gradients(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    images = images.clone().requires_grad_()
    output = network(images)
    output.square().sum().backward()
    assert images.grad is not None
    weights = {n: p.grad for n, p in network.named_parameters() if p.grad is not None and "conv" in n}
    return output, images.grad, weights


def test_batch_norm_at_unit_scale_equals_batch_norm_minus() -> None:
    base = small_resnet()
    bn = rewrite(copy.deepcopy(base), BatchNorm(**BN)).double()
    minus = rewrite(copy.deepcopy(base), BatchNormMinus(**BN)).double()
    for a, b in zip(output_and_gradients(bn, batch()), output_and_gradients(minus, batch()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_affine_at_unit_scale_equals_none() -> None:
    base = small_resnet()
    affine = rewrite(copy.deepcopy(base), Affine()).double()
    none = rewrite(copy.deepcopy(base), NoNorm(conv_bias=False)).double()
    for a, b in zip(output_and_gradients(affine, batch()), output_and_gradients(none, batch()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_affine_folds_into_the_convolution_before_it() -> None:
    convolution = nn.Conv2d(3, 5, 3, bias=False).double()
    affine = ChannelAffine(5).double()
    nn.init.normal_(affine.weight)
    nn.init.normal_(affine.bias)
    folded = F.conv2d(batch(), convolution.weight * affine.weight[:, None, None, None], affine.bias)
    torch.testing.assert_close(affine(convolution(batch())), folded, rtol=1e-12, atol=1e-12)


def test_affine_is_the_same_in_training_and_evaluation() -> None:
    affine = ChannelAffine(3).double()
    torch.testing.assert_close(affine.train()(batch()), affine.eval()(batch()), rtol=0, atol=0)


def test_none_with_biases_starts_at_the_same_function_as_none_without() -> None:
    base = small_resnet()
    with_biases = rewrite(copy.deepcopy(base), NoNorm(conv_bias=True)).double()
    without = rewrite(copy.deepcopy(base), NoNorm(conv_bias=False)).double()
    torch.testing.assert_close(with_biases(batch()), without(batch()), rtol=0, atol=0)
    added = sum(p.numel() for p in with_biases.parameters()) - sum(p.numel() for p in without.parameters())
    assert added == sum(m.num_features for m in base.modules() if isinstance(m, nn.BatchNorm2d))


def test_batch_norm_minus_output_has_the_promised_moments() -> None:
    layer = BatchNormMinus(**BN).norm(nn.BatchNorm2d(3)).double()
    images = batch() * 7 + 3
    output = layer(images)
    variance = images.var((0, 2, 3), correction=0)
    torch.testing.assert_close(output.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(output.var((0, 2, 3), correction=0), variance / (variance + EPS), rtol=1e-10, atol=0)


def grouped_by_the_formula(x: Tensor, k: int, gamma: Tensor, beta: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Group after group with plain autograd: image n below G·k in group n mod G, the rest apart."""
    groups = len(x) // k
    members = [torch.arange(g, groups * k, groups) for g in range(groups)]
    if len(x) % k:
        members.append(torch.arange(groups * k, len(x)))
    output = torch.empty_like(x)
    for index in members:
        part = x[index]
        mean = part.mean((0, 2, 3), keepdim=True)
        variance = ((part - mean) ** 2).mean((0, 2, 3), keepdim=True)
        xhat = (part - mean) / torch.sqrt(variance + EPS)
        output = output.index_put((index,), xhat * gamma[:, None, None] + beta[:, None, None])
    return output, members


@pytest.mark.parametrize(("images", "k"), [(12, 4), (12, 1), (13, 4), (5, 4), (3, 4), (8, 8), (7, 2)])
def test_grouped_batch_norm_equals_the_formula_per_group(images: int, k: int) -> None:
    layer = GroupedBatchNorm2d(3, norm_batch=k, eps=EPS, momentum=0.1).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer.running_mean.normal_()
    before_mean, before_var = layer.running_mean.clone(), layer.running_var.clone()
    ours = batch(images, 5).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    gamma, beta = layer.weight.detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_()

    output = layer(ours)
    expected, members = grouped_by_the_formula(theirs, k, gamma, beta)
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    expected.backward(cotangent)
    for a, b in [
        (output, expected),
        (ours.grad, theirs.grad),
        (layer.weight.grad, gamma.grad),
        (layer.bias.grad, beta.grad),
    ]:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    shares = torch.tensor([len(index) / images for index in members]).double()
    means = torch.stack([theirs[index].mean((0, 2, 3)) for index in members])
    variances = torch.stack([theirs[index].var((0, 2, 3), correction=1) for index in members])
    torch.testing.assert_close(layer.running_mean, 0.9 * before_mean + 0.1 * (shares @ means))
    torch.testing.assert_close(layer.running_var, 0.9 * before_var + 0.1 * (shares @ variances))
    assert layer.num_batches_tracked == 1


def test_grouped_batch_norm_evaluates_like_batch_norm() -> None:
    layer = GroupedBatchNorm2d(3, norm_batch=2).double()
    plain = nn.BatchNorm2d(3).double()
    layer(batch())
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.eval()(batch()), plain.eval()(batch()), rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_grouped_batch_norm_does_not_depend_on_the_memory_format(layout: torch.memory_format) -> None:
    layer = GroupedBatchNorm2d(3, norm_batch=4).double()
    other = copy.deepcopy(layer)
    torch.testing.assert_close(layer(batch().contiguous(memory_format=layout)), other(batch()))


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
    sites = find_sites(torchvision.models.densenet121(weights=None))
    assert {site.norm: site.convolution for site in sites}["features.denseblock1.denselayer1.norm1"] is None


def test_a_network_without_batch_norm_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="has no BatchNorm2d layer"):
        find_sites(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))


def test_a_network_that_branches_on_values_is_refused_in_a_sentence() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match=r"cannot be traced by torch\.fx"):
        find_sites(Branching())


def test_networks_own_start_of_gamma_is_kept() -> None:
    network = torchvision.models.resnet18(weights=None, zero_init_residual=True)
    for variant in (BatchNorm(**BN), BatchNorm(**BN, norm_batch=4), Affine()):
        rewritten = rewrite(copy.deepcopy(network), variant)
        assert rewritten.get_submodule("layer1.0.bn2").weight.abs().max() == 0  # type: ignore[union-attr,operator]
        assert rewritten.get_submodule("layer1.0.bn1").weight.min() == 1  # type: ignore[union-attr,operator]


def test_batch_norm_gradient_equals_the_closed_form() -> None:
    """dL/dx = gamma / sqrt(v + eps) · (g - mean(g) - xhat · mean(g · xhat)), papers.md section 4."""
    layer = BatchNorm(**BN).norm(nn.BatchNorm2d(1)).double()
    nn.init.constant_(layer.weight, 0.7)
    x = batch(4, 3)[:, :1].clone().requires_grad_()
    g = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    layer(x).backward(g)
    mean, variance = x.mean(), x.var(correction=0)
    xhat = (x - mean) / math.sqrt(variance.item() + EPS)
    expected = 0.7 / math.sqrt(variance.item() + EPS) * (g - g.mean() - xhat * (g * xhat).mean())
    torch.testing.assert_close(x.grad, expected.detach(), rtol=1e-10, atol=1e-12)
