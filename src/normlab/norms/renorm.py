"""Batch renormalization: batch normalization whose training and evaluation agree."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.common.registry import option, register
from normlab.norms.layer_statistics import BatchStatistics, broadcast, full_precision, keep_for_backward, per_group
from normlab.norms.sites import Variant, copy_affine
from normlab.norms.steps import Clock


class _Normalize(torch.autograd.Function):
    """y = gamma · ((x - mean) / std · r + d) + beta, given mean, biased variance and std (C,) of x itself.

    Invariant: with r = 1 and d = 0 it is F.batch_norm in training, forward and backward, without a second search for
    the statistics.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor, eps: float, *constants: Tensor) -> Tensor:
        mean, var, std, r, d = constants
        weight, bias = _scale_and_shift(gamma, beta, r, d)
        ctx.save_for_backward(x, gamma, weight, mean, std, r, d)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, weight, mean, std, r, d = ctx.saved_tensors
        if torch.is_grad_enabled() and gamma is not None:  # for second derivatives, of which gamma is a part
            weight = gamma * r
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, std.reciprocal(), True, 0.0, [True, True, True]
        )
        dgamma = None if gamma is None else torch.addcmul(dweight * r, dbias, d)
        return dx, dgamma, dbias, *[None] * 6


def _scale_and_shift(gamma: Tensor | None, beta: Tensor, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """One scale and one shift per channel in the place of r, d, gamma and beta."""
    return (r, beta + d) if gamma is None else (gamma * r, torch.addcmul(beta, gamma, d))


class BatchRenorm2d(BatchStatistics):
    """See `BatchRenorm`. `weight` is None where gamma is fixed at 1."""

    averages: ClassVar[dict[str, float]] = {"running_mean": 0.0, "running_std": 1.0}
    counter = "num_batches_tracked"
    running_mean: Tensor
    running_std: Tensor
    eps: float
    learn_scale: bool
    clock: Clock

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        if not self.learn_scale:
            self.register_parameter("weight", None)

    def normalize(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `BatchStatistics.normalize`."""
        if self.synchronized:
            x = full_precision(input)
            mean = self.batch_mean(x)
            centered = x - broadcast(mean)
            var = self.batch_mean(centered.square())
        else:
            mean, var = self._moments(input)
        std = torch.sqrt(var + self.eps)
        statistics = mean.detach(), std.detach()
        r, d = self._corrections(*statistics, groups)
        gamma, beta = per_group(self.weight, groups) if self.learn_scale else None, per_group(self.bias, groups)
        if self.synchronized:
            weight, bias = _scale_and_shift(gamma, beta, r, d)
            y = torch.addcmul(broadcast(bias), centered, broadcast(weight / std))
            return y.to(input.dtype), statistics
        return _Normalize.apply(input, gamma, beta, self.eps, mean, var, std, r, d), statistics

    @torch.no_grad()
    def _moments(self, input: Tensor) -> tuple[Tensor, Tensor]:
        # Averages that are not used: without them the statistics of half-precision input are so, too, on a CPU.
        unused = self.running_mean.new_empty(2, input.shape[1])
        if input.is_meta:  # the fast kernel does not work on tensors without data
            return unused[0], unused[1]
        return torch.batch_norm_update_stats(input, unused[0], unused[1], 0.0)

    def _corrections(self, mean_b: Tensor, std_b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """The corrections r and d (G·C,) by the averages before this step; 1 and 0 in evaluation by the batch."""
        if not self.training:
            return torch.ones_like(std_b), torch.zeros_like(mean_b)
        mu, s = per_group(self.running_mean, groups), per_group(self.running_std, groups)
        r_least, r_most, d_least, d_most = map(self.clock.get_buffer, ("r_least", "r_most", "d_least", "d_most"))
        r, d = (std_b / s).clamp(r_least, r_most), ((mean_b - mu) / s).clamp(d_least, d_most)
        r, d = keep_for_backward(r, d)
        return r, d

    def evaluate(self, input: Tensor) -> Tensor:
        """See `BatchStatistics.evaluate`."""
        var = self.running_std.square()  # eps is in it
        return F.batch_norm(input, self.running_mean, var, self.weight, self.bias, False, 0.0, 0.0)

    def averages_of(self, *moments: Tensor) -> tuple[Tensor, ...]:
        """Return mean and standard deviation, with eps."""
        mean, square = moments
        return mean, torch.sqrt(self.eps + (square - mean.square()).clamp_min(0))


@register(
    "renorm", aliases=("brn", "batchrenorm", "batchrenormalization"), family="statistics of the batch", order=7,
    formula="gamma · ((x - mu) / s_B · r + d) + beta; r = clip(s_B / s), d = clip((mu - running mean) / s), constants "
    "to the gradient; s, s_B deviations with eps inside the root; a ramp in fractions of the run or in steps",
    source="Ioffe 2017", over="N, H, W, corrected by moving averages", parameters="gamma (`norm.learn_scale`), beta",
    use="small batches, and batches that are not iid: training and evaluation normalize alike",
    cost="`bn`'s kernels and a dozen operations per channel",
)  # fmt: skip
class BatchRenorm(Variant):
    """Batch renormalization (Ioffe 2017, 1702.03275).

    For x of shape (N, C, H, W), per channel over m = N·H·W values, with mean muB and biased variance vB, and with
    moving averages mu and s as they were before this step:

        sB = sqrt(eps + vB)
        r = clip(sB / s, 1/rmax, rmax),  d = clip((muB - mu) / s, -dmax, dmax)      constants in backpropagation
        y = gamma · ((x - muB) / sB · r + d) + beta
        mu += alpha · (muB - mu),  s += alpha · (sB - s)                           the std is averaged
        evaluation: y = gamma · (x - mu) / s + beta

    rmax and dmax rise from 1 and 0 at `ramp_start` to their values at `rmax_end` and `dmax_end`, linearly [A]; before,
    and while the clock stands, it is batch normalization. alpha is `momentum`, but 1/n for the first n batches
    while that is more [A]: their plain mean, so that the averages' start at 0 and 1 leaves no trace in a short run.
    With groups the averages take the mean of the groups' statistics [A].
    Invariant: with rmax = 1 and dmax = 0 its training is that of `BatchNorm`, forward and backward.
    """

    takes: tuple[str, ...] = ("scales", "shifts", "running statistics")

    eps: float = option(1e-5, gt=0)
    momentum: float = option(0.1, gt=0, le=1)
    rmax: float = option(3.0, ge=1)
    dmax: float = option(5.0, ge=0)
    ramp_unit: str = option("fraction", choices=("fraction", "steps"))
    ramp_start: float = option(0.0384615, ge=0, unit="ramp_unit")
    dmax_end: float = option(0.1923077, ge="ramp_start", unit="ramp_unit")
    rmax_end: float = option(0.3076923, ge="ramp_start", unit="ramp_unit")
    learn_scale: bool = option(True)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.clock = Clock(self.ramp_unit, self.bounds)
        if not self.learn_scale:
            self.takes = ("shifts", "running statistics")

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return a `BatchRenorm2d`."""
        return copy_affine(norm, BatchRenorm2d(norm.num_features, clock=self.clock, **self.options))

    def bounds(self, now: float, end: float) -> dict[str, float]:
        """Return the bounds of r and d in a step that begins at `now`."""
        rmax = 1 + (self.rmax - 1) * self._ramp(now, self.rmax_end)
        dmax = self.dmax * self._ramp(now, self.dmax_end)
        return {"r_least": 1 / rmax, "r_most": rmax, "d_least": -dmax, "d_most": dmax}

    def _ramp(self, now: float, end: float) -> float:
        """0 up to and at `ramp_start`, 1 from `end` on, linear between (and a jump if they are one)."""
        return min(max((now - self.ramp_start) / max(end - self.ramp_start, 1e-12), 0.0), 1.0)
