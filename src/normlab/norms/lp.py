"""Lp normalizers: batch normalization that divides by another average norm than the standard deviation."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.common.registry import option, register
from normlab.norms.layer_statistics import BatchStatistics, broadcast, full_precision, per_group
from normlab.norms.sites import Variant, copy_affine


class _Normalize(torch.autograd.Function):
    """y = gamma · (a - mean) / N + beta, given the mean and the norm N (C,) of a itself, which has M = N·H·W values.

    With g = dL/dy:  dgamma = sum g·(a - mean)/N,  dbeta = sum g,
    da = gamma/N · (g - dbeta/M - dgamma · dN/da), where dN/da is

        p = 1: sign(a)/M    p = 2: a/(M·N)    p = inf: sign(a)/ties where |a| = N, else 0
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, norm: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(a, gamma, mean, norm)
        ctx.p = p
        return F.batch_norm(a, mean, norm.square(), gamma, beta, False, 0.0, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved, gamma, mean, norm = ctx.saved_tensors
        a, g = full_precision(saved), full_precision(dy)
        count = a.numel() / a.shape[1]
        # Batch normalization's own kernel, for its two sums alone.
        _, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
            g, a, gamma, None, None, mean, norm.reciprocal(), True, 0.0, [False, True, True]
        )
        share: Tensor | float
        if ctx.p == 1:
            direction, share = a.sign(), 1 / count
        elif ctx.p == 2:
            direction, share = a, 1 / (count * norm)
        else:
            # 1 where |a| = N, which is nowhere if N is the floor that eps sets, else 0. (Comparisons cost thrice that.)
            extreme = (a.abs() - broadcast(norm)).sign_().add_(1)
            direction, share = a.sign().mul_(extreme), 1 / extreme.sum((0, 2, 3)).clamp_min(1)
        scale = gamma / norm
        da = F.batch_norm(g, dbeta / count, torch.ones_like(norm), scale, None, False, 0.0, 0.0)
        da.addcmul_(direction, broadcast(-scale * dgamma * share))
        return da.to(dy.dtype), dgamma, dbeta, None, None, None


class LpNorm2d(BatchStatistics):
    """See `LpNorm`. `running_moment` averages mean |a|^p, for p = inf the maximum of |a|."""

    averages: ClassVar[dict[str, float]] = {"running_mean": 0.0, "running_moment": 1.0}
    running_mean: Tensor
    running_moment: Tensor
    p: float
    eps: float

    def normalize(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `BatchStatistics.normalize`."""
        gamma, beta = per_group(self.weight, groups), per_group(self.bias, groups)
        with torch.set_grad_enabled(self.synchronized and torch.is_grad_enabled()):
            a = full_precision(input)
            mean, power = self.batch_mean(a), self._power(a)
            moment = self.batch_max(power) if self.p == math.inf else self.batch_mean(power)
            norm = self._norm(moment)
        statistics = mean.detach(), moment.detach()
        if not self.synchronized:
            return _Normalize.apply(input, gamma, beta, mean, norm, self.p), statistics
        y = torch.addcmul(broadcast(beta), a - broadcast(mean), broadcast(gamma / norm))
        return y.to(input.dtype), statistics

    def _power(self, a: Tensor) -> Tensor:
        return a.square() if self.p == 2 else a.abs()

    def _norm(self, moment: Tensor) -> Tensor:
        """N_p from mean |a|^p or max |a|."""
        if self.p == 1:
            return moment + math.sqrt(self.eps)
        return torch.sqrt(moment + self.eps) if self.p == 2 else moment.clamp_min(math.sqrt(self.eps))

    def evaluate(self, input: Tensor) -> Tensor:
        """See `BatchStatistics.evaluate`."""
        var = self._norm(self.running_moment).square()
        return F.batch_norm(input, self.running_mean, var, self.weight, self.bias, False, 0.0, 0.0)

    def moments(self, input: Tensor) -> tuple[Tensor, ...]:
        """Return the mean and mean |a|^p, or the mean over groups of training of max |a|."""
        a = input.double()
        power = self._power(a)
        if self.p != math.inf:
            return a.mean((0, 2, 3)), power.mean((0, 2, 3))
        # The largest of a group: it grows with the group, so it is averaged over the groups of training.
        size = min(self.norm_batch or len(a), len(a))
        groups = len(a) // size
        parts = [*(power[g : groups * size : groups] for g in range(groups)), power[groups * size :]]
        total = sum(part.amax((0, 2, 3)) * len(part) for part in parts if len(part))
        return a.mean((0, 2, 3)), total / len(a)  # type: ignore[return-value]

    def averages_of(self, *moments: Tensor) -> tuple[Tensor, ...]:
        """Return the moments as they are."""
        return moments


@register(
    "lp1", aliases=("l1norm",), family="statistics of the batch", order=8,
    formula="gamma · (x - mu) / (mean abs x + sqrt(eps)) + beta", source="Santurkar et al. 2018 [A]", over="N, H, W",
    parameters="gamma, beta", use="to see whether the deviation can be another norm", cost="own backward pass",
)  # fmt: skip
@register(
    "lp2", aliases=("l2norm",), family="statistics of the batch", order=9, defaults={"p": 2},
    formula="gamma · (x - mu) / sqrt(mean x² + eps) + beta", source="Santurkar et al. 2018 [A]", over="N, H, W",
    parameters="gamma, beta", use="as `lp1`; equals `bn` where a channel has no mean",
    cost="two plain means instead of the kernel's variance",
)  # fmt: skip
@register(
    "lpinf", aliases=("linfnorm",), family="statistics of the batch", order=10, defaults={"p": "inf"},
    formula="gamma · (x - mu) / max(max abs x, sqrt(eps)) + beta", source="Santurkar et al. 2018 [A]",
    over="N, H, W; the maximum grows with `norm_batch`", parameters="gamma, beta",
    use="as `lp1`; hangs on the largest value of a channel", cost="the maxima are found again for the gradient",
)  # fmt: skip
class LpNorm(Variant):
    """Normalization by the average Lp norm, p = 1, 2, inf (Santurkar et al. 2018; the equation is our reading [A]).

    For a of shape (N, C, H, W), per channel over the m = N·H·W values, with e = sqrt(eps):

        N_1 = mean |a| + e,   N_2 = sqrt(mean a² + e²),   N_inf = max(max |a|, e)
        y = gamma · (a - mean a) / N_p + beta

    The norm is taken before the mean shift. eps is a floor of sqrt(eps) on the norm, as it is on the deviation in
    batch normalization [A]. Evaluation uses moving averages of mean a and of mean |a|^p, or of max |a| [A]; this
    maximum grows with the images that share it (`norm_batch`). Values that tie for the maximum share its gradient.
    Invariant: for a channel without mean, p = 2 is batch normalization; no p changes under a -> c·a but for eps.
    """

    p: int | str = option(1, choices=(1, 2, "inf"))
    eps: float = option(1e-5, gt=0)
    momentum: float = option(0.1, gt=0, le=1)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.p == 2:  # of the others a variance says nothing
            self.takes = (*self.takes, "running statistics")

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return an `LpNorm2d`."""
        return copy_affine(norm, LpNorm2d(norm.num_features, **self.options | {"p": float(self.p)}))
