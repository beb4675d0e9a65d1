"""Batch renormalisation: batch normalisation that training and evaluation agree about."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.norms.layer_statistics import BatchStatistics, broadcast, full_precision, held, per_group
from normlab.norms.options import check_range, last_time
from normlab.norms.sites import Variant, start_as
from normlab.norms.steps import Clock


class _Normalise(torch.autograd.Function):
    """y = weight · (x - mean) / sqrt(var + eps) + bias, given the mean and biased variance (C,) of x itself.

    Invariant: it is F.batch_norm in training, forward and backward, without a second search for the statistics.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps))
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        grads = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, inverse, True, 0.0, [True, True, True]
        )
        return *grads, None, None, None


class BatchRenorm2d(BatchStatistics):
    """See `BatchRenorm`. `weight` is None where gamma is fixed at 1."""

    running_mean: Tensor
    running_std: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        channels: int,
        *,
        eps: float,
        momentum: float,
        rmax: float,
        dmax: float,
        ramp_start: float,
        dmax_end: float,
        rmax_end: float,
        clock: Clock,
        learn_scale: bool = True,
        norm_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.momentum, self.norm_batch, self.clock = eps, momentum, norm_batch, clock
        self.rmax, self.dmax = rmax, dmax
        self.ramp_start, self.dmax_end, self.rmax_end = ramp_start, dmax_end, rmax_end
        self.weight = nn.Parameter(torch.ones(channels)) if learn_scale else None
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_std", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def normalise(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.synchronised:
            x = full_precision(input)
            mean = self.batch_mean(x)
            centred = x - broadcast(mean)
            var = self.batch_mean(centred.square())
        else:
            # Averages that nobody reads: without them, those of half-precision input were half-precision on a CPU.
            unused = torch.zeros(input.shape[1], device=input.device, dtype=full_precision(input[:0]).dtype)
            with torch.no_grad():
                if input.is_meta:  # where the fast kernel has no form; shapes alone are asked for
                    mean, var = unused, unused
                else:
                    mean, var = torch.batch_norm_update_stats(input, unused, unused.clone(), 0.0)
        mean_b, std_b = mean.detach(), torch.sqrt(self.eps + var.detach())
        gamma = 1.0 if self.weight is None else per_group(self.weight, groups)
        beta = per_group(self.bias, groups)
        # y = gamma · (xhat · r + d) + beta, with one scale and one shift per channel.
        r, d = self._corrections(mean_b, std_b, groups)
        weight, bias = gamma * r, gamma * d + beta
        if self.synchronised:
            y = torch.addcmul(broadcast(bias), centred, broadcast(weight * torch.rsqrt(var + self.eps)))
            return y.to(input.dtype), (mean_b, std_b)
        return _Normalise.apply(input, weight, bias, mean, var, self.eps), (mean_b, std_b)

    def _corrections(self, mean_b: Tensor, std_b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """r and d (G·C,) by the averages before this step; 1 and 0 where evaluation looks at its batch alone."""
        if not self.training:
            return torch.ones_like(std_b), torch.zeros_like(mean_b)
        mu, s = per_group(self.running_mean, groups), per_group(self.running_std, groups)
        rmax = 1 + (self.rmax - 1) * self._ramp(self.rmax_end)
        dmax = self.dmax * self._ramp(self.dmax_end)
        return held((std_b / s).clamp(1 / rmax, rmax)), held(((mean_b - mu) / s).clamp(-dmax, dmax))

    def _ramp(self, end: float) -> Tensor:
        """0 up to and at `ramp_start`, 1 from `end` on, linear between (and a jump if they are one)."""
        return ((self.clock.now - self.ramp_start) / max(end - self.ramp_start, 1e-12)).clamp(0, 1)

    def evaluate(self, input: Tensor) -> Tensor:
        var = self.running_std.square()  # eps is in it
        return F.batch_norm(input, self.running_mean, var, self.weight, self.bias, False, 0.0, 0.0)

    def update(self, *statistics: Tensor) -> None:
        mean, std = statistics
        self.num_batches_tracked.add_(1)
        alpha = self.num_batches_tracked.to(mean.dtype).reciprocal().clamp_min(self.momentum)
        self.running_mean.lerp_(mean, alpha)
        self.running_std.lerp_(std, alpha)

    def adopt(self, *means: Tensor) -> None:
        mean, square = means
        self.running_mean.copy_(mean)
        self.running_std.copy_(torch.sqrt(self.eps + (square - mean.square()).clamp_min(0)))


class BatchRenorm(Variant):
    """Batch renormalisation (Ioffe 2017, 1702.03275).

    For x of shape (N, C, H, W), per channel over m = N·H·W values, with mean muB and biased variance vB, and with
    moving averages mu and s as they were before this step:

        sB = sqrt(eps + vB)
        r = clip(sB / s, 1/rmax, rmax),  d = clip((muB - mu) / s, -dmax, dmax)      constants in backpropagation
        y = gamma · ((x - muB) / sB · r + d) + beta
        mu += alpha · (muB - mu),  s += alpha · (sB - s)                           the std is averaged
        evaluation: y = gamma · (x - mu) / s + beta

    rmax and dmax rise from 1 and 0 at `ramp_start` to their values at `rmax_end` and `dmax_end`, linearly [A]; before,
    and while nobody moves the clock, it is batch normalisation. alpha is `momentum`, but 1/n for the first n batches
    while that is more [A]: their plain mean, so that the averages' start at 0 and 1 leaves no trace in a short run.
    With groups the averages take the mean of the groups' statistics [A].
    Invariant: with rmax = 1 and dmax = 0 its training is that of `BatchNorm`, forward and backward.
    """

    def __init__(
        self,
        *,
        eps: float,
        momentum: float,
        rmax: float,
        dmax: float,
        ramp_unit: str,
        ramp_start: float,
        dmax_end: float,
        rmax_end: float,
        learn_scale: bool,
        norm_batch: int | None = None,
    ) -> None:
        super().__init__(norm_batch=norm_batch)
        last = last_time("ramp_unit", ramp_unit)
        check_range("rmax", rmax, 1.0)
        check_range("dmax", dmax)
        check_range("ramp_start", ramp_start, 0.0, last)
        check_range("dmax_end", dmax_end, ramp_start, last)
        check_range("rmax_end", rmax_end, ramp_start, last)
        if not isinstance(learn_scale, bool):
            raise UserError(f"norm.learn_scale={learn_scale} is neither true nor false.")
        self.options: dict[str, Any] = {
            "eps": eps,
            "momentum": momentum,
            "rmax": rmax,
            "dmax": dmax,
            "ramp_start": ramp_start,
            "dmax_end": dmax_end,
            "rmax_end": rmax_end,
            "learn_scale": learn_scale,
            "clock": Clock(ramp_unit),
        }

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        return start_as(norm, BatchRenorm2d(norm.num_features, norm_batch=self.norm_batch, **self.options))
