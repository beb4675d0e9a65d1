"""Normalizers by moving averages in both passes: MABN and PowerNorm."""

import math
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

# `refused` of a variant whose backward pass has averages of gradients.
APPROXIMATE_BACKWARD = {
    "precision": {"fp16": "its averages of gradients cannot follow a loss scale that changes; use bf16"},
    "probe": {"sharpness": "its backward pass is not the derivative of the loss, so there is no Hessian"},
}


class _Scaled(torch.autograd.Function):
    """y = gamma · r · z + beta with z = x / sqrt(s + eps), for x (k, G·C, H, W), gamma and beta (G·C,).

    With g = dL/dz the input's gradient is (g - z · psi) / sqrt(b + eps). It is the exact one if s and b are the group's
    own mean square, r = 1 and psi = mean(g · z). Of the `constants` zero, s, s + eps, r, b, own, mean(z²) and psi
    (G·C,) some may be None: r for 1, b for s, the others where they are not needed. The backward pass leaves its
    statistics in `state`:

    - with a window, `state` (window - 1, C) has the newest groups' mean(g · z), psi is the mean of the newest `window`
      of them, this group's included (`_slide`), but this group's alone where own, a bool; the groups go into `state`;
    - without one, it adds the groups' mean(g · z) - psi · mean(z²), weighted by images, to `state` (C + 1,), and the
      images to its last entry;
    - without a state, psi is the group's own.

    Nothing else that may be compiled writes `state`: of two writers, a compiled one would be lost silently.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        state: Tensor | None,
        settings: tuple[float, int | None, bool, bool],
        *constants: Tensor | None,
    ) -> Tensor:
        zero, s, _, r, *_ = constants
        scale = gamma if r is None else gamma * r
        ctx.save_for_backward(x, scale, *constants)
        ctx.state, ctx.settings = state, settings
        return F.batch_norm(x, zero, s, scale, beta, False, 0.0, settings[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved, scale, zero, s, divisor, r, b, own, zz, psi = ctx.saved_tensors
        eps, window, together, shared = ctx.settings
        x, dy = full_precision(saved), full_precision(dy)
        images, values = len(x), x.numel() / x.shape[1]
        of_dy = scale
        if b is not None:
            ratio = torch.sqrt(divisor / (b + eps))
            of_dy, divisor = scale * ratio, divisor / ratio
        # One kernel for dy · of_dy / sqrt(s + eps), sum dy · z and sum dy. It has no statistics of a training batch;
        # CUDA's kernels for channels_last want them empty, not None.
        dx, dy_z, dbeta = torch.ops.aten.native_batch_norm_backward(
            dy, x, of_dy, zero, s, zero[:0], zero[:0], False, eps, [True, True, True]
        )
        gz = torch.addcmul(zero, scale, dy_z, value=1 / values)
        if together:
            gz = mean_over_processes(gz, images)
        if ctx.state is None:
            psi = gz
        elif window is None:
            groups = len(gz) // (len(ctx.state) - 1)
            statistic = torch.addcmul(gz, psi, zz, value=-1).view(groups, -1).sum(0)
            ctx.state.add_(torch.cat([statistic, statistic.new_full((1,), groups)]), alpha=images)
        else:
            means, newest = _slide(ctx.state, gz, shared)
            psi = torch.where(own, gz, means)
            if len(newest):
                finite = torch.linalg.vector_norm(newest, torch.inf, 0) < torch.inf
                torch.where(finite, newest, ctx.state, out=ctx.state)
        dx.addcmul_(x, broadcast(psi / divisor), value=-1)
        return dx.to(saved.dtype), dy_z if r is None else r * dy_z, dbeta, *[None] * 10


def _slide(history: Tensor, statistic: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """Return for each group the mean (G·C,) of a window that ends with it, and the history after all of them.

    The window has a row more than `history` (rows, C), and slides over its rows and then the groups of `statistic`
    (G·C,) in order. With `shared` the groups of all processes, n of rank r before n of rank r + 1, are in that order.
    """
    rows, channels = history.shape
    newest = statistic.view(-1, channels)
    groups = len(newest)
    if shared:
        parts = [torch.empty_like(newest) for _ in range(processes())]
        dist.all_gather(parts, newest.contiguous())
        newest = torch.stack(parts, 1).flatten(0, 1)
    rows_and_groups = torch.cat([history, newest])
    means = rows_and_groups.unfold(0, rows + 1, 1).mean(-1)
    if shared:
        means = means.view(groups, -1, channels)[:, dist.get_rank()]
    return means.reshape(-1), rows_and_groups[len(newest) :]


class MovingSquare(BatchStatistics):
    """Computes y = gamma · r · x / sqrt(s + eps) + beta by moving averages in both passes.

    s, r and the gradient's psi (see `_Scaled`) come from moving averages of E[x²] and of E[g·z]. Evaluation divides by
    `running_square`.

    Averages of gradients move in the backward pass alone: a forward pass without one leaves them. Without a loop that
    calls `at_step` and `after_step` the layer stays in its warm-up. Under a GradScaler the averages are of scaled
    gradients; what overflowed is left out.
    """

    takes_single_values = True  # there is no mean to subtract

    averages: ClassVar[dict[str, float]] = {"running_square": 1.0}
    counter = "batches"
    running_square: Tensor
    batches: Tensor
    eps: float
    zero: Tensor
    clock: Clock

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.register_buffer("zero", torch.zeros(channels), persistent=False)

    def statistics(self, square: Tensor, groups: int) -> tuple[tuple[Tensor | None, ...], Tensor]:
        """Return the `constants` of `_Scaled` from s on by the groups' E[x²], and what `running_square` averages.

        Averages that slide from group to group move here.
        """
        raise NotImplementedError

    def gradient_state(self) -> tuple[Tensor, int | None]:
        """Return `state` of `_Scaled`, and its window."""
        raise NotImplementedError

    def normalize(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `BatchStatistics.normalize`."""
        with torch.no_grad():
            square = self.batch_mean(full_precision(input).square())
            own: tuple[Tensor | None, ...] = (square, square + self.eps, *[None] * 5)
            averaged, state, window = square, None, None
            if self.training:
                own, averaged = self.statistics(square, groups)
                state, window = self.gradient_state()
            kept = iter(keep_for_backward(*(one for one in own if one is not None)))
            constants = [None if one is None else next(kept) for one in own]
        gamma, beta = per_group(self.weight, groups), per_group(self.bias, groups)
        together = self.synchronized and processes() > 1
        settings = (self.eps, window, together, self.shared)
        zero = per_group(self.zero, groups)
        return _Scaled.apply(input, gamma, beta, state, settings, zero, *constants), (averaged,)

    @property
    def shared(self) -> bool:
        """Return whether other processes have groups of the same batch."""
        return self.averages_over_processes and processes() > 1

    def evaluate(self, input: Tensor) -> Tensor:
        """See `BatchStatistics.evaluate`."""
        return F.batch_norm(input, self.zero, self.running_square, self.weight, self.bias, False, 0.0, self.eps)

    def averages_of(self, *moments: Tensor) -> tuple[Tensor, ...]:
        """Return the mean square."""
        return moments[1:]


