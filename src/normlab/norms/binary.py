"""Layers of binary networks, and training these without batch normalization."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normlab.common.registry import option, register
from normlab.norms.layer_statistics import broadcast
from normlab.norms.normalizer_free import ConstantScale, downscale
from normlab.norms.residual import find_branches, insert_after
from normlab.norms.sites import NO_GAMMA, Site, Variant
from normlab.norms.steps import Clock, Role
from normlab.norms.weights import ReparametrizedConv2d


class _Sign(torch.autograd.Function):
    """y = sign(x), dL/dx = dL/dy · 2 max(0, 1 - |x|): that of a piecewise quadratic from -1 at -1 to 1 at 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx: Tensor = dy * (1 - x.abs()).clamp_min(0).mul(2)
        return dx


class BinaryActivation(nn.Module):
    """y = sign(x) for x of any shape, with the gradient of Liu et al. 2018 (Bi-Real Net), 2 max(0, 1 - |x|)."""

    def forward(self, input: Tensor) -> Tensor:
        """Return y, of -1 and 1 (0 at exactly 0)."""
        y: Tensor = _Sign.apply(input)
        return y


class Shift(nn.Module):
    """y = x + b per channel of x (N, C, H, W), learned b (C,) from 0: the threshold of the sign that follows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        """Return y, of x's dtype also under autocast."""
        return (input + broadcast(self.bias)).to(input.dtype)


class RPReLU(nn.Module):
    """y = PReLU(x + a) + b per channel of x (N, C, H, W), learned a, b (C,) from 0 and slopes (C,) from 1/4.

    Liu et al. 2020 (ReActNet), section 4.2.
    """

    roles: ClassVar[dict[str, Role]] = {"before": "shift"}

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.zeros(channels))
        self.weight = nn.Parameter(torch.full((channels,), 0.25))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        """Return y, of x's dtype also under autocast."""
        z = input + broadcast(self.before)
        return (F.prelu(z, self.weight.to(z.dtype)) + broadcast(self.bias)).to(input.dtype)


class _Binarized(torch.autograd.Function):
    """mean|w| · sign(w) per filter of w (O, ...), mean|w| a constant, the sign with the gradient of clip(w, -1, 1).

    w itself, with its own gradient, where the scalar `binary` is 0.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, binary: Tensor) -> Tensor:
        ctx.save_for_backward(w, binary)
        size = w.abs().mean(tuple(range(1, w.dim())), keepdim=True)
        return torch.where(binary > 0, size * w.sign(), w)

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor, None]:
        w, binary = ctx.saved_tensors
        return dw.masked_fill((binary > 0) & (w.abs() > 1), 0.0), None


class BinaryConv2d(ReparametrizedConv2d):
    """A convolution whose weights are binary from some time of a run on: mean|v| · sign(v) per filter of v.

    As in the authors' code of ReActNet: mean|v| is a constant to the gradient, that of v the one of clip(v, -1, 1).
    `clock` has the scalar `binary`, 1 from then on and 0 before, when w = v.
    """

    clock: Clock

    def add_parameters(self) -> None:
        """Register the clock, which all convolutions of a network share."""
        self.clock = vars(self).pop("clock")

    def effective_weight(self) -> Tensor:
        """Return w."""
        w: Tensor = _Binarized.apply(super().effective_weight(), self.clock.get_buffer("binary"))
        return w


class GainedConv2d(ReparametrizedConv2d):
    """A convolution with scaled weight standardization, which may be binary as `BinaryConv2d` is.

    Per filter of v (O, I, kh, kw), with mean mu and biased deviation s over its fan = I·kh·kw weights:

        u = (v - mu) / (s + eps) / sqrt(fan),   w = gain · u,   binary: w = gain · mean|u| · sign(u)

    gain (O, 1, 1, 1) starts at 1. Invariant: u has mean 0 and, but for eps, norm 1 per filter.
    """

    roles: ClassVar[dict[str, Role]] = {"gain": "scale"}

    eps: float
    clock: Clock | None  # of a `BinaryConv2d`

    def add_parameters(self) -> None:
        """Make the gain, and register the clock."""
        self.clock = vars(self).pop("clock")
        self.gain = nn.Parameter(self.per_filter(1.0).view(-1, 1, 1, 1))

    def effective_weight(self) -> Tensor:
        """Return w."""
        v = super().effective_weight()
        s, mu = torch.std_mean(v, (1, 2, 3), correction=0, keepdim=True)
        u = (v - mu) / (s + self.eps) * v[0].numel() ** -0.5
        if self.clock is not None:
            u = _Binarized.apply(u, self.clock.get_buffer("binary"))
        w: Tensor = self.gain.to(u.dtype) * u
        return w


@register(
    "bnn_free", aliases=("bnnnobn", "bnfreebnn", "bnfree"), family="weights, starts and gradients", order=35,
    formula="w = gain · u, u = (v - mean v) / (deviation of v + eps) / sqrt(fan-in), with binary weights gain · mean "
    "abs u · sign(u); h + 0.2 · f(h / beta); sets `optimizer.agc=0.02`",
    source="Chen et al. 2021, 2104.08215, as its code, for `model=binary_resnet`", over="a filter's weights",
    parameters="v, gain", conv="yes", use="binary networks (`model=binary_resnet`) without batch normalization",
    cost="work on weights, constant scalings; clipping",
)  # fmt: skip
class BinaryNormalizerFree(Variant):
    """Binary networks without batch normalization (Chen et al. 2021, 2104.08215), as their code has it.

    Convolutions are `GainedConv2d`, binary where the network's are, and residual branches f are

        h' = h + alpha · f(h / beta),   beta² = the expected variance of h

    which is 1 at the start and grows by alpha² per branch. Where the shortcut has a convolution, that takes h / beta as
    well, and the variance starts again from 1. As in the code, the first branch of the network and those with such a
    shortcut add nothing to it. No biases: the network has shifts of its own. In a network that is not binary it is a
    relative of `nf` without gains at activations and without learned scalars, for comparison [A].

    Invariant: the network's function does not depend on the mean and, but for eps, the length of a filter's v.
    """

    needs_convolution = True
    rewrites = (BinaryConv2d,)
    takes = ()
    refused: ClassVar[dict[str, dict[str, str]]] = {
        "init": NO_GAMMA["init"] | {"fixup": "filters that start at zero have no direction to standardize"}
    }

    alpha: float = option(0.2, gt=0)
    eps: float = option(1e-5, gt=0)

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return the identity."""
        return nn.Identity()

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        """Return a `GainedConv2d`."""
        return GainedConv2d.of(convolution, eps=self.eps, clock=getattr(convolution, "clock", None))

    def graph(self, network: fx.GraphModule, sites: list[Site]) -> None:
        """Scale branches."""
        branches = find_branches(network)
        first = {branch.sum for branch in branches if branch.shortcut_convolutions or branch is branches[0]}
        downscale(network, branches, self.alpha, uncounted=first)
        for branch in branches:
            scale = insert_after(network, branch.end, f"{branch.convolutions[-1]}_scale", ConstantScale(self.alpha))
            branch.sum.replace_input_with(branch.end, scale)
