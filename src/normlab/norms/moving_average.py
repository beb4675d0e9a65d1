"""Normalisers by moving averages in both passes: MABN and PowerNorm."""

import math
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.norms.layer_statistics import BatchStatistics, broadcast, full_precision, held, per_group, processes
from normlab.norms.options import check_count, check_range, last_time
from normlab.norms.sites import Variant, start_as
from normlab.norms.steps import Clock
from normlab.norms.weights import ReparametrisedConv2d


class _Scaled(torch.autograd.Function):
    """y = gamma · r · z + beta with z = x / sqrt(s + eps), for x (k, G·C, H, W), gamma and beta (G·C,).

    With g = dL/dz the input's gradient is (g - z · psi) / sqrt(s + eps). It is the exact one if s is the batch's own
    mean square, r = 1 and psi = mean(g · z); here psi = share · mean(g · z) + past. The backward pass adds the means
    of g · z - excess, weighted by images, to `noted` (C + 1,), and the images to its last entry.
    `constants` (5, G·C) are s, r, share, past and excess.

    Nothing else that may be compiled writes `noted`: compiled, one of two writers would be lost without a word.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        constants: Tensor,
        noted: Tensor | None,
        eps: float,
        together: bool,
    ) -> Tensor:
        s, r = constants[0], constants[1]
        ctx.save_for_backward(x, gamma, constants)
        ctx.noted, ctx.eps, ctx.together = noted, eps, together
        return F.batch_norm(x, torch.zeros_like(s), s, gamma * r, beta, False, 0.0, eps)

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
            gz = _over_processes(gz, images)
        psi = torch.addcmul(past, share, gz)
        if ctx.noted is not None:
            groups = x.shape[1] // (len(ctx.noted) - 1)
            statistic = (gz - excess).view(groups, -1).sum(0)
            ctx.noted.add_(torch.cat([statistic, statistic.new_full((1,), groups)]), alpha=images)
        dx = (dy * broadcast(scale * inverse)).addcmul_(x, broadcast(-psi * inverse.square()))
        return dx.to(x.dtype), r * dy_z, dy.sum((0, 2, 3)), None, None, None, None


def _over_processes(mean: Tensor, images: int) -> Tensor:
    """Mean of the processes' means (C,), weighted by their images."""
    total = torch.cat([mean, torch.ones_like(mean[:1])]) * images
    dist.all_reduce(total)
    return total[:-1] / total[-1]


