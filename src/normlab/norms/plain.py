"""Variants without statistics."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.common.registry import option, register
from normlab.norms.sites import NO_GAMMA, Variant, copy_affine


def set_bias(convolution: nn.Conv2d) -> nn.Conv2d:
    """Give a convolution without a bias one that starts at 0; in place."""
    if convolution.bias is None:
        convolution.bias = nn.Parameter(convolution.weight.new_zeros(convolution.out_channels))
    return convolution


class ChannelAffine(nn.Module):
    """y = gamma · x + beta per channel of x (N, C, ...); gamma starts at 1, beta at 0, both float32 (C,)."""

    takes_any_shape = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels), persistent=False)
        self.register_buffer("var", torch.ones(channels), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return gamma · x + beta, of input's dtype.

        By the kernel of batch normalization for evaluation, with mean 0 and variance 1, which makes its result exact:
        one pass forward and one backward, where a product and a sum of their own take several.
        """
        constants = self.get_buffer("mean"), self.get_buffer("var")
        return F.batch_norm(input, *constants, self.weight, self.bias, False, 0.0, 0.0)

    def extra_repr(self) -> str:
        """Return the channels for `repr`."""
        return str(self.weight.numel())


@register(
    "affine", aliases=("affinelayer",), family="BN and its parts", order=1,
    formula="gamma · x + beta", source="Peerthum & Stamp 2023", over="nothing", parameters="gamma, beta",
    use="to see what normalizing buys beyond a scale and a shift", cost="one multiply-add",
)  # fmt: skip
class Affine(Variant):
    """The AffineLayer of Peerthum & Stamp 2023: BatchNorm's shift and scale without its normalization.

    Invariant: at gamma = 1 and beta = 0 it is the identity; it always folds into the convolution before it.
    """

    normalizes = False

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return a `ChannelAffine`."""
        return copy_affine(norm, ChannelAffine(norm.num_features))


@register(
    "none", aliases=("identity", "nonorm"), family="BN and its parts", order=3,
    formula="x; with `norm.conv_bias=true` convolutions without a bias get one", source="Peerthum & Stamp 2023",
    over="nothing", parameters="none", use="the baseline without a norm", cost="nothing",
)  # fmt: skip
@register(
    "bnp", aliases=("batchnormpreconditioning",), family="weights, starts and gradients", order=26,
    needs="optimizer.precondition=bnp", defaults={"conv_bias": True},
    formula="`none` with biases; dW = (g_W - g_b mu^T) / s², db = g_b - dW mu by statistics of each "
    "layer's input (`optimizer.precondition=bnp`)",
    source="BNP-style, after Lange, Helfrich & Ye 2022; the derivation is ours, the paper's exact scaling is not "
    "known to us",
    over="each layer's input over N, H, W of the batch", parameters="none", conv="yes",
    use="to study what statistics of the batch do to the gradient alone; wants a small learning rate",
    cost="one pass over each layer's input", reconstruction=True,
)  # fmt: skip
class NoNorm(Variant):
    """No normalization: y = x.

    With `conv_bias` the convolution has the bias that the norm's shift made superfluous, starting at 0 where the
    network has none; a network's own (VGG has them) stays either way.
    A convolution without one cannot express what `affine` can (a shift per channel): a choice to record.
    """

    normalizes = False
    takes = ()
    refused: ClassVar[dict[str, dict[str, str]]] = NO_GAMMA

    conv_bias: bool = option(False)

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return the identity."""
        return nn.Identity()

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        """Return the convolution, with a bias if `conv_bias`."""
        return set_bias(convolution) if self.conv_bias else convolution
