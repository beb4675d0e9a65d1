"""Online normalization: statistics that move from image to image, in the forward and in the backward pass."""

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
    per_group,
    processes,
)
from normlab.norms.moving_average import APPROXIMATE_BACKWARD
from normlab.norms.norm_activation import spatial_moments
from normlab.norms.sites import Variant, copy_affine


def powers(alpha: float, count: int, device: torch.device) -> Tensor:
    """Return alpha^(i - j) for i >= j, else 0, float64 (count + 1, count + 1)."""
    steps = torch.arange(count + 1, device=device, dtype=torch.float64)
    return (alpha ** (steps[:, None] - steps)).tril()


def average(weights: Tensor, added: Tensor, start: Tensor) -> Tensor:
    """Return h (n + 1, C), h[0] = start (C,) and h[i + 1] = alpha · h[i] + added[i], by the `powers` of alpha.

    In float64, in which neither TF32 nor autocast round the product.
    """
    return (weights @ torch.cat([start[None], added]).double()).to(added.dtype)


def recurrence(factor: Tensor, added: Tensor, start: Tensor) -> Tensor:
    """Return h (n + 1, C), h[0] = start (C,) and h[i + 1] = factor[i] · h[i] + added[i], factor and added (n, C).

    A round adds to each h[i] what `distance` steps before have come to, and doubles the distance: log2(n + 1) rounds
    for n steps, all of them additions and products, and so exact but for rounding, whatever the factors.
    """
    h, distance = torch.cat([start[None], added]), 1
    factor = torch.cat([factor[:1], factor])  # its first row is not used, as nothing is before the start
    while distance < len(h):
        later = torch.addcmul(h[distance:], factor[distance:], h[:-distance])
        factor = torch.cat([factor[:distance], factor[distance:] * factor[:-distance]])
        h = torch.cat([h[:distance], later])
        distance *= 2
    return h


def _maps(per_image: Tensor) -> Tensor:
    return per_image[:, :, None, None]