class MovingSquare(BatchStatistics):
    """y = gamma · r · x / sqrt(s + eps) + beta, where s, r and the gradient's psi (see `_Scaled`) come from moving
    averages of E[x²] and of E[g·z].

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

    running_square: Tensor
    batches: Tensor
    noted: Tensor

    def __init__(
        self, channels: int, *, eps: float, momentum: float, warmup: float, clock: Clock, norm_batch: int | None = None
    ) -> None:
        super().__init__()
        self.eps, self.momentum, self.warmup, self.norm_batch = eps, momentum, warmup, norm_batch
        self.clock = clock
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_square", torch.ones(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self.register_buffer("noted", torch.zeros(channels + 1))

    def moving(self, square: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """s after the warm-up and r, from the groups' E[x²]; all (G·C,)."""
        raise NotImplementedError

    def moving_gradient(self, zz: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """share and past, of psi after the warm-up, and excess, from the groups' E[z²]; all (G·C,). See `_Scaled`."""
        raise NotImplementedError

    def take_gradient(self, statistic: Tensor, valid: Tensor) -> None:
        """Take a step's mean of g · z - excess (C,) into the averages, where `valid` (C,)."""
        raise NotImplementedError

    def normalise(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.no_grad():
            square = self.batch_mean(full_precision(input).square())
            zero, one = torch.zeros_like(square), torch.ones_like(square)
            s, r, share, past, excess = square, one, one, zero, zero
            if self.training:
                warming = (self.clock.now < self.warmup) | (self.batches == 0)
                s, r = self.moving(square, groups)
                s = torch.where(warming, square, s)
                share, past, excess = self.moving_gradient(square / (s + self.eps), groups)
                share, past = torch.where(warming, one, share), torch.where(warming, zero, past)
            constants = held(torch.stack([s, r, share, past, excess]))
        gamma, beta = per_group(self.weight, groups), per_group(self.bias, groups)
        noted = self.noted if self.training else None
        together = self.synchronised and processes() > 1
        return _Scaled.apply(input, gamma, beta, constants, noted, self.eps, together), (square,)

    def evaluate(self, input: Tensor) -> Tensor:
        zero = torch.zeros_like(self.running_square)
        return F.batch_norm(input, zero, self.running_square, self.weight, self.bias, False, 0.0, self.eps)

    def update(self, *statistics: Tensor) -> None:
        (square,) = statistics
        self.batches.add_(1)
        newest = self.batches.to(square.dtype).reciprocal().clamp_min(self.momentum)
        self.running_square.lerp_(square, newest)

    def adopt(self, *means: Tensor) -> None:
        _, square = means
        self.running_square.copy_(square)

    @torch.no_grad()
    def after_step(self) -> None:
        if (self.synchronised or self.shares_averages) and processes() > 1:
            dist.all_reduce(self.noted)
        total, images = self.noted[:-1], self.noted[-1]
        self.take_gradient(total / images.clamp_min(1), (images > 0) & total.isfinite())
        self.noted.zero_()


class MovingAverageBatchNorm2d(MovingSquare):
    """See `MABN`. Keeps the last `window` - 1 batches' E[x²] and E[g·z] (C,), means over groups."""

    squares: Tensor
    gradients: Tensor
    gradient_steps: Tensor

    def __init__(self, channels: int, *, window: int, r_from: float, rmax: float, **options: Any) -> None:
        super().__init__(channels, **options)
        self.r_from, self.rmax = r_from, rmax
        self.register_buffer("squares", torch.zeros(window - 1, channels))
        self.register_buffer("gradients", torch.zeros(window - 1, channels))
        self.register_buffer("gradient_steps", torch.zeros(channels, dtype=torch.long))

    def moving(self, square: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        share, past = _mean_with_newest(self.squares, self.batches)
        sma = torch.addcmul(per_group(past, groups), square, share)
        ema = per_group(self.running_square, groups)
        r = torch.sqrt((sma + self.eps) / (ema + self.eps)).clamp(1 / self.rmax, self.rmax)
        return sma, torch.where(self.clock.now < self.r_from, 1.0, r)

    def moving_gradient(self, zz: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        share, past = _mean_with_newest(self.gradients, self.gradient_steps)
        return per_group(share, groups), per_group(past, groups), torch.zeros_like(zz)

    def take_gradient(self, statistic: Tensor, valid: Tensor) -> None:
        _push(self.gradients, self.gradient_steps, statistic, valid)
        self.gradient_steps.add_(valid)

    def update(self, *statistics: Tensor) -> None:
        (square,) = statistics
        _push(self.squares, self.batches, square, torch.ones_like(square, dtype=torch.bool))
        super().update(square)


def _mean_with_newest(history: Tensor, pushed: Tensor) -> tuple[Tensor, Tensor]:
    """share and past, where share · x + past is the mean of x and the `pushed` rows (at most all) of `history`
    (rows, C), whose other rows are zero.
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

    def __init__(self, channels: int, *, alpha: float, alpha_backward: float, **options: Any) -> None:
        super().__init__(channels, momentum=1 - alpha, **options)
        self.alpha_backward = alpha_backward
        self.register_buffer("nu", torch.zeros(channels))

    def moving(self, square: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        return per_group(self.running_square, groups), torch.ones_like(square)

    def moving_gradient(self, zz: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        nu = per_group(self.nu, groups)
        return torch.zeros_like(nu), nu, nu * zz

    def take_gradient(self, statistic: Tensor, valid: Tensor) -> None:
        self.nu.add_(torch.where(valid, statistic, 0), alpha=1 - self.alpha_backward)


class CentredConv2d(ReparametrisedConv2d):
    """A convolution by W - mean over (in, kh, kw) of W, for W (out, in, kh, kw); the gradient passes through the mean.

    Invariant: a constant added to all of an (unpadded) input changes nothing.
    """

    def effective_weight(self) -> Tensor:
        w = super().effective_weight()
        return w - w.mean((1, 2, 3), keepdim=True)


class _MovingVariant(Variant):
    """What the two have in common: the phases, one clock for all layers, the network's own start."""

    refused: ClassVar[dict[str, dict[str, str]]] = {
        "precision": {"fp16": "its averages of gradients cannot follow a loss scale that changes; use bf16"},
        "probe": {"sharpness": "its backward pass is not the derivative of the loss, so there is no Hessian"},
    }

    def __init__(self, *, eps: float, warmup: float, unit: str, norm_batch: int | None) -> None:
        super().__init__(norm_batch=norm_batch)
        check_range("warmup", warmup, 0.0, last_time("unit", unit))
        self.eps = eps
        self.warmup = warmup
        self.clock = Clock(unit)

    def layer(self, channels: int) -> MovingSquare:
        raise NotImplementedError

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        return start_as(norm, self.layer(norm.num_features))


class MABN(_MovingVariant):
    """Moving average batch normalisation (Yan et al., ICLR 2020), for norms over few images.

    For x (N, C, H, W) from a convolution with centred weights (`CentredConv2d`), per channel, and g = dL/dz:

        chi² = mean(x²);  SMA(chi²), SMA(psi): means over the newest `window` batches, this one included
        z = x / sqrt(SMA(chi²) + eps);  y = gamma · r · z + beta
        r = clip(sqrt((SMA(chi²) + eps) / (EMA(chi²) + eps)), 1/rmax, rmax)
        psi = mean(g · z);  dL/dx = (g - z · SMA(psi)) / sqrt(SMA(chi²) + eps)

    Evaluation: y = gamma · x / sqrt(EMA(chi²) + eps) + beta. No mean is subtracted: the weights are centred instead.

    Phases: below `warmup` the batch's own chi² and psi, below `r_from` r = 1. The paper counts steps (100 and about
    1000); by fraction of the run they are an assumption [A], as short runs would never leave them. The paper's window
    is B_real / B, the images of a batch that needs no help over those of a group; here it is the number of batches
    (16 groups of 2 images stand for 32). Further assumptions [A]: r is a constant to the gradient and EMA the one
    before this step, as in batch renormalisation; eps in every root; a window that is not full is the mean of what it
    has; a group of `norm_batch` images uses its own chi² and psi as the newest, and means over groups as the older.

    Invariant: with window = 1 and r = 1 it is the exact x / sqrt(mean(x²) + eps), forward and backward.
    """

    needs_convolution = True

    def __init__(
        self,
        *,
        eps: float,
        momentum: float,
        window: int,
        rmax: float,
        warmup: float,
        r_from: float,
        unit: str,
        norm_batch: int | None = None,
    ) -> None:
        super().__init__(eps=eps, warmup=warmup, unit=unit, norm_batch=norm_batch)
        check_count("window", window)
        check_range("rmax", rmax, 1.0)
        check_range("r_from", r_from, warmup, last_time("unit", unit))
        self.momentum = momentum
        self.window = window
        self.rmax = rmax
        self.r_from = r_from

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        return CentredConv2d.of(convolution)

    def layer(self, channels: int) -> MovingSquare:
        return MovingAverageBatchNorm2d(
            channels,
            eps=self.eps,
            momentum=self.momentum,
            window=self.window,
            rmax=self.rmax,
            warmup=self.warmup,
            r_from=self.r_from,
            clock=self.clock,
            norm_batch=self.norm_batch,
        )


class PowerNorm(_MovingVariant):
    """Power normalisation (Shen et al. 2020, 2003.07845).

    For x (N, C, H, W), per channel, with phi and nu from before this step, and g = dL/dz:

        z = x / sqrt(phi + eps);  y = gamma · z + beta;  dL/dx = (g - z · nu) / sqrt(phi + eps)
        phi <- alpha · phi + (1 - alpha) · mean(x²)
        nu  <- nu · (1 - (1 - alpha') · mean(z²)) + (1 - alpha') · mean(g · z),  alpha' = alpha_backward

    Evaluation is the same by phi. Below `warmup` it is x / sqrt(mean(x²) + eps) with its exact gradient, while phi and
    nu collect. Assumptions [A]: the recursion of nu (papers.md has "an EMA of <g, z>"), eps, the warm-up's length, and
    phi as the plain mean of the first batches. nu starts at 0.

    Invariant: after the warm-up the output of an image does not depend on the other images of its batch.
    """

    def __init__(
        self,
        *,
        eps: float,
        alpha: float,
        alpha_backward: float,
        warmup: float,
        unit: str,
        norm_batch: int | None = None,
    ) -> None:
        super().__init__(eps=eps, warmup=warmup, unit=unit, norm_batch=norm_batch)
        for name, value in (("alpha", alpha), ("alpha_backward", alpha_backward)):
            check_range(name, value, 0.0, math.nextafter(1.0, 0.0), "0 up to, but not including, 1")
        self.alpha = alpha
        self.alpha_backward = alpha_backward

    def layer(self, channels: int) -> MovingSquare:
        return PowerNorm2d(
            channels,
            eps=self.eps,
            alpha=self.alpha,
            alpha_backward=self.alpha_backward,
            warmup=self.warmup,
            clock=self.clock,
            norm_batch=self.norm_batch,
        )
