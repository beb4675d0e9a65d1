"""Group, layer and instance normalization against their formula, and against PyTorch's other kernels."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from norms.oracle import CASES, compare, compare_rounded, images, relative_error
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.norms import GroupNorm, InstanceNorm, LayerNorm, Variant, rewrite
from normlab.norms.group import GroupNorm2d

EPS = 1e-5
# Variants with the number of groups they make of 6 channels.
VARIANTS = {
    "gn": (GroupNorm(groups=3, eps=EPS), 3),
    "ln": (LayerNorm(eps=EPS), 1),
    "in": (InstanceNorm(eps=EPS), 6),
}


class GroupOracle:
    """The formula, group after group."""

    def __init__(self, groups: int) -> None:
        self.groups = groups

    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        parts = []
        for part in x.split(x.shape[1] // self.groups, dim=1):
            mean = part.mean((1, 2, 3), keepdim=True)
            variance = ((part - mean) ** 2).mean((1, 2, 3), keepdim=True)
            parts.append((part - mean) / torch.sqrt(variance + EPS))
        return torch.cat(parts, 1) * parameters["weight"][:, None, None] + parameters["bias"][:, None, None]

    evaluate = train


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_formula(name: str, case: str) -> None:
    variant, groups = VARIANTS[name]
    if case == "1x1 maps" and name == "in":
        pytest.skip("refused, as the next test says")
    compare(variant.norm(nn.BatchNorm2d(6)), GroupOracle(groups), CASES[case])


@pytest.mark.parametrize("images_of_a_batch", [1, 5])
def test_instance_norm_of_1x1_maps_is_refused_in_training_as_torchs_is(images_of_a_batch: int) -> None:
    layer = VARIANTS["in"][0].norm(nn.BatchNorm2d(6)).double()
    x = images(images_of_a_batch, 6, 1, 1)
    for refusing in (layer, nn.InstanceNorm2d(6)):
        with pytest.raises(ValueError, match="Expected more than"):
            refusing(x)
    layer.eval()(x)


def test_layer_norm_is_torchs_layer_norm_with_an_affine_per_channel() -> None:
    layer = LayerNorm(eps=EPS).norm(nn.BatchNorm2d(6)).double()
    nn.init.normal_(layer.weight)
    x = images(4, 6, 5, 3, shift=2.0)
    expected = F.layer_norm(x, x.shape[1:], eps=EPS) * layer.weight[:, None, None]
    assert relative_error(layer(x), expected) < 1e-12


def test_instance_norm_is_torchs_instance_norm() -> None:
    layer = InstanceNorm(eps=EPS).norm(nn.BatchNorm2d(6)).double()
    x = images(4, 6, 5, 3, shift=2.0)
    assert relative_error(layer(x), nn.InstanceNorm2d(6, eps=EPS).double()(x)) < 1e-12


@pytest.mark.parametrize("name", VARIANTS)
def test_an_image_does_not_depend_on_the_others(name: str) -> None:
    layer = VARIANTS[name][0].norm(nn.BatchNorm2d(6)).double()
    x = images(5, 6, 4, 4)
    alone = torch.cat([layer(image[None]) for image in x])
    assert relative_error(layer(x), alone) < 1e-14


def test_group_norm_does_not_change_when_a_group_is_scaled_and_shifted() -> None:
    layer = GroupNorm(groups=3, eps=1e-12).norm(nn.BatchNorm2d(6)).double()
    x, changed = images(3, 6, 4, 4), images(3, 6, 4, 4)
    changed[:, 2:4] = 5 * changed[:, 2:4] - 7
    assert relative_error(layer(changed), layer(x)) < 1e-10
    changed[:, 2] += 10  # a channel of it alone
    assert relative_error(layer(changed), layer(x)) > 0.1


@pytest.mark.parametrize("name", VARIANTS)
def test_lower_precision_is_close_to_the_formula(name: str) -> None:
    """float32: 2e-6 of the largest value; half precision: its rounding of input and output, a mean of 20 not lost."""
    variant, groups = VARIANTS[name]
    layer = variant.norm(nn.BatchNorm2d(6))
    nn.init.normal_(layer.weight, 1.0, 0.5)
    compare_rounded(layer, GroupOracle(groups), torch.float32, lambda step: images(4, 6, 8, 8), bound=2e-6)
    for half in (torch.bfloat16, torch.float16):
        bound = torch.finfo(half).eps
        compare_rounded(layer, GroupOracle(groups), half, lambda step: images(4, 6, 8, 8) + 20, bound=bound)


@pytest.mark.parametrize(("groups", "channels", "valid"), [(32, 48, 24), (5, 6, 6), (4, 3, 3), (64, 10, 10)])
def test_groups_that_do_not_divide_the_channels_are_refused_in_a_sentence(
    groups: int, channels: int, valid: int
) -> None:
    with pytest.raises(UserError, match=rf"{groups} does not divide the {channels} channels .* norm\.groups={valid}\."):
        GroupNorm(groups=groups, eps=EPS).check([channels])


def test_the_groups_proposed_divide_the_channels_of_every_layer() -> None:
    with pytest.raises(UserError, match=r"divides those of all layers is norm\.groups=8"):
        rewrite(torchvision.models.mobilenet_v2(weights=None), GroupNorm(groups=32, eps=EPS))
    rewrite(torchvision.models.mobilenet_v2(weights=None), GroupNorm(groups=8, eps=EPS))


@pytest.mark.parametrize("variant", [GroupNorm(groups=32, eps=EPS), LayerNorm(eps=EPS), InstanceNorm(eps=EPS)])
def test_a_resnets_norms_are_all_replaced_and_keep_their_start(variant: Variant) -> None:
    network = torchvision.models.resnet18(weights=None, zero_init_residual=True)
    norms = {name: m.num_features for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    rewritten = rewrite(network, variant)
    assert not [m for m in rewritten.modules() if isinstance(m, nn.BatchNorm2d)]
    for name, channels in norms.items():
        layer = rewritten.get_submodule(name)
        assert isinstance(layer, GroupNorm2d)
        assert layer.num_groups == {GroupNorm: 32, LayerNorm: 1, InstanceNorm: channels}[type(variant)]
    assert rewritten.get_submodule("layer1.0.bn2").weight.abs().max() == 0
    assert rewritten.get_submodule("layer1.0.bn1").weight.min() == 1


def test_a_basic_block_is_its_formula() -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).double()
    block = network.layer2[0]
    weights = {name: value.clone() for name, value in block.state_dict().items()}
    rewritten = rewrite(copy.deepcopy(network), GroupNorm(groups=32, eps=EPS)).double()

    def norm(x: Tensor) -> Tensor:
        return GroupOracle(32).train(x, {"weight": torch.ones(128).double(), "bias": torch.zeros(128).double()})

    x = images(2, 64, 8, 8)
    inner = norm(F.conv2d(x, weights["conv1.weight"], stride=2, padding=1)).clamp_min(0)
    outer = norm(F.conv2d(inner, weights["conv2.weight"], padding=1))
    shortcut = norm(F.conv2d(x, weights["downsample.0.weight"], stride=2))
    assert relative_error(rewritten.layer2[0](x), (outer + shortcut).clamp_min(0)) < 1e-10