class MovingAverageBatchNorm2d(MovingSquare):
    """See `MABN`. Keeps E[x²] and E[g·z] (C,) of the newest `window` - 1 groups; `seen` counts groups."""

    slides_over_groups = True

    squares: Tensor
    gradients: Tensor
    seen: Tensor

    window: int
    ema_of: str
    ema_start: str

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.register_buffer("squares", torch.zeros(self.window - 1, channels))
        self.register_buffer("gradients", torch.zeros(self.window - 1, channels))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def statistics(self, square: Tensor, groups: int) -> tuple[tuple[Tensor | None, ...], Tensor]:
        """See `MovingSquare.statistics`."""
        needed, r_least, r_most = map(self.clock.get_buffer, ("needed", "r_least", "r_most"))
        own = self.seen < needed
        sma, newest = _slide(self.squares, square, self.shared)
        self.squares.copy_(newest)
        self.seen.add_(groups * (processes() if self.shared else 1))
        s = torch.where(own, square, sma)
        ema = per_group(self.running_square, groups)
        divisor = s + self.eps
        r = torch.sqrt(divisor / (ema + self.eps)).clamp(r_least, r_most)
        return (s, divisor, r, None, own, None, None), s if self.ema_of == "sma" else square

    def gradient_state(self) -> tuple[Tensor, int | None]:
        """See `MovingSquare.gradient_state`."""
        return self.gradients, self.window

    def newest(self, count: Tensor) -> float | Tensor:
        """See `BatchStatistics.newest`."""
        plain = count.reciprocal() if self.ema_start == "mean" else (count == 1).to(count.dtype)
        return plain.clamp_min(self.momentum)


