"""Normalizers of each image by itself: the same in training and evaluation, and at any batch size."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normlab.common.errors import UserError, nearest
from normlab.common.registry import option, register
from normlab.norms.adapter import FullPrecision
from normlab.norms.layer_statistics import full_precision
from normlab.norms.sites import Variant, copy_affine


class GroupNorm2d(FullPrecision, nn.GroupNorm):
    """nn.GroupNorm with float32 statistics and the input's dtype.

    Raises:
        ValueError: in training, if a group is a single value, of which normalization leaves nothing.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W)."""
        if self.training and input[0].numel() == self.num_groups:
            raise ValueError(f"Expected more than one value per group of channels, got maps of {tuple(input.shape)}")
        output = torch.group_norm(full_precision(input), self.num_groups, self.weight, self.bias, self.eps)
        return output.to(input.dtype)


class GroupedVariant(Variant):
    """A variant with `groups` of neighboring channels at each site."""

    groups: int = option(32, ge=1)

    def check(self, channels: Sequence[int]) -> None:
        """Refuse a layer whose channels `groups` does not divide."""
        wrong = [count for count in channels if count % self.groups]
        if wrong:
            common = math.gcd(*channels)
            valid = nearest(self.groups, [g for g in range(1, common + 1) if common % g == 0])
            raise UserError(
                f"norm.groups={self.groups} does not divide the {wrong[0]} channels of a layer; the nearest that"
                f" divides those of all layers is norm.groups={valid}."
            )


@register(
    "gn", aliases=("group", "groupnorm", "groupnormalization"), family="statistics of a sample", order=14,
    formula="gamma · (x - mu) / sqrt(v + eps) + beta", source="Wu & He 2018, 1803.08494",
    over="C / 32 channels, H, W (`norm.groups`)", parameters="gamma, beta",
    use="small batches, which it does not depend on", cost="PyTorch's kernel",
)  # fmt: skip
class GroupNorm(GroupedVariant):
    """Group normalization (Wu & He 2018, 1803.08494), by PyTorch's kernel.

    For x of shape (N, C, H, W), with mean mu and biased variance v per image and group of C / `groups`
    neighboring channels, over those channels and H and W:

        y = gamma · (x - mu) / sqrt(v + eps) + beta      gamma, beta (C,) per channel

    Invariant: an image's output depends on no other image, so `norm_batch` changes nothing.
    """

    eps: float = option(1e-5, gt=0)

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return a `GroupNorm2d`."""
        return copy_affine(norm, GroupNorm2d(self.groups, norm.num_features, eps=self.eps))


@register(
    "ln", aliases=("layer", "layernorm", "layernorm2d", "layernormalization"), family="statistics of a sample",
    order=15,
    formula="the same with one group", source="as in Wu & He 2018", over="C, H, W",
    parameters="gamma, beta per channel",
    use="as `gn`, without a number of groups to choose; the usual norm of transformers", cost="as `gn`",
)  # fmt: skip
class LayerNorm(GroupNorm):
    """Layer normalization of the maps: `GroupNorm` with one group, as in its paper.

    Statistics per image over C, H and W; gamma and beta stay per channel (nn.LayerNorm's are per value).
    """

    groups = 1


@register(
    "in", aliases=("instance", "instancenorm", "instancenorm2d", "instancenormalization"),
    family="statistics of a sample", order=16,
    formula="the same with C groups; 1x1 maps are refused", source="as in Wu & He 2018", over="H, W",
    parameters="gamma, beta", use="images whose contrast should not matter, as in the transfer of styles",
    cost="as `gn`",
)  # fmt: skip
class InstanceNorm(Variant):
    """Instance normalization: `GroupNorm` with a group for each channel, without moving averages.

    Statistics per image and channel over H and W. A network that ends in 1x1 maps is refused: of a single value
    nothing is left, and all images would be classified alike.
    """

    eps: float = option(1e-5, gt=0)

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return a `GroupNorm2d` with a group for each channel."""
        return copy_affine(norm, GroupNorm2d(norm.num_features, norm.num_features, eps=self.eps))
