"""Group, layer and instance normalization against their formula, and against PyTorch's other kernels."""

import pytest
import torch
import torchvision
from norms.oracle import CASES, compare, compare_rounded, images
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.norms import GroupNorm, InstanceNorm, LayerNorm, rewrite

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
        rewrite(torchvision.models.mobilenet_v2(weights=None), GroupNorm(groups=32, eps=EPS))  # not 16, of some