class PowerNorm2d(MovingSquare):
    """See `PowerNorm`. `noted` has the sum of mean(g·z) - nu · mean(z²) over a step's groups, and their images."""

    nu: Tensor
    noted: Tensor

    warmup: float
    alpha: float
    alpha_backward: float
    scale_channels: bool
    backward_rms: str

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.register_buffer("noted", torch.zeros(channels + 1))
        self.register_buffer("nu", torch.zeros(channels))
        self.momentum = 1 - self.alpha

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W), divided by its root mean square over the channels before."""
        return super().forward(self._scaled(input)).to(input.dtype)

    def _scaled(self, input: Tensor) -> Tensor:
        if not self.scale_channels:
            return input
        x = full_precision(input)
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps)

    def moments(self, input: Tensor) -> tuple[Tensor, ...]:
        """See `BatchStatistics.moments`."""
        return super().moments(self._scaled(input))

    def statistics(self, square: Tensor, groups: int) -> tuple[tuple[Tensor | None, ...], Tensor]:
        """See `MovingSquare.statistics`."""
        s = torch.where(self.clock.now < self.warmup, square, per_group(self.running_square, groups))
        b = square if self.backward_rms == "batch" else None
        divisor = s + self.eps
        return (s, divisor, None, b, None, square / divisor, per_group(self.nu, groups)), square

    def gradient_state(self) -> tuple[Tensor, int | None]:
        """See `MovingSquare.gradient_state`."""
        return self.noted, None

    def newest(self, count: Tensor) -> float | Tensor:
        """See `BatchStatistics.newest`: of the plain mean of the first batches, and then of the exponential average."""
        plain = torch.where(self.clock.end < self.warmup, count.reciprocal(), 0.0)
        return 1 - self.alpha * (1 - plain)

    @torch.no_grad()
    def after_step(self) -> None:
        """Take what backward passes have noted, a mean weighted by images, into `nu`.

        So several backward passes of a step (groups and the last, smaller group; parts of a batch) count as one.
        """
        if (self.synchronized or self.averages_over_processes) and processes() > 1:
            dist.all_reduce(self.noted)
        newest = self.noted[:-1] / self.noted[-1]  # not finite: gradients overflowed, or there were none
        self.nu.add_(newest.nan_to_num(0.0, 0.0, 0.0), alpha=1 - self.alpha_backward)
        self.noted.zero_()


class _Centered(torch.autograd.Function):
    """W - mean over (in, kh, kw) of W, which is its own derivative; plain autograd takes thrice the operations."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w - w.mean((1, 2, 3), keepdim=True)

    backward = forward


class CenteredConv2d(ReparametrizedConv2d):
    """A convolution by W - mean over (in, kh, kw) of W, for W (out, in, kh, kw); the gradient passes through the mean.

    Invariant: a constant added to all of an (unpadded) input changes nothing.
    """

    def effective_weight(self) -> Tensor:
        """Return W, centered."""
        w: Tensor = _Centered.apply(super().effective_weight())
        return w


