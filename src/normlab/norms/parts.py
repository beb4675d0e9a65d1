"""Batch normalization taken apart: its division alone, and its centering alone."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normlab.common.registry import option, register
from normlab.norms.layer_statistics import BatchStatistics, broadcast, full_precision, per_group
from normlab.norms.sites import NO_GAMMA, Variant, copy_affine


class VarianceNorm2d(BatchStatistics):
    """See `VarianceNorm`. `running_var` averages the unbiased variance, as in `nn.BatchNorm2d`."""

    averages: ClassVar[dict[str, float]] = {"running_var": 1.0}
    running_var: Tensor
    eps: float

    def normalize(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `BatchStatistics.normalize`."""
        x = full_precision(input)
        v = self.batch_mean((x - broadcast(self.batch_mean(x))).square())
        count = self.batch_count(x)
        return self._divide(x, v, groups).to(input.dtype), (v.detach() * (count / (count - 1)),)

    def evaluate(self, input: Tensor) -> Tensor:
        """See `BatchStatistics.evaluate`."""
        return self._divide(full_precision(input), self.running_var, 1).to(input.dtype)

    def _divide(self, x: Tensor, v: Tensor, groups: int) -> Tensor:
        scale = per_group(self.weight, groups) * torch.rsqrt(v + self.eps)
        return torch.addcmul(broadcast(per_group(self.bias, groups)), x, broadcast(scale))


class MeanNorm2d(BatchStatistics):
    """See `MeanNorm`."""

    averages: ClassVar[dict[str, float]] = {"running_mean": 0.0}
    running_mean: Tensor

    def normalize(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `BatchStatistics.normalize`."""
        x = full_precision(input)
        mu = self.batch_mean(x)
        return self._center(x, mu, groups).to(input.dtype), (mu.detach(),)

    def evaluate(self, input: Tensor) -> Tensor:
        """See `BatchStatistics.evaluate`."""
        return self._center(full_precision(input), self.running_mean, 1).to(input.dtype)

    def _center(self, x: Tensor, mu: Tensor, groups: int) -> Tensor:
        gamma, beta = per_group(self.weight, groups), per_group(self.bias, groups)
        return torch.addcmul(broadcast(beta), x - broadcast(mu), broadcast(gamma))


class _Part(Variant):
    """A part of batch normalization; without `affine` gamma and beta are the constants 1 and 0."""

    layer: ClassVar[type[BatchStatistics]]

    momentum: float = option(0.1, gt=0, le=1)
    affine: bool = option(True)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.takes = (*(self.takes if self.affine else ()), "running statistics")
        if not self.affine:
            self.refused = NO_GAMMA  # type: ignore[misc]  # of this one

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return a layer of the class `layer`."""
        layer = self.layer(norm.num_features, **self.options)
        return copy_affine(norm, layer) if self.affine else layer.requires_grad_(False)


@register(
    "bn_var", aliases=("variancenorm", "variancenormalization"), family="BN and its parts", order=28,
    formula="gamma · x / sqrt(v + eps) + beta, v about mu; `norm.affine=false`: without gamma and beta",
    source="variance normalization, as in Lubana et al. 2021, 2106.05956", over="N, H, W", parameters="gamma, beta",
    use="to see what centering buys", cost="two means that autograd sees",
)  # fmt: skip
class VarianceNorm(_Part):
    """Batch normalization without its centering (variance normalization, as in Lubana et al. 2021, 2106.05956).

    For x of shape (N, C, H, W), per channel over m = N·H·W values, with mean mu and biased variance v about mu:

        y = gamma · x / sqrt(v + eps) + beta

    Evaluation uses a moving average of the unbiased variance, as `BatchNorm` does [A].
    Invariant: it is `BatchNorm` plus gamma · mu / sqrt(v + eps).
    """

    layer = VarianceNorm2d

    eps: float = option(1e-5, gt=0)


@register(
    "bn_mean", aliases=("meannorm", "meanonlynorm"), family="BN and its parts", order=29,
    formula="gamma · (x - mu) + beta; `norm.affine=false`: x - mu",
    source="mean-only batch normalization; with weight normalization: `wn_mean`", over="N, H, W",
    parameters="gamma, beta", use="to see what the division buys", cost="one mean that autograd sees",
)  # fmt: skip
class MeanNorm(_Part):
    """Batch normalization without its division: y = gamma · (x - mu) + beta (mean-only batch normalization).

    mu is the mean per channel of x (N, C, H, W), over N, H and W; a moving average in evaluation. Salimans & Kingma
    2016 have it behind weight normalization and without gamma, which is `MeanOnlyWeightNorm`.
    Invariant: a constant added to a channel changes nothing, and the channel's scale passes.
    """

    layer = MeanNorm2d
