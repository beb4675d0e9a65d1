"""Weights that a convolution computes from its parameters: the methods that Gitman & Ginsburg 2017 compare."""

import math
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.common.errors import UserError, nearest
from normlab.norms.layer_statistics import BatchStatistics, broadcast, full_precision, look_at, per_group
from normlab.norms.plain import with_bias
from normlab.norms.sites import NO_GAMMA, Variant, start_as
from normlab.norms.steps import Role


class ReparametrisedConv2d(nn.Conv2d):
    """A convolution with weights w (O, I / groups, kh, kw) that are computed from its parameter `weight`, v.

    Made by `of` from a convolution, whose parameters it takes over. A subclass says what w is, and makes
    parameters of its own in `start`. Invariant: it is a convolution to all that ask, so that v is a weight.
    """

    @classmethod
    def of(cls, convolution: nn.Conv2d, **options: Any) -> Self:
        """One with the hyper-parameters and the very parameters of `convolution`, and its own `options`."""
        layer = cls(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,  # type: ignore[arg-type]
            convolution.stride,  # type: ignore[arg-type]
            convolution.padding,  # type: ignore[arg-type]
            convolution.dilation,  # type: ignore[arg-type]
            convolution.groups,
            padding_mode=convolution.padding_mode,
            bias=False,
            device="meta",  # draws no random numbers: arms stay paired
            **options,
        )
        layer.weight, layer.bias = convolution.weight, convolution.bias
        layer.train(convolution.training)
        layer.start()
        return layer

    def start(self) -> None:
        """Make the parameters of its own, from v."""

    def effective_weight(self) -> Tensor:
        """w in float32 or float64, also under autocast."""
        return full_precision(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.effective_weight().to(self.weight.dtype), self.bias)

    def per_filter(self, value: float) -> nn.Parameter:
        """A parameter (O,) with that value everywhere, float32, beside v."""
        return nn.Parameter(torch.full((self.out_channels,), value, device=self.weight.device))


class _NormalisedFilters(torch.autograd.Function):
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


class UnitNormConv2d(ReparametrisedConv2d):
    """Convolution with filters of norm 1 and nothing learned beside v: w = v / sqrt(sum v² + eps).

    Invariant: multiplying v by a constant changes nothing, so that dL/dv is orthogonal to v (but for eps).
    """

    def __init__(self, *sizes: Any, eps: float, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.eps = eps

    def length(self) -> Tensor:
        """sqrt(sum v² + eps) per filter (O,)."""
        return _length(full_precision(self.weight), self.eps)

    def gain(self) -> Tensor:
        """g (O,)."""
        return full_precision(self.weight).new_ones(self.out_channels)

    def effective_weight(self) -> Tensor:
        v = full_precision(self.weight)
        return _NormalisedFilters.apply(v, self.gain().to(v.dtype), self.eps)


class WeightNormConv2d(UnitNormConv2d):
    """Convolution with weight normalisation: w = g · v / sqrt(sum v² + eps) per filter of v, learned g (O,).

    At an all-zero filter eps = 1e-24 keeps all gradients finite, and that of v the plain convolution's if g = ||v||.
    `gain_start` is what g starts at: "weights" (||v||, so that w = v), "data" (see `start_from_data`; until then as
    "weights") or "one".
    """

    roles: ClassVar[dict[str, Role]] = {"g": "scale"}

    def __init__(self, *sizes: Any, gain_start: str, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.gain_start = gain_start

    def start(self) -> None:
        self.g = self.per_filter(1.0) if self.gain_start == "one" else nn.Parameter(self.length().detach())
        if self.starts_from_data and self.bias is not None:
            nn.init.zeros_(self.bias)

    def gain(self) -> Tensor:
        return self.g

    def start_as(self, norm: nn.BatchNorm2d) -> None:
        """Take over where gamma and beta of the norm start, e.g. at zero in the last layer of a branch."""
        with torch.no_grad():
            self.g.mul_(norm.weight)
            if self.bias is not None:
                self.bias.add_(norm.bias)

    @property
    def starts_from_data(self) -> bool:
        return self.gain_start == "data"

    def start_from_data(self, input: Tensor) -> None:
        """For the layer's first batch x, once: g = 1/std(t) and b = -mean(t)/std(t) with t = v·x / ||v||, biased std
        over images, H and W, so that the output has mean 0 and std 1 (gamma, where that does not start at 1).

        A filter whose output is constant on the batch keeps its g: there is no scale to go by.
        """
        with torch.no_grad():
            t = full_precision(self._conv_forward(input, _unit(self.weight, self.eps), None)).double()
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
    """Let the layers that want it start from what they see of `images` (N, 3, H, W), in order of execution; in place.

    One forward pass in training mode, without dropout; buffers and modes stay as they are. Nothing happens if there
    is no such layer. Once, before the first step: it changes a layer that it has changed before.
    """
    layers = [module for module in network.modules() if getattr(module, "starts_from_data", False)]
    if not layers:
        return
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: layer.start_from_data(*inputs)) for layer in layers]
    try:
        look_at(network, images)
    finally:
        for hook in hooks:
            hook.remove()


