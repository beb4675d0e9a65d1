"""Normalizers that come with an activation of their own, and take the place of a site's norm and activation."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.common.registry import option, register
from normlab.norms.group import GroupedVariant
from normlab.norms.layer_statistics import BatchStatistics, broadcast, full_precision, per_group
from normlab.norms.plain import ChannelAffine
from normlab.norms.sites import Variant, copy_affine
from normlab.norms.steps import Role


class FilterResponseNorm2d(nn.Module):
    """See `FilterResponseNorm`. weight, bias and tau are (C,); `learned_eps` is one scalar.

    At y = tau the gradient goes to tau, as ReLU's at 0 goes nowhere (all of a channel is there if it is zero).
    """

    roles: ClassVar[dict[str, Role]] = {"tau": "shift"}

    def __init__(self, channels: int, *, eps: float, threshold: bool, learned_eps: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.tau = nn.Parameter(torch.zeros(channels)) if threshold else None
        self.learned_eps = nn.Parameter(torch.tensor(1e-4)) if learned_eps else None

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W), and apply the threshold if there is one."""
        x = full_precision(input)
        nu2 = x.square().mean((2, 3), keepdim=True)
        eps = self.eps if self.learned_eps is None else self.eps + self.learned_eps.abs()
        scale = broadcast(self.weight) * torch.rsqrt(nu2 + eps)  # (N, C, 1, 1): one multiplication for both
        if self.tau is None:
            y = x * scale + broadcast(self.bias)
        else:  # max(y, tau) = ReLU(y - tau) + tau; ReLU has kernels that torch.maximum's gradient lacks
            y = F.relu(x * scale + broadcast(self.bias - self.tau)) + broadcast(self.tau)
        return y.to(input.dtype)

    def extra_repr(self) -> str:
        """Return channels and eps for `repr`."""
        return f"{self.weight.numel()}, eps={self.eps}"


@register(
    "frn", aliases=("filterresponsenorm", "filterresponsenormalization", "tlu"), family="statistics of a sample",
    order=17,
    formula="max(gamma · x / sqrt(mean x² + eps) + beta, tau) in place of norm and ReLU",
    source="Singh & Krishnan 2019, 1911.09737", over="H, W", parameters="gamma, beta, tau at a ReLU",
    use="small batches, with a warm-up of the learning rate; of 1x1 maps it leaves the sign alone",
    cost="one reduction, a few passes; saves the ReLU",
)  # fmt: skip
class FilterResponseNorm(Variant):
    """Filter Response Normalization (Singh & Krishnan 2019, 1911.09737) with its thresholded linear unit.

    For x of shape (N, C, H, W), with nu² the mean of x² per image and channel over H and W:

        y = gamma · x / sqrt(nu² + eps) + beta
        z = max(y, tau)                            gamma, beta, tau (C,) per channel, tau starting at 0

    z replaces norm and ReLU; a site without an activation, or with another than ReLU, gets y alone [A]. With
    `learned_eps` eps becomes eps + |e|, e a scalar of the layer starting at 1e-4: on 1x1 maps x / sqrt(nu²) is
    but a sign. Invariant: y does not change when x is scaled by a positive number, up to eps.
    """

    eps: float = option(1e-6, gt=0)
    learned_eps: bool = option(False)

    def norm_and_activation(
        self, norm: nn.BatchNorm2d, activation: nn.Module | None
    ) -> tuple[nn.Module, nn.Module | None]:
        """Return a `FilterResponseNorm2d` in the place of both."""
        threshold = isinstance(activation, nn.ReLU)
        layer = FilterResponseNorm2d(norm.num_features, eps=self.eps, threshold=threshold, learned_eps=self.learned_eps)
        return copy_affine(norm, layer), nn.Identity() if threshold else activation


class _SpatialMoments(torch.autograd.Function):
    """x (N, C, H, W) -> mean and biased variance over H and W, each (N, C, 1, 1).

    By hand because torch.var is slow on CPUs, and plain autograd would keep x - mean, one more map, until the
    backward pass: dx = (dmean + 2 (x - mean) dvariance) / (H·W).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean((2, 3), keepdim=True)
        ctx.save_for_backward(x, mean)
        return mean, (x - mean).square_().mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        size = x.shape[2] * x.shape[3]
        dx: Tensor = (x - mean) * (of_variance * (2 / size))
        return dx.add_(of_mean / size)


def spatial_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of x (N, C, H, W) over H and W, each (N, C, 1, 1); differentiable."""
    moments: tuple[Tensor, Tensor] = _SpatialMoments.apply(x)
    return moments


