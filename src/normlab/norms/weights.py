"""Weights that a convolution computes from its parameters: the methods that Gitman & Ginsburg 2017 compare."""

import math
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.common.registry import option, register
from normlab.norms.layer_statistics import BatchStatistics, broadcast, full_precision, per_group, run_hooks
from normlab.norms.plain import set_bias
from normlab.norms.sites import NO_GAMMA, Variant, copy_affine
from normlab.norms.steps import Role


class ReparametrizedConv2d(nn.Conv2d):
    """A convolution with weights w (O, I / groups, kh, kw) that are computed from its parameter `weight`, v.

    Made by `of` from a convolution, whose parameters it takes over. A subclass defines w, and makes parameters of its
    own in `add_parameters`. Invariant: it is an nn.Conv2d, so that v is a weight to optimizers.
    """

    @classmethod
    def of(cls, convolution: nn.Conv2d, **options: Any) -> Self:
        """Return one with the hyper-parameters and parameters of `convolution`, and with `options` as attributes."""
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
        same = {name: getattr(convolution, name) for name in names}
        layer = cls(**same, bias=convolution.bias is not None, device="meta")  # draws no weights
        layer.weight, layer.bias = convolution.weight, convolution.bias
        vars(layer).update(options, training=convolution.training)
        layer.add_parameters()
        return layer

    def add_parameters(self) -> None:
        """Make the parameters of its own, from v."""

    def effective_weight(self) -> Tensor:
        """Return w in float32 or float64, also under autocast."""
        return full_precision(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with w."""
        return self.convolve(input, self.effective_weight().to(self.weight.dtype), self.bias)

    def convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with another weight and bias, otherwise as nn.Conv2d does."""
        if self.padding_mode != "zeros":
            input = F.pad(input, self.pads(), mode=self.padding_mode)
        padding = self.padding if self.padding_mode == "zeros" else 0
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)

    def pads(self) -> list[int]:
        """Return the padding at the left, right, top and bottom."""
        if isinstance(self.padding, str):
            reaches = zip(self.dilation, self.kernel_size, strict=True)
            both = [dilation * (kernel - 1) * (self.padding == "same") for dilation, kernel in reaches]
        else:
            both = [2 * padding for padding in self.padding]
        return [side for pixels in reversed(both) for side in (pixels // 2, pixels - pixels // 2)]

    def per_filter(self, value: float) -> nn.Parameter:
        """Return a parameter (O,) with that value everywhere, float32, on the device of v."""
        return nn.Parameter(torch.full((self.out_channels,), value, device=self.weight.device))


class _NormalizedFilters(torch.autograd.Function):
    """w = g · v / n with n = sqrt(sum v² + eps) per filter of v (O, ...), for g (O,); all float32 or float64.

        dL/dg = <dL/dw, v> / n,   dL/dv = g/n · (dL/dw - dL/dg · v / n)

    Half the time of plain autograd on the weights of a large convolution.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, eps: float) -> Tensor:
        n = _length(v, eps)
        ctx.save_for_backward(v, g, n)
        ctx.eps = eps
        return v * _per_filter(g / n, v)

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
        v, g, n = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives, of which n is a part
            n = _length(v, ctx.eps)
        dg = (dw * v).flatten(1).sum(1) / n
        dv = torch.addcmul(dw, v, _per_filter(-dg / n, v)).mul_(_per_filter(g / n, v))
        return dv, dg, None


def _length(v: Tensor, eps: float) -> Tensor:
    squares = torch.linalg.vector_norm(v, dim=tuple(range(1, v.dim()))).square()
    return torch.sqrt(squares + eps)


def _per_filter(values: Tensor, v: Tensor) -> Tensor:
    return values.view(-1, *[1] * (v.dim() - 1))


class UnitNormConv2d(ReparametrizedConv2d):
    """Convolution with filters of norm 1 and nothing learned beside v: w = v / sqrt(sum v² + eps).

    Invariant: multiplying v by a constant changes nothing, so that dL/dv is orthogonal to v (but for eps).
    """

    eps: float

    def length(self) -> Tensor:
        """Return sqrt(sum v² + eps) per filter (O,)."""
        return _length(full_precision(self.weight), self.eps)

    def gain(self) -> Tensor:
        """Return g (O,)."""
        return full_precision(self.weight).new_ones(self.out_channels)

    def effective_weight(self) -> Tensor:
        """Return w."""
        v = full_precision(self.weight)
        w: Tensor = _NormalizedFilters.apply(v, self.gain().to(v.dtype), self.eps)
        return w


class WeightNormConv2d(UnitNormConv2d):
    """Convolution with weight normalization: w = g · v / sqrt(sum v² + eps) per filter of v, learned g (O,).

    At an all-zero filter eps = 1e-24 keeps all gradients finite, and that of v the plain convolution's if g = ||v||.
    `gain_start` is what g starts at: "weights" (||v||, so that w = v), "data" (see `start_from_data`; until then as
    "weights") or "one".
    """

    roles: ClassVar[dict[str, Role]] = {"g": "scale"}

    gain_start: str

    def add_parameters(self) -> None:
        """Make g."""
        self.g = self.per_filter(1.0) if self.gain_start == "one" else nn.Parameter(self.length().detach())
        if self.starts_from_data and self.bias is not None:
            nn.init.zeros_(self.bias)

    def gain(self) -> Tensor:
        """Return g (O,)."""
        return self.g

    def apply_affine(self, norm: nn.BatchNorm2d) -> None:
        """Multiply g by the norm's gamma, and add its beta to the bias, e.g. zero in the last layer of a branch."""
        with torch.no_grad():
            self.g.mul_(norm.weight)
            if self.bias is not None:
                self.bias.add_(norm.bias)

    @property
    def starts_from_data(self) -> bool:
        """Return whether `data_dependent_start` changes it."""
        return self.gain_start == "data"

    def start_from_data(self, input: Tensor) -> None:
        """Set g and b so that the output of the layer's first batch x has mean 0 and std 1.

        g = 1/std(t) and b = -mean(t)/std(t) with t = v·x / ||v||, biased std over images, H and W. Where gamma does not
        start at 1, the std is gamma.

        A filter whose output is constant on the batch keeps its g, as it has no scale.
        """
        with torch.no_grad():
            t = full_precision(self.convolve(input, _unit(self.weight, self.eps), None)).double()
            variance, mean = torch.var_mean(t, (0, 2, 3), correction=0)
            std = variance.sqrt()
            # Rounding gives a constant output a relative std of about 1e-6.
            varies = std > 1e-5 * (variance + mean.square()).sqrt().clamp_min(1e-7)
            self.g.copy_(torch.where(varies, self.g / self.length() / std, self.g))
            if self.bias is not None:  # which is beta so far, where the network starts that elsewhere than at 0
                self.bias.sub_(mean * self.g)


def _unit(v: Tensor, eps: float) -> Tensor:
    return (v / _per_filter(_length(full_precision(v), eps), v)).to(v.dtype)


def data_dependent_start(network: nn.Module, images: Tensor) -> None:
    """Start the layers that want it from their input for `images` (N, 3, H, W), in order of execution; in place.

    One forward pass in training mode, without dropout; buffers and modes stay as they are. Nothing happens if there
    is no such layer. Once, before the first step: it changes a layer that it has changed before.
    """

    def start(layer: WeightNormConv2d, inputs: tuple[Tensor]) -> None:
        layer.start_from_data(*inputs)

    layers = [module for module in network.modules() if getattr(module, "starts_from_data", False)]
    if layers:
        run_hooks(network, images, [layer.register_forward_pre_hook(start) for layer in layers])


class MeanOnlyBatchNorm2d(BatchStatistics):
    """y = x - mu + beta per channel of x (N, C, H, W), mu the batch's mean, in evaluation a moving average.

    Invariant: dL/dx sums to 0 per channel, and the channel's scale passes.
    """

    averages: ClassVar[dict[str, float]] = {"running_mean": 0.0}
    running_mean: Tensor

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.register_parameter("weight", None)

    def normalize(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `BatchStatistics.normalize`."""
        mu = self.batch_mean(full_precision(input))
        return _shift(input, per_group(self.bias, groups) - mu), (mu.detach(),)

    def evaluate(self, input: Tensor) -> Tensor:
        """See `BatchStatistics.evaluate`."""
        return _shift(input, self.bias - self.running_mean)


def _shift(input: Tensor, shift: Tensor) -> Tensor:
    # Under autocast the input is half precision: promotion computes in float32, the next layer wants half.
    return (input + broadcast(shift)).to(input.dtype)


class TReLU(nn.Module):
    """Translated ReLU (Xiang & Li 2017): y = ReLU(x - b) + b for x (N, C, H, W), learned b (C,), which starts at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        """Return y."""
        b = broadcast(self.bias)
        return (torch.relu_(input - b) + b).to(input.dtype)

    def extra_repr(self) -> str:
        """Return the channels for `repr`."""
        return str(self.bias.numel())


class PropagatedReLU(nn.Module):
    """y = (ReLU(z) - sqrt(1 / 2pi)) / sqrt((1 - 1/pi) / 2) for z of any shape (Arpit et al. 2016).

    Invariant: y has mean 0 and variance 1 if z is standard normal.
    """

    MEAN = math.sqrt(1 / (2 * math.pi))
    STD = math.sqrt((1 - 1 / math.pi) / 2)

    def forward(self, input: Tensor) -> Tensor:
        """Return y."""
        return (F.relu(input) - self.MEAN) / self.STD


@register(
    "wn", aliases=("weight", "weightnorm", "weightnormalization"), family="weights, starts and gradients", order=20,
    formula="w = g · v / norm of v, per filter; a bias per filter. `norm.init=weights`: g = norm of v; `data`: g and "
    "b from the calibration images",
    source="Salimans & Kingma 2016", over="a filter's weights", parameters="v, g, b", conv="yes",
    use="shallow networks at any batch size; on ImageNet it ends about 6 points below `bn` (Gitman & Ginsburg 2017)",
    cost="passes over weights, none over activations",
)  # fmt: skip
class WeightNorm(Variant):
    """Weight normalization (Salimans & Kingma 2016).

    Per filter v of a convolution:

        y = w · x + b,   w = g · v / ||v||_2       learned g and b per filter

    No norm remains. v starts as the weights of the convolution, g by `init`:

    - weights: g = ||v||, b as the convolution's (0 if it has none): the function of the plain convolution
      (PyTorch's parametrization starts so);
    - data: for t = v · x / ||v|| on one batch, layer after layer, g = 1 / std(t), b = -mean(t) / std(t)
      (`data_dependent_start`). The paper draws v from N(0, 0.05²); only its direction matters, so that weights which
      are paired between arms lose nothing [A].

    If the network starts gamma or beta of a norm elsewhere than at 1 and 0, g is multiplied by that gamma and b moved
    by that beta. The classifier stays a plain linear layer [A]. v is decayed as all weights are, g and b are not:
    w does not depend on ||v||, so that decay of v sets how fast its direction learns, and shrinks no weight.
    Invariant: dL/dv is orthogonal to v (section 2.1).
    """

    needs_convolution = True
    shifts = True  # whether the convolution has the bias

    init: str = option("weights", choices=("weights", "data"))
    eps: float = option(1e-24, gt=0)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._latest: WeightNormConv2d | None = None

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        """Return a `WeightNormConv2d`."""
        if self.shifts:
            set_bias(convolution)
        else:
            convolution.bias = None
        self._latest = WeightNormConv2d.of(convolution, gain_start=self.init, eps=self.eps)
        return self._latest

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return the identity, once the convolution has taken over gamma and beta."""
        if norm.affine and self._latest is not None:  # that of the same site: its convolution comes first
            self._latest.apply_affine(norm)
        return nn.Identity()


_NO_ZERO_FILTERS = {"init": {"fixup": "filters that start at zero have no direction to normalize"}}


@register(
    "wn_mean", aliases=("meanonlybatchnorm",), family="weights, starts and gradients", order=21,
    formula="`wn` without bias, then x - mu + beta", source="Salimans & Kingma 2016",
    over="a filter's weights; mu over N, H, W", parameters="v, g, beta", conv="yes",
    use="as `wn`, where a mean of the batch does no harm", cost="`wn`, a mean and an addition",
)  # fmt: skip
class MeanOnlyWeightNorm(WeightNorm):
    """Weight normalization with mean-only batch normalization (Salimans & Kingma 2016).

        t = w · x,   y = t - mu + b,   w = g · v / ||v||_2

    mu is the batch's mean of t per channel, over N, H and W; a moving average in evaluation. g starts as in
    `WeightNorm`, b at 0, or where the network starts beta.
    Invariant: y does not depend on a constant added to a channel of t.
    """

    shifts = False

    momentum: float = option(0.1, gt=0, le=1)

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return a `MeanOnlyBatchNorm2d`."""
        super().norm(norm)
        layer = MeanOnlyBatchNorm2d(norm.num_features, momentum=self.momentum, norm_batch=self.norm_batch)
        return copy_affine(norm, layer)


@register(
    "wn_trelu", aliases=("trelu",), family="weights, starts and gradients", order=22,
    formula="w = v / sqrt(sum v² + 1e-6); ReLU(x - b) + b in place of the ReLU", source="Xiang & Li 2017",
    over="a filter's weights", parameters="v, b at a ReLU", conv="yes",
    use="as `wn`, for networks with ReLU; its authors made it for GANs", cost="two more passes than a ReLU",
)  # fmt: skip
class TReLUWeightNorm(Variant):
    """Weight normalization with translated ReLU (Xiang & Li 2017).

    Per filter v, with one learned b per channel:

        z = v · x / sqrt(sum v² + eps),   y = ReLU(z - b) + b

    No gain, no other bias. Before a residual sum there is no activation, and y = z. The paper ends in an affine map;
    so does every network here, in its own classifier [A].
    Invariant: z does not depend on the norm of v, but for eps.
    """

    needs_convolution = True
    takes = ()
    refused: ClassVar[dict[str, dict[str, str]]] = {"init": NO_GAMMA["init"] | _NO_ZERO_FILTERS["init"]}

    eps: float = option(1e-6, gt=0)

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        """Return a `UnitNormConv2d` without a bias."""
        convolution.bias = None
        return UnitNormConv2d.of(convolution, eps=self.eps)

    def norm_and_activation(
        self, norm: nn.BatchNorm2d, activation: nn.Module | None
    ) -> tuple[nn.Module, nn.Module | None]:
        """Return a `TReLU` in the place of an activation."""
        _check_relu("wn_trelu", activation)
        return (nn.Identity(), None) if activation is None else (TReLU(norm.num_features), nn.Identity())


@register(
    "normprop", aliases=("normalizationpropagation",), family="weights, starts and gradients", order=23,
    formula="z = g · v / norm of v * x + b; (ReLU(z) - sqrt(1 / 2 pi)) / sqrt((1 - 1 / pi) / 2) in place of the ReLU; "
    "z before a residual sum [A]",
    source="Arpit et al. 2016", over="a filter's weights", parameters="v, g, b", conv="yes",
    use="as `wn`, for networks with ReLU and normalized input data", cost="two more passes than a ReLU",
)  # fmt: skip
class NormProp(WeightNorm):
    """Normalization propagation (Arpit et al. 2016).

    Per filter v, with learned gain g (from 1) and bias b (from 0):

        z = g · v · x / ||v||_2 + b,   y = (ReLU(z) - sqrt(1 / 2pi)) / sqrt((1 - 1/pi) / 2)

    Before a residual sum there is no activation, and y = z; the sum is left as it is, and so is the ReLU after it:
    our adaptation [A]. g and b start where the network starts gamma and beta. The paper wants the input data
    normalized over the whole data set, as images are here before they reach a network.
    Invariant: standard normal z gives y with mean 0 and variance 1.
    """

    refused: ClassVar[dict[str, dict[str, str]]] = _NO_ZERO_FILTERS

    init = "one"  # no option here

    eps: float = option(1e-12, gt=0)

    def norm_and_activation(
        self, norm: nn.BatchNorm2d, activation: nn.Module | None
    ) -> tuple[nn.Module, nn.Module | None]:
        """Return the identity, and a `PropagatedReLU` in the place of an activation."""
        _check_relu("normprop", activation)
        return self.norm(norm), None if activation is None else PropagatedReLU()


def _check_relu(name: str, activation: nn.Module | None) -> None:
    if activation is not None and not isinstance(activation, nn.ReLU):
        raise UserError(
            f"norm={name} replaces ReLU by an activation of its own, and this network has"
            f" {type(activation).__name__} after a norm.\nUse a network with ReLU, or another norm, e.g. norm=wn."
        )