class _Normalize(torch.autograd.Function):
    """y = (x - m) · scale for x (k, G·C, H, W), with the backward pass of `OnlineNorm`.

    m and scale, and the means over H and W of y and y², are (k, G·C); v and u, from before the first image, (G·C,).
    The backward pass adds the changes of v and u, summed over images and groups, to `noted` (2·C + 1,), if there is
    one, and the images to its last entry.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, noted: Tensor | None, alpha: float, m: Tensor, scale: Tensor, *others: Tensor
    ) -> Tensor:
        y = (x - _maps(m)) * _maps(scale)
        ctx.save_for_backward(y, scale, *others)
        ctx.noted, ctx.alpha = noted, alpha
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, scale, mean_y, mean_y2, v, u = ctx.saved_tensors
        rest = 1 - ctx.alpha
        vs = recurrence(1 - rest * mean_y2, (g * y).mean((2, 3)), v)
        of_y = rest * vs[:-1]
        us = average(powers(ctx.alpha, len(y), y.device), (g.mean((2, 3)) - of_y * mean_y) * scale, u)
        dx = torch.addcmul(_maps(-rest * us[:-1]), g, _maps(scale))
        dx.addcmul_(y, _maps(of_y * scale), value=-1)
        if ctx.noted is not None:
            channels = len(ctx.noted) // 2
            changes = torch.stack([vs[-1] - v, us[-1] - u]).view(2, -1, channels)
            images = changes.new_full((1,), changes.shape[1])
            ctx.noted.add_(torch.cat([changes.sum(1).flatten(), images]), alpha=len(y))
        return dx, *[None] * 8


class OnlineNorm2d(BatchStatistics):
    """See `OnlineNorm`. `control` (2, C) has v and u, `noted` their changes in a step (see `_Normalize`).

    v and u move in `after_step`, so that the backward passes of groups count as one; without a loop that calls it they
    stay at 0.
    """

    takes_single_values = True  # they are normalized by statistics of the images before

    running_mean: Tensor
    running_var: Tensor
    control: Tensor
    noted: Tensor
    momentum = 1.0  # of a batch the averages take what its last image has left
    eps: float
    alpha_forward: float
    alpha_backward: float
    guard: str
    clamp: float

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.register_buffer("control", torch.zeros(2, channels))
        self.register_buffer("noted", torch.zeros(2 * channels + 1))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W), image after image."""
        y = super().forward(full_precision(input))
        if self.guard == "layer_scaling":
            y = y * torch.rsqrt(y.square().mean((1, 2, 3), keepdim=True) + self.eps)
        elif self.guard == "clamp":
            y = y.clamp(-self.clamp, self.clamp)
        return y.to(input.dtype)

    def normalize(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `BatchStatistics.normalize`."""
        alpha = self.alpha_forward
        with torch.no_grad():
            mu, var = (moment[:, :, 0, 0] for moment in spatial_moments(input))
            weights = powers(alpha, len(mu), mu.device)
            m = average(weights, (1 - alpha) * mu, per_group(self.running_mean, groups))
            shift = mu - m[:-1]
            added = (1 - alpha) * (var + alpha * shift.square())
            s2 = average(weights, added, per_group(self.running_var, groups))
            scale = torch.rsqrt(s2[:-1] + self.eps)
            means = shift * scale, (var + shift.square()) * scale.square()
            kept = keep_for_backward(m[:-1], scale, *means, *(per_group(one, groups) for one in self.control))
        y = _Normalize.apply(input, self.noted if self.training else None, self.alpha_backward, *kept)
        gamma, beta = broadcast(per_group(self.weight, groups)), broadcast(per_group(self.bias, groups))
        return torch.addcmul(beta, y, gamma), (m[-1], s2[-1])

    def evaluate(self, input: Tensor) -> Tensor:
        """See `BatchStatistics.evaluate`."""
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move v and u by what backward passes have noted: the mean over groups, weighted by images."""
        if self.averages_over_processes and processes() > 1:
            dist.all_reduce(self.noted)
        images = self.noted[-1].clamp_min(1)  # none without a backward pass
        self.control.add_((self.noted[:-1] / images).view_as(self.control))
        self.noted.zero_()


@register(
    "online", aliases=("onlinenorm", "onlinenormalization"), family="statistics of the batch", order=30,
    formula="gamma · (x - m) / sqrt(s² + eps) + beta by moving averages m, s² of the images before this one; the "
    "gradient is kept orthogonal to y and 1 by averages v, u; then divided by the image's root mean square "
    "(`norm.guard`)",
    source="Chiley et al. 2019, 1905.05894, as its code", over="H, W of the images before it, one after the other",
    parameters="gamma, beta", use="batches down to a single image",
    cost="log2(images) rounds of small operations per average",
)  # fmt: skip
class OnlineNorm(Variant):
    """Online normalization (Chiley et al. 2019, 1905.05894), which works at batch 1.

    The images of x (N, C, H, W) come one after the other. With mean mu and biased variance var of an image's channel
    over H and W, m and s² from before this image, a = alpha_forward, and then b = alpha_backward and g = dL/dy:

        y = (x - m) / sqrt(s² + eps)
        s² <- a · s² + (1 - a) · var + a (1 - a) · (mu - m)²,   m <- a · m + (1 - a) · mu
        g' = g - (1 - b) · v · y,                               v <- v + mean(g' · y)
        dL/dx = g' / sqrt(s² + eps) - (1 - b) · u,              u <- u + mean(dL/dx)

    m, v and u start at 0, s² at 1. The backward pass is not the derivative of the forward pass: v and u keep dL/dx
    orthogonal to y and to 1 in the long run. Then z = gamma · y + beta, and a guard against statistics that lag
    behind, as in the authors' code: "layer_scaling" divides z by sqrt(mean z² + eps) over an image's C, H and W,
    "clamp" bounds it by ±`clamp`. Evaluation is the same by m and s² as they are.

    With `norm_batch` each group starts at the same m, s², v and u, which then become the mean of what the groups have
    come to, weighted by images [A]; so it is for processes.
    Invariant: an image's output depends on images before it in its group, and on no image after it.
    """

    takes = ("scales", "shifts", "running statistics")
    refused: ClassVar[dict[str, dict[str, str]]] = APPROXIMATE_BACKWARD | {
        "sync_stats": {"true": "images of several processes have no order; use norm_batch, groups of each process"}
    }

    eps: float = option(1e-5, gt=0)
    alpha_forward: float = option(0.999, ge=0, lt=1)
    alpha_backward: float = option(0.99, ge=0, lt=1)
    guard: str = option("layer_scaling", choices=("layer_scaling", "clamp", "none"))
    clamp: float = option(5.0, gt=0)

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return an `OnlineNorm2d`."""
        return copy_affine(norm, OnlineNorm2d(norm.num_features, **self.options))
