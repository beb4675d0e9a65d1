"""Arms without statistics."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.norms.sites import NO_GAMMA, Variant, start_as


def scale_and_shift(input: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """input (N, C, H, W) times scale (C,) plus shift (C,), of input's dtype; differentiable in all three.

    By the kernel of batch normalisation for evaluation, with mean 0 and variance 1, which makes its result exact:
    one pass forward and one backward, where a product and a sum of their own take several.
    """
    return F.batch_norm(input, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, False, 0.0, 0.0)


def with_bias(convolution: nn.Conv2d, bias: bool) -> nn.Conv2d:
    """Give it one that starts at 0, if it has none; or take it away."""
    if not bias:
        convolution.bias = None
    elif convolution.bias is None:
        convolution.bias = nn.Parameter(convolution.weight.new_zeros(convolution.out_channels))
    return convolution


class ChannelAffine(nn.Module):
    """y = gamma · x + beta per channel of x (N, C, H, W); gamma starts at 1, beta at 0, both float32 (C,)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        return scale_and_shift(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return str(self.weight.numel())


class Affine(Variant):
    """The AffineLayer of Peerthum & Stamp 2023: BatchNorm's shift and scale without its normalisation.

    Invariant: at gamma = 1 and beta = 0 it is the identity; it always folds into the convolution before it.
    """

    normalises = False

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        return start_as(norm, ChannelAffine(norm.num_features))


class NoNorm(Variant):
    """No normalisation: y = x.

    With `conv_bias` the convolution has the bias that the norm's shift made superfluous, starting at 0 where the
    network has none; a network's own (VGG has them) stays either way.
    A convolution without one cannot express what `affine` can (a shift per channel): a choice to record.
    """

    normalises = False
    refused: ClassVar[dict[str, dict[str, str]]] = NO_GAMMA

    def __init__(self, *, conv_bias: bool, norm_batch: int | None = None) -> None:
        super().__init__(norm_batch=norm_batch)
        self.conv_bias = conv_bias

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        return nn.Identity()

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        return with_bias(convolution, True) if self.conv_bias else convolution
