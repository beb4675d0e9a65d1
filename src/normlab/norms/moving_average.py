"""Normalizers by moving averages in both passes: MABN and PowerNorm."""

from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.common.registry import option, register
from normlab.norms.layer_statistics import (
    BatchStatistics,
    broadcast,
    full_precision,
    keep_for_backward,
    mean_over_processes,
    per_group,
    processes,
)
from normlab.norms.sites import Variant, copy_affine
from normlab.norms.steps import Clock
from normlab.norms.weights import ReparametrizedConv2d


class _Scaled(torch.autograd.Function):
    """y = gamma · r · z + beta with z = x / sqrt(s + eps), for x (k, G·C, H, W), gamma and beta (G·C,).

    With g = dL/dz the input's gradient is (g - z · psi) / sqrt(s + eps). It is the exact one if s is the batch's own
    mean square, r = 1 and psi = mean(g · z); here psi = share · mean(g · z) + past. The backward pass adds the means
    of g · z - excess, weighted by images, to `noted` (C + 1,), and the images to its last entry.
    `constants` (5, G·C) are s, r, share, past and excess; `settings` are eps, and whether psi is over all processes.

    Nothing else that may be compiled writes `noted`: of two writers, a compiled one would be lost silently.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        constants: Tensor,
        noted: Tensor | None,
        settings: tuple[float, bool],
    ) -> Tensor:
        s, r = constants[0], constants[1]
        ctx.save_for_backward(x, gamma, constants)
        ctx.noted, (ctx.eps, ctx.together) = noted, settings
        return F.batch_norm(x, torch.zeros_like(s), s, gamma * r, beta, False, 0.0, ctx.eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, constants = ctx.saved_tensors
        s, r, share, past, excess = constants.unbind()
        dy = full_precision(dy)
        images = len(x)
        inverse = torch.rsqrt(s + ctx.eps)
        dy_z = (dy * x).sum((0, 2, 3)) * inverse
        scale = gamma * r
        gz = scale * dy_z * (x.shape[1] / x.numel())
        if ctx.together:
            gz = mean_over_processes(gz, images)
        psi = torch.addcmul(past, share, gz)
        if ctx.noted is not None:
            groups = x.shape[1] // (len(ctx.noted) - 1)
            statistic = (gz - excess).view(groups, -1).sum(0)
            ctx.noted.add_(torch.cat([statistic, statistic.new_full((1,), groups)]), alpha=images)
        dx = (dy * broadcast(scale * inverse)).addcmul_(x, broadcast(-psi * inverse.square()))
        return dx.to(x.dtype), r * dy_z, dy.sum((0, 2, 3)), None, None, None


class MovingSquare(BatchStatistics):
    """Computes y = gamma · r · x / sqrt(s + eps) + beta by moving averages in both passes.

    s, r and the gradient's psi (see `_Scaled`) come from moving averages of E[x²] and of E[g·z].
    While the clock is below `warmup`, and at the first batch, s and psi are those of the group itself, and the
    gradient is exact. Evaluation divides by `running_square`, the exponential average of E[x²]; it starts as the plain
    mean of the first batches [A], for a start at 1 would last for half of a short run.

    The backward pass notes its statistics in `noted`; after the step their mean, weighted by images, goes into the
    averages. So several backward calls of a step (groups and the last, smaller group; parts of a batch) count as one,
    and a forward pass without a backward pass changes nothing. Without a loop that calls `at_step` and `after_step`
    the layer stays in its warm-up. Under a GradScaler the averages are of scaled gradients; what overflowed is left
    out.
    """

    takes_single_values = True  # there is no mean to subtract

    averages: ClassVar[dict[str, float]] = {"running_square": 1.0}
    counter = "batches"
    running_square: Tensor
    batches: Tensor
    noted: Tensor
    eps: float
    warmup: float
    clock: Clock

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.register_buffer("noted", torch.zeros(channels + 1))

    def statistics(self, square: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Return s after the warm-up and r, from the groups' E[x²]; all (G·C,)."""
        raise NotImplementedError

    def gradient_statistics(self, zz: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return share and past, of psi after the warm-up, and excess (`_Scaled`) by the groups' E[z²]; all (G·C,)."""
        raise NotImplementedError

    def take_gradient(self, statistic: Tensor, valid: Tensor) -> None:
        """Take a step's mean of g · z - excess (C,) into the averages, where `valid` (C,)."""
        raise NotImplementedError

    def normalize(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `BatchStatistics.normalize`."""
        with torch.no_grad():
            square = self.batch_mean(full_precision(input).square())
            zero, one = torch.zeros_like(square), torch.ones_like(square)
            s, r, share, past, excess = square, one, one, zero, zero
            if self.training:
                warming = (self.clock.now < self.warmup) | (self.batches == 0)
                s, r = self.statistics(square, groups)
                s = torch.where(warming, square, s)
                share, past, excess = self.gradient_statistics(square / (s + self.eps), groups)
                share, past = torch.where(warming, one, share), torch.where(warming, zero, past)
            constants = keep_for_backward(torch.stack([s, r, share, past, excess]))
        gamma, beta = per_group(self.weight, groups), per_group(self.bias, groups)
        noted = self.noted if self.training else None
        together = self.synchronized and processes() > 1
        return _Scaled.apply(input, gamma, beta, constants, noted, (self.eps, together)), (square,)

    def evaluate(self, input: Tensor) -> Tensor:
        """See `BatchStatistics.evaluate`."""
        zero = torch.zeros_like(self.running_square)
        return F.batch_norm(input, zero, self.running_square, self.weight, self.bias, False, 0.0, self.eps)

    def averages_of(self, *moments: Tensor) -> tuple[Tensor, ...]:
        """Return the mean square."""
        return moments[1:]

    @torch.no_grad()
    def after_step(self) -> None:
        """Take what backward passes have noted into the averages."""
        if (self.synchronized or self.averages_over_processes) and processes() > 1:
            dist.all_reduce(self.noted)
        total, images = self.noted[:-1], self.noted[-1]
        self.take_gradient(total / images.clamp_min(1), (images > 0) & total.isfinite())
        self.noted.zero_()


class MovingAverageBatchNorm2d(MovingSquare):
    """See `MABN`. Keeps the last `window` - 1 batches' E[x²] and E[g·z] (C,), means over groups."""

    squares: Tensor
    gradients: Tensor
    gradient_steps: Tensor

    window: int
    r_from: float
    rmax: float

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.register_buffer("squares", torch.zeros(self.window - 1, channels))
        self.register_buffer("gradients", torch.zeros(self.window - 1, channels))
        self.register_buffer("gradient_steps", torch.zeros(channels, dtype=torch.long))

    def statistics(self, square: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """See `MovingSquare.statistics`."""
        share, past = _mean_with_newest(self.squares, self.batches)
        sma = torch.addcmul(per_group(past, groups), square, share)
        ema = per_group(self.running_square, groups)
        r = torch.sqrt((sma + self.eps) / (ema + self.eps)).clamp(1 / self.rmax, self.rmax)
        return sma, torch.where(self.clock.now < self.r_from, 1.0, r)

    def gradient_statistics(self, zz: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `MovingSquare.gradient_statistics`."""
        share, past = _mean_with_newest(self.gradients, self.gradient_steps)
        return per_group(share, groups), per_group(past, groups), torch.zeros_like(zz)

    def take_gradient(self, statistic: Tensor, valid: Tensor) -> None:
        """See `MovingSquare.take_gradient`."""
        _push(self.gradients, self.gradient_steps, statistic, valid)
        self.gradient_steps.add_(valid)

    def update(self, *statistics: Tensor) -> None:
        """See `BatchStatistics.update`."""
        (square,) = statistics
        _push(self.squares, self.batches, square, torch.ones_like(square, dtype=torch.bool))
        super().update(square)


def _mean_with_newest(history: Tensor, pushed: Tensor) -> tuple[Tensor, Tensor]:
    """Share and past, where share · x + past is the mean of x and the history.

    That has the `pushed` rows (at most all) of `history` (rows, C), whose other rows are zero.
    """
    share = (pushed.clamp(max=len(history)) + 1).to(history.dtype).reciprocal()
    return share, history.sum(0) * share


def _push(history: Tensor, pushed: Tensor, newest: Tensor, valid: Tensor) -> None:
    """Put `newest` (C,) in the place of the oldest of `history` (rows, C), where `valid` (C,)."""
    if len(history):
        row = (pushed % len(history)).expand(1, history.shape[1])
        history.scatter_(0, row, torch.where(valid, newest, history.gather(0, row)[0])[None])


class PowerNorm2d(MovingSquare):
    """See `PowerNorm`."""

    nu: Tensor

    alpha: float
    alpha_backward: float

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, momentum=1 - options["alpha"], **options)
        self.register_buffer("nu", torch.zeros(channels))

    def statistics(self, square: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """See `MovingSquare.statistics`."""
        return per_group(self.running_square, groups), torch.ones_like(square)

    def gradient_statistics(self, zz: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `MovingSquare.gradient_statistics`."""
        nu = per_group(self.nu, groups)
        return torch.zeros_like(nu), nu, nu * zz

    def take_gradient(self, statistic: Tensor, valid: Tensor) -> None:
        """See `MovingSquare.take_gradient`."""
        self.nu.add_(torch.where(valid, statistic, 0), alpha=1 - self.alpha_backward)


class CenteredConv2d(ReparametrizedConv2d):
    """A convolution by W - mean over (in, kh, kw) of W, for W (out, in, kh, kw); the gradient passes through the mean.

    Invariant: a constant added to all of an (unpadded) input changes nothing.
    """

    def effective_weight(self) -> Tensor:
        """Return W, centered."""
        w = super().effective_weight()
        return w - w.mean((1, 2, 3), keepdim=True)


class _MovingVariant(Variant):
    """A variant with phases, by one clock for all layers."""

    refused: ClassVar[dict[str, dict[str, str]]] = {
        "precision": {"fp16": "its averages of gradients cannot follow a loss scale that changes; use bf16"},
        "probe": {"sharpness": "its backward pass is not the derivative of the loss, so there is no Hessian"},
    }
    layer: ClassVar[type[MovingSquare]]

    eps: float = option(1e-5, gt=0)
    unit: str = option("fraction", choices=("fraction", "steps"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.clock = Clock(self.unit)

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return a layer of the class `layer`."""
        return copy_affine(norm, self.layer(norm.num_features, clock=self.clock, **self.options))


@register("mabn", aliases=("movingaveragebatchnorm",), family="statistics of the batch", order=11)
class MABN(_MovingVariant):
    """Moving average batch normalization (Yan et al., ICLR 2020), for norms over few images.

    For x (N, C, H, W) from a convolution with centered weights (`CenteredConv2d`), per channel, and g = dL/dz:

        chi² = mean(x²);  SMA(chi²), SMA(psi): means over the newest `window` batches, this one included
        z = x / sqrt(SMA(chi²) + eps);  y = gamma · r · z + beta
        r = clip(sqrt((SMA(chi²) + eps) / (EMA(chi²) + eps)), 1/rmax, rmax)
        psi = mean(g · z);  dL/dx = (g - z · SMA(psi)) / sqrt(SMA(chi²) + eps)

    Evaluation: y = gamma · x / sqrt(EMA(chi²) + eps) + beta. No mean is subtracted: the weights are centered instead.

    Phases: below `warmup` the batch's own chi² and psi, below `r_from` r = 1. The paper counts steps (100 and about
    1000); by fraction of the run they are an assumption [A], as short runs would never leave them. The paper's window
    is B_real / B, the images of a batch that needs no help over those of a group; here it is the number of batches
    (16 groups of 2 images stand for 32). Further assumptions [A]: r is a constant to the gradient and EMA the one
    before this step, as in batch renormalization; eps in every root; a window that is not full is the mean of what it
    has; a group of `norm_batch` images uses its own chi² and psi as the newest, and means over groups as the older.

    Invariant: with window = 1 and r = 1 it is the exact x / sqrt(mean(x²) + eps), forward and backward.
    """

    needs_convolution = True
    layer = MovingAverageBatchNorm2d

    momentum: float = option(0.02, gt=0, le=1)
    window: int = option(16, ge=1, le=10_000)
    rmax: float = option(5.0, ge=1)
    warmup: float = option(0.05, ge=0, unit="unit")
    r_from: float = option(0.2, ge="warmup", unit="unit")

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        """Return a `CenteredConv2d`."""
        return CenteredConv2d.of(convolution)


@register("powernorm", aliases=("power",), family="statistics of the batch", order=12)
class PowerNorm(_MovingVariant):
    """Power normalization (Shen et al. 2020, 2003.07845).

    For x (N, C, H, W), per channel, with phi and nu from before this step, and g = dL/dz:

        z = x / sqrt(phi + eps);  y = gamma · z + beta;  dL/dx = (g - z · nu) / sqrt(phi + eps)
        phi <- alpha · phi + (1 - alpha) · mean(x²)
        nu  <- nu · (1 - (1 - alpha') · mean(z²)) + (1 - alpha') · mean(g · z),  alpha' = alpha_backward

    Evaluation is the same by phi. Below `warmup` it is x / sqrt(mean(x²) + eps) with its exact gradient, while phi and
    nu collect; nu starts at 0, and its recursion is that of the authors' code. Assumptions [A] (docs/papers.md, section
    6): eps, the warm-up's length and its exact gradient, phi as the plain mean of the first batches, and x as it comes,
    which the authors' code first divides by its root mean square over the channels.

    Invariant: after the warm-up the output of an image does not depend on the other images of its batch.
    """

    layer = PowerNorm2d

    alpha: float = option(0.9, ge=0, lt=1)
    alpha_backward: float = option(0.9, ge=0, lt=1)
    warmup: float = option(0.25, ge=0, unit="unit")