class MeanOnlyBatchNorm2d(BatchStatistics):
    """y = x - mu + beta per channel of x (N, C, H, W), mu the batch's mean, in evaluation a moving average.

    Invariant: dL/dx sums to 0 per channel, and the channel's scale passes.
    """

    running_mean: Tensor

    def __init__(self, channels: int, *, momentum: float, norm_batch: int | None = None) -> None:
        super().__init__()
        self.momentum, self.norm_batch = momentum, norm_batch
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))

    def normalise(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        mu = self.batch_mean(full_precision(input))
        return _shift(input, per_group(self.bias, groups) - mu), (mu.detach(),)

    def evaluate(self, input: Tensor) -> Tensor:
        return _shift(input, self.bias - self.running_mean)

    def update(self, *statistics: Tensor) -> None:
        (mean,) = statistics
        self.running_mean.lerp_(mean, self.momentum)

    def moments(self, input: Tensor) -> tuple[Tensor, ...]:
        return (input.double().mean((0, 2, 3)),)

    def adopt(self, *means: Tensor) -> None:
        (mean,) = means
        self.running_mean.copy_(mean)

    def extra_repr(self) -> str:
        return f"{self.bias.numel()}, momentum={self.momentum}, norm_batch={self.norm_batch}"


def _shift(input: Tensor, shift: Tensor) -> Tensor:
    # Under autocast the input is half precision: promotion computes in float32, the next layer wants half.
    return (input + broadcast(shift)).to(input.dtype)


class TReLU(nn.Module):
    """Translated ReLU (Xiang & Li 2017): y = ReLU(x - b) + b for x (N, C, H, W), learned b (C,), which starts at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        b = broadcast(self.bias)
        return (torch.relu_(input - b) + b).to(input.dtype)

    def extra_repr(self) -> str:
        return str(self.bias.numel())


class PropagatedReLU(nn.Module):
    """y = (ReLU(z) - sqrt(1 / 2pi)) / sqrt((1 - 1/pi) / 2) for z of any shape (Arpit et al. 2016).

    Invariant: y has mean 0 and variance 1 if z is standard normal.
    """

    MEAN = math.sqrt(1 / (2 * math.pi))
    STD = math.sqrt((1 - 1 / math.pi) / 2)

    def forward(self, input: Tensor) -> Tensor:
        return (F.relu(input) - self.MEAN) / self.STD


class WeightNorm(Variant):
    """Weight normalisation (Salimans & Kingma 2016). Per filter v of a convolution:

        y = w · x + b,   w = g · v / ||v||_2       learned g and b per filter

    No norm remains. v starts as the weights of the convolution, g by `init`:

    - weights: g = ||v||, b as the convolution's (0 if it has none): the function of the plain convolution
      (PyTorch's parametrisation starts so);
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

    def __init__(self, *, init: str, eps: float, norm_batch: int | None = None) -> None:
        super().__init__(norm_batch=norm_batch)
        if init not in ("weights", "data"):
            close = nearest(init, ["weights", "data"]) or "weights"
            raise UserError(f"norm.init={init} is no start of weight normalisation.\nNearest valid: norm.init={close}.")
        self.gain_start = init
        self.eps = eps
        self._latest: WeightNormConv2d | None = None

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        self._latest = WeightNormConv2d.of(
            with_bias(convolution, self.shifts), gain_start=self.gain_start, eps=self.eps
        )
        return self._latest

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        if norm.affine and self._latest is not None:  # that of the same site: its convolution comes first
            self._latest.start_as(norm)
        return nn.Identity()


_NO_ZERO_FILTERS = {"init": {"fixup": "filters that start at zero have no direction to normalise"}}


class MeanOnlyWeightNorm(WeightNorm):
    """Weight normalisation with mean-only batch normalisation (Salimans & Kingma 2016).

        t = w · x,   y = t - mu + b,   w = g · v / ||v||_2

    mu is the batch's mean of t per channel, over N, H and W; a moving average in evaluation. g starts as in
    `WeightNorm`, b at 0, or where the network starts beta.
    Invariant: y does not depend on a constant added to a channel of t.
    """

    shifts = False

    def __init__(self, *, init: str, eps: float, momentum: float, norm_batch: int | None = None) -> None:
        super().__init__(init=init, eps=eps, norm_batch=norm_batch)
        self.momentum = momentum

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        super().norm(norm)
        layer = MeanOnlyBatchNorm2d(norm.num_features, momentum=self.momentum, norm_batch=self.norm_batch)
        return start_as(norm, layer)


class TReLUWeightNorm(Variant):
    """Weight normalisation with translated ReLU (Xiang & Li 2017). Per filter v, with one learned b per channel:

        z = v · x / sqrt(sum v² + eps),   y = ReLU(z - b) + b

    No gain, no other bias. Before a residual sum there is no activation, and y = z. The paper ends in an affine map;
    so does every network here, in its own classifier [A].
    Invariant: z does not depend on the norm of v, but for eps.
    """

    needs_convolution = True
    refused: ClassVar[dict[str, dict[str, str]]] = {"init": NO_GAMMA["init"] | _NO_ZERO_FILTERS["init"]}

    def __init__(self, *, eps: float, norm_batch: int | None = None) -> None:
        super().__init__(norm_batch=norm_batch)
        self.eps = eps

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        return UnitNormConv2d.of(with_bias(convolution, False), eps=self.eps)

    def norm_and_activation(
        self, norm: nn.BatchNorm2d, activation: nn.Module | None
    ) -> tuple[nn.Module, nn.Module | None]:
        _check_relu("wn_trelu", activation)
        return (nn.Identity(), None) if activation is None else (TReLU(norm.num_features), nn.Identity())


class NormProp(WeightNorm):
    """Normalisation propagation (Arpit et al. 2016). Per filter v, with learned gain g (from 1) and bias b (from 0):

        z = g · v · x / ||v||_2 + b,   y = (ReLU(z) - sqrt(1 / 2pi)) / sqrt((1 - 1/pi) / 2)

    Before a residual sum there is no activation, and y = z; the sum is left as it is, and so is the ReLU after it:
    our adaptation [A]. g and b start where the network starts gamma and beta. The paper wants the input data
    normalised over the whole data set, as images are here before they reach a network.
    Invariant: standard normal z gives y with mean 0 and variance 1.
    """

    refused: ClassVar[dict[str, dict[str, str]]] = _NO_ZERO_FILTERS

    def __init__(self, *, eps: float, norm_batch: int | None = None) -> None:
        super().__init__(init="weights", eps=eps, norm_batch=norm_batch)
        self.gain_start = "one"

    def norm_and_activation(
        self, norm: nn.BatchNorm2d, activation: nn.Module | None
    ) -> tuple[nn.Module, nn.Module | None]:
        _check_relu("normprop", activation)
        return self.norm(norm), None if activation is None else PropagatedReLU()


def _check_relu(name: str, activation: nn.Module | None) -> None:
    if activation is not None and not isinstance(activation, nn.ReLU):
        raise UserError(
            f"norm={name} replaces ReLU by an activation of its own, and this network has"
            f" {type(activation).__name__} after a norm.\nUse a network with ReLU, or another norm, e.g. norm=wn."
        )