class _MovingVariant(Variant):
    """A variant with phases, by one clock for all layers."""

    refused: ClassVar[dict[str, dict[str, str]]] = APPROXIMATE_BACKWARD
    layer: ClassVar[type[MovingSquare]]

    eps: float = option(1e-5, gt=0)
    unit: str = option("fraction", choices=("fraction", "steps"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.clock = Clock(self.unit, self.phase)

    def phase(self, now: float, end: float) -> dict[str, float]:
        """Return what layers have to know of the phase of a step from `now` to `end`."""
        return {}

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return a layer of the class `layer`."""
        return copy_affine(norm, self.layer(norm.num_features, clock=self.clock, **self.options))


@register(
    "mabn", aliases=("movingaveragebatchnorm",), family="statistics of the batch", order=11,
    formula="gamma · r · x / sqrt(SMA x² + eps) + beta, r = clip(sqrt(SMA / EMA), 1/5, 5), EMA the average of SMA; "
    "weights W - mean W; the gradient likewise by moving averages",
    source="Yan et al., ICLR 2020, as its code", over="N, H, W of the last 16 groups", parameters="gamma, beta",
    conv="yes", use="small groups of images (`norm_batch`); without groups see [below](#where-papers-and-codes-differ)",
    cost="two passes each way, small operations, centering",
)  # fmt: skip
class MABN(_MovingVariant):
    """Moving average batch normalization (Yan et al., ICLR 2020), for norms over few images.

    For x (N, C, H, W) from a convolution with centered weights (`CenteredConv2d`), per channel and group of
    `norm_batch` images, and g = dL/dz:

        chi² = mean(x²);  SMA(chi²), SMA(psi): means over the newest `window` groups, this one included
        z = x / sqrt(SMA(chi²) + eps);  y = gamma · r · z + beta
        r = clip(sqrt((SMA(chi²) + eps) / (EMA + eps)), 1/rmax, rmax)        a constant to the gradient
        psi = mean(g · z);  dL/dx = (g - z · SMA(psi)) / sqrt(SMA(chi²) + eps)
        EMA <- (1 - momentum) · EMA + momentum · SMA(chi²), the latter's mean over a batch's groups

    Evaluation: y = gamma · x / sqrt(EMA + eps) + beta. No mean is subtracted: the weights are centered instead. As in
    the authors' code the window slides over the groups of a batch in order, and from those of the batch before; EMA is
    the one before this step, and averages SMA(chi²) (`ema_of`; "batch": chi², as the paper's formula); a group has its
    own chi² and psi until the window is full. EMA begins as the plain mean of the first batches, which short runs need
    [A], or by `ema_start` = "first" as in the authors' ImageNet code at the first batch's value.

    Phases: a group's own chi² and psi in the steps 1 to `warmup` - 1, r = 1 in those up to `r_from`. The authors' file
    has 100 and 1000 steps, their ImageNet code 0 and 99; by fraction of the run they are an assumption [A], as short
    runs would never leave them. A last, smaller group comes first in the window of psi [A].

    Invariant: with window = 1 and r = 1 it is the exact x / sqrt(mean(x²) + eps), forward and backward.
    """

    needs_convolution = True
    layer = MovingAverageBatchNorm2d

    momentum: float = option(0.02, gt=0, le=1)
    window: int = option(16, ge=1, le=10_000)
    rmax: float = option(5.0, ge=1)
    warmup: float = option(0.05, ge=0, unit="unit")
    r_from: float = option(0.2, ge="warmup", unit="unit")
    ema_of: str = option("sma", choices=("sma", "batch"))
    ema_start: str = option("mean", choices=("mean", "first"))

    def phase(self, now: float, end: float) -> dict[str, float]:
        """Return the bounds of r, and how many groups a window needs before it is used."""
        rmax = 1.0 if now == 0 or now < self.r_from else self.rmax  # at first there is no EMA yet
        return {"r_least": 1 / rmax, "r_most": rmax, "needed": math.inf if end < self.warmup else self.window}

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        """Return a `CenteredConv2d`."""
        return CenteredConv2d.of(convolution)


@register(
    "powernorm", aliases=("power",), family="statistics of the batch", order=12,
    formula="gamma · x / sqrt(phi + eps) + beta, of x divided by its root mean square over the channels; phi and the "
    "gradient's nu are moving averages",
    source="Shen et al. 2020, 2003.07845, as its code", over="C at each position, then N, H, W of past batches",
    parameters="gamma, beta", use="where statistics of batches vary much, as its authors found in transformers of text",
    cost="as `mabn`, without window and centering",
)  # fmt: skip
class PowerNorm(_MovingVariant):
    """Power normalization (Shen et al. 2020, 2003.07845), as its authors' code has it.

    x (N, C, H, W) is first divided by its root mean square over the channels, sqrt(mean_c x² + eps), for each image and
    position (`scale_channels`; the paper has no such division). Then, per channel, with phi and nu from before this
    step, g = dL/dz, and b = mean(x²) of the batch, or phi with `backward_rms` = "running" as in the paper:

        z = x / sqrt(phi + eps);  y = gamma · z + beta;  dL/dx = (g - z · nu) / sqrt(b + eps)
        phi <- alpha · phi + (1 - alpha) · mean(x²)
        nu  <- nu · (1 - (1 - alpha') · mean(z²)) + (1 - alpha') · mean(g · z),  alpha' = alpha_backward

    Evaluation is the same by phi. In the first `warmup` steps z = x / sqrt(mean(x²) + eps), and in all but the last of
    them phi becomes the plain mean of the batches so far before it takes its step; nu starts at 0. The warm-up's length
    as a fraction of the run is an assumption [A]; the authors' code has 10,000 steps, its selector 1,000.

    Invariant: after the warm-up the output of an image does not depend on the other images of its batch.
    """

    layer = PowerNorm2d

    alpha: float = option(0.9, ge=0, lt=1)
    alpha_backward: float = option(0.9, ge=0, lt=1)
    warmup: float = option(0.25, ge=0, unit="unit")
    scale_channels: bool = option(True)
    backward_rms: str = option("batch", choices=("batch", "running"))