class EvoNorm2dS0(nn.Module):
    """See `EvoNormS0`. weight, bias and v are (C,)."""

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.v = nn.Parameter(torch.ones(channels))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize and activate (N, C, H, W)."""
        x = full_precision(input)
        scale = broadcast(self.weight) * torch.rsqrt(self.group_variance(x) + self.eps)
        return (x * torch.sigmoid(broadcast(self.v) * x) * scale + broadcast(self.bias)).to(input.dtype)

    def group_variance(self, x: Tensor) -> Tensor:
        """Return (N, C, 1, 1), equal within a group: variance within its channels plus variance between their means."""
        mean, variance = (moment.reshape(len(x), self.groups, -1, 1, 1) for moment in spatial_moments(x))
        between = (mean - mean.mean(2, keepdim=True)).square()
        return (variance + between).mean(2, keepdim=True).expand_as(mean).flatten(1, 2)

    def extra_repr(self) -> str:
        """Return channels, groups and eps for `repr`."""
        return f"{self.weight.numel()}, groups={self.groups}, eps={self.eps}"


class _EvoNorm(Variant):
    """A layer in the place of norm and activation; gamma · x + beta where there is no activation."""

    eps: float = option(1e-5, gt=0)

    def layer(self, channels: int) -> nn.Module:
        raise NotImplementedError

    def norm_and_activation(
        self, norm: nn.BatchNorm2d, activation: nn.Module | None
    ) -> tuple[nn.Module, nn.Module | None]:
        if activation is None:
            return copy_affine(norm, ChannelAffine(norm.num_features)), None
        return copy_affine(norm, self.layer(norm.num_features)), nn.Identity()


@register(
    "evonorm_s0", aliases=("evonorm",), family="statistics of a sample", order=18,
    formula="gamma · x · sigmoid(v x) / sqrt(Var + eps) + beta in place of norm and activation; gamma · x + beta "
    "where there is none",
    source="Liu et al. 2020, 2004.02967", over="C / 32 channels, H, W", parameters="gamma, beta, v",
    use="small batches, norm and activation in one", cost="moments and a sigmoid in passes of their own",
)  # fmt: skip
class EvoNormS0(_EvoNorm, GroupedVariant):
    """EvoNorm-S0 (Liu et al. 2020, 2004.02967): a norm and activation in one, of each image by itself.

    For x of shape (N, C, H, W), with Var_group the variance per image and group of C / `groups` neighboring
    channels, over those channels and H and W (biased [A], as in group normalization):

        y = gamma · x · sigmoid(v · x) / sqrt(Var_group + eps) + beta      gamma, beta, v (C,), v starting at 1

    It replaces norm and activation; a site without activation gets gamma · x + beta alone. Invariant: scaling x
    by c > 0 and v by 1/c changes nothing, up to eps.
    """

    def layer(self, channels: int) -> nn.Module:
        """Return an `EvoNorm2dS0`."""
        return EvoNorm2dS0(channels, groups=self.groups, eps=self.eps)


class EvoNorm2dB0(BatchStatistics):
    """See `EvoNormB0`. weight, bias, v and running_var are (C,)."""

    averages: ClassVar[dict[str, float]] = {"running_var": 1.0}
    running_var: Tensor
    eps: float
    unbiased_average: bool

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.v = nn.Parameter(torch.ones(channels))

    def normalize(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `BatchStatistics.normalize`."""
        x = full_precision(input)
        mean, instance = spatial_moments(x)
        between = (mean - broadcast(self.batch_mean(mean))).square()
        batch = self.batch_mean(instance + between)  # variance within images plus variance between their means
        return self._divide(x, batch, instance, groups).to(input.dtype), (self._averaged(batch.detach(), x),)

    def _averaged(self, variance: Tensor, x: Tensor) -> Tensor:
        if not self.unbiased_average:
            return variance
        count = self.batch_count(x)
        return variance * (count / (count - 1))

    def evaluate(self, input: Tensor) -> Tensor:
        """See `BatchStatistics.evaluate`."""
        x = full_precision(input)
        return self._divide(x, self.running_var, spatial_moments(x)[1], 1).to(input.dtype)

    def _divide(self, x: Tensor, batch: Tensor, instance: Tensor, groups: int) -> Tensor:
        gamma, beta, v = (broadcast(per_group(p, groups)) for p in (self.weight, self.bias, self.v))
        std = broadcast(torch.sqrt(batch + self.eps))
        # max(std, s) = std + ReLU(s - std): ReLU has kernels that torch.maximum's gradient lacks
        divisor = std + F.relu(v * x + (torch.sqrt(instance + self.eps) - std))
        return x / divisor * gamma + beta


@register(
    "evonorm_b0", family="statistics of a sample", order=19,
    formula="gamma · x / max(sqrt(Var_batch + eps), v x + sqrt(Var_image + eps)) + beta, likewise",
    source="Liu et al. 2020, 2004.02967", over="N, H, W, and H, W of the image", parameters="gamma, beta, v",
    use="large batches, norm and activation in one", cost="one set of moments for both variances",
)  # fmt: skip
class EvoNormB0(_EvoNorm):
    """EvoNorm-B0 (Liu et al. 2020, 2004.02967): a norm and activation in one, with statistics of the batch.

    For x of shape (N, C, H, W), with Var_batch the biased variance per channel over N, H and W, and Var_inst the
    biased variance per image and channel over H and W:

        y = gamma · x / max(sqrt(Var_batch + eps), v · x + sqrt(Var_inst + eps)) + beta      v (C,), starting at 1

    Evaluation uses a moving average of Var_batch, biased as in training [A], so that small groups do not shift one
    against the other; with `unbiased_average` of the unbiased variance, as in timm. Var_inst is always the image's own.
    Where the two parts of the maximum are equal, the gradient goes to the first. It replaces norm and
    activation; a site without activation gets gamma · x + beta alone.
    Invariant: scaling x by c > 0 changes nothing, up to eps.
    """

    takes = ("scales", "shifts", "running statistics")

    momentum: float = option(0.1, gt=0, le=1)
    unbiased_average: bool = option(False, neutral=False)

    def layer(self, channels: int) -> nn.Module:
        """Return an `EvoNorm2dB0`."""
        return EvoNorm2dB0(channels, **self.options)
