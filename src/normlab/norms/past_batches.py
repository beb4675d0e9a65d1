"""Batch statistics together with those of past batches."""

from typing import Any, ClassVar

import torch
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


def _standardized(layer: BatchStatistics, centered: Tensor, beyond: Tensor, factor: Tensor) -> Tensor:
    """Return gamma · (x - m) · factor + beta from x - mu (n, G·C, H, W), and mu - m and the factor (G·C,)."""
    groups = len(factor) // len(layer.weight)
    scale = per_group(layer.weight, groups) * factor
    return torch.addcmul(broadcast(per_group(layer.bias, groups) + beyond * scale), centered, broadcast(scale))


def _push(rows: Tensor, newest: Tensor) -> None:
    """Put a row in front of `rows` (k, ...), in place; the last one goes."""
    rows.copy_(torch.cat([newest.view_as(rows[:1]), rows[:-1]]))


class MemorizedBatchNorm2d(BatchStatistics):
    """See `MemorizedBatchNorm`. `means` and `variances` (k, C) are the memory, the newest batch first.

    `running_mean` and `running_var` are m and s of the memory, made anew after each step.
    """

    averages: ClassVar[dict[str, float]] = {"running_mean": 0.0, "running_var": 1.0}
    counter = "batches"
    momentum = 1.0  # what `remember` returns takes the averages' place
    forwards_again = True

    running_mean: Tensor
    running_var: Tensor
    means: Tensor
    variances: Tensor
    ages: Tensor
    batches: Tensor
    eps: float
    memory: int
    decay: float

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.register_buffer("means", torch.zeros(self.memory, channels))
        self.register_buffer("variances", torch.ones(self.memory, channels))
        self.register_buffer("ages", torch.arange(1.0, self.memory + 1), persistent=False)

    def weights(self) -> Tensor:
        """Return the weight of each row of the memory (k,), 0 for those without a batch; the batch at hand has 1."""
        return torch.where(self.ages <= self.batches, self.decay**self.ages, 0.0)

    def normalize(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `BatchStatistics.normalize`."""
        x = full_precision(input)
        mu = self.batch_mean(x)
        centered = x - broadcast(mu)
        v = self.batch_mean(centered.square())
        total = self.weights().sum()
        q, r, s = keep_for_backward(
            total / (1 + total), per_group(self.running_mean, groups), per_group(self.running_var, groups)
        )
        beyond = q * (mu - r)  # mu - m
        variance = (1 - q) * (v + (mu - r) * beyond) + q * s
        y = _standardized(self, centered, beyond, torch.rsqrt(variance + self.eps))
        return y.to(input.dtype), (mu.detach(), v.detach())

    def remember(self, *statistics: Tensor) -> tuple[Tensor, ...]:
        """Put a batch's mean and variance into the memory, and return those of the whole memory."""
        for rows, newest in zip((self.means, self.variances), statistics, strict=True):
            _push(rows, newest)
        shares = self.weights()[:, None]
        shares = shares / shares.sum()  # no matrix product, which autocast would take to half precision
        mean = (shares * self.means).sum(0)
        return mean, (shares * (self.variances + (self.means - mean).square())).sum(0)

    def newest(self, count: Tensor) -> float | Tensor:
        """See `BatchStatistics.newest`."""
        return 1.0

    def evaluate(self, input: Tensor) -> Tensor:
        """See `BatchStatistics.evaluate`."""
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def start_averages(self, mean: Tensor, var: Tensor, batches: int) -> None:
        """Begin with a memory full of the statistics of a BatchNorm that was trained."""
        super().start_averages(mean, var, max(batches, self.memory))
        self.means.copy_(self.running_mean.expand_as(self.means))
        self.variances.copy_(self.running_var.expand_as(self.variances))


@register(
    "mbn_style", aliases=("mbn", "memorizedbn", "memorizedbatchnorm", "memorizedbatchnormalization"),
    family="statistics of the batch", order=40,
    formula="gamma · (x - m) / sqrt(s + eps) + beta, m and s of the batch and the 5 newest past "
    "ones, weights 0.9^age, by the law of total variance; a batch is stored as it is after its update, by a second "
    "forward pass; evaluation by the stored ones [A]",
    source="after Guo et al. 2018, 2010.04947, which has no code; what is known of it: [papers.md](papers.md)",
    over="N, H, W of the batch and of past ones, constants to the gradient", parameters="gamma, beta",
    use="small batches; a result is one of this reconstruction, not of the paper's method",
    cost="as `lp2`, and a second forward pass", reconstruction=True,
)  # fmt: skip
class MemorizedBatchNorm(Variant):
    """A reconstruction of memorized batch normalization (Guo et al. 2018, 2010.04947), which has no public code.

    Known are: the statistics of the k newest batches are combined with those of the batch at hand; after the update the
    same batch is forwarded once more, and *those* statistics are stored; training and evaluation have one rule. All
    else is ours [A]. For x (N, C, H, W), per channel, with mean mu and biased variance v of the batch, and mu_i, v_i of
    the batch i steps ago, of weights w_i = `decay`^i for i = 1 ... k = `memory`, as far as there are so many:

        W = sum w_i,   r = sum w_i mu_i / W,   s = sum w_i (v_i + (mu_i - r)²) / W        the memory, a constant
        q = W / (1 + W),   m = (1 - q) mu + q r
        y = gamma · (x - m) / sqrt((1 - q) (v + (mu - m)²) + q (s + (r - m)²) + eps) + beta
        evaluation: y = gamma · (x - r) / sqrt(s + eps) + beta

    which is the mean and the law of total variance. So evaluation depends on no other image; with eval_stats=batch the
    batch takes part as in training. Groups are combined with the memory each, which takes their mean. The second
    forward pass is in training mode and normalizes by the memory from before it; dropout draws anew.
    Invariant: with an empty memory its training is that of `BatchNorm`, forward and backward.
    """

    takes: tuple[str, ...] = ("scales", "shifts", "running statistics")

    eps: float = option(1e-5, gt=0)
    memory: int = option(5, ge=1)
    decay: float = option(0.9, gt=0, le=1)

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return a `MemorizedBatchNorm2d`."""
        return copy_affine(norm, MemorizedBatchNorm2d(norm.num_features, **self.options))


class CrossIterationBatchNorm2d(BatchStatistics):
    """See `CrossIterationBatchNorm`. Rows are of past steps, the newest first; a filter has n weights.

    `means` and `variances` are (k, C), `mean_slopes`, `variance_slopes` (their derivatives) and `filters` (k, C, n).
    """

    counter = "batches"

    running_mean: Tensor
    running_var: Tensor
    means: Tensor
    variances: Tensor
    mean_slopes: Tensor
    variance_slopes: Tensor
    filters: Tensor
    seen: Tensor
    row: Tensor
    eps: float
    memory: int
    burn_in: int
    before: tuple[nn.Conv2d]  # a tuple, so that the convolution is no part of this layer

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        weights = self.before[0].weight[0].numel()
        for name in ("means", "variances"):
            self.register_buffer(name, torch.zeros(self.memory, channels))
        for name in ("mean_slopes", "variance_slopes", "filters"):
            self.register_buffer(name, torch.zeros(self.memory, channels, weights))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("row", torch.arange(self.memory)[:, None], persistent=False)

    def normalize(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `BatchStatistics.normalize`; also the biased variance. Mean and that one with gradient, for `to_note`."""
        x = full_precision(input)
        mu = self.batch_mean(x)
        centered = x - broadcast(mu)
        v = variance = self.batch_mean(centered.square())
        beyond = torch.zeros_like(mu)  # mu - m
        if self.training:
            kept, means, variances = (each.repeat(1, groups) for each in self._compensated())
            entries = 1 + kept.sum(0)
            apart = mu - means
            beyond = (kept * apart).sum(0) / entries
            spread = (kept * (variances + (beyond - apart).square())).sum(0)
            variance = (v + beyond.square() + spread) / entries
        factor = (variance.clamp_min(1e-30).sqrt() + self.eps).reciprocal()  # of a root of 0 the gradient is no number
        count = self.batch_count(input)
        y = _standardized(self, centered, beyond, factor)
        return y.to(input.dtype), (mu, v.detach() * count / (count - 1), v)

    @torch.no_grad()
    def _compensated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return which past steps count (1 or 0), their means and their variances at today's filters, each (k, C)."""
        moved = full_precision(self.before[0].weight).flatten(1) - self.filters
        shift = (self.mean_slopes * moved).sum(-1)
        variances = self.variances + (self.variance_slopes * moved).sum(-1) - shift.square()
        valid = (self.row < self.seen - self.burn_in) & (variances >= 0)
        kept, means, variances = keep_for_backward(
            valid.to(shift.dtype), torch.where(valid, self.means + shift, 0.0), torch.where(valid, variances, 0.0)
        )
        return kept, means, variances

    def to_note(self, *statistics: Tensor) -> tuple[Tensor, ...]:
        """Return mean, unbiased and biased variance, the derivatives of the first and the last, and the filters."""
        mean, unbiased, variance = statistics
        weight = self.before[0].weight
        slopes = [torch.zeros_like(weight)] * 2
        if torch.is_grad_enabled() and weight.requires_grad and mean.requires_grad:
            slopes = [torch.autograd.grad(each.sum(), weight, retain_graph=True)[0] for each in (mean, variance)]
        flat = [full_precision(each.detach()).flatten() for each in (*slopes, weight)]
        if self.synchronized and processes() > 1:  # each process has the derivative through its own images
            flat = [mean_over_processes(each, 1.0) for each in flat]
        return mean.detach(), unbiased, variance.detach(), *(each.clone() for each in flat)

    def remember(self, *statistics: Tensor) -> tuple[Tensor, ...]:
        """Put what was noted into the memory, and return mean and unbiased variance."""
        mean, unbiased, *others = statistics
        memory = (self.variances, self.mean_slopes, self.variance_slopes, self.filters)
        for rows, newest in zip((self.means, *memory), (mean, *others), strict=True):
            _push(rows, newest)
        self.seen.add_(1)
        return mean, unbiased

    def evaluate(self, input: Tensor) -> Tensor:
        """See `BatchStatistics.evaluate`."""
        square = (self.running_var.sqrt() + self.eps).square()
        return F.batch_norm(input, self.running_mean, square, self.weight, self.bias, False, 0.0, 0.0)


@register(
    "cbn", aliases=("crossiterationbn", "crossiterationbatchnorm", "crossiterationbatchnormalization"),
    family="statistics of the batch", order=41,
    formula="gamma · (x - m) / (sqrt(q - m²) + eps) + beta; m and q are means of the batch's mean and mean square and "
    "of those of 3 steps before, moved to today's filters by their derivatives, without those that give a negative "
    "variance; `bn`'s statistics in the first 8 steps; a convolution's filters are kept three times for each step",
    source="Yao et al. 2020, 2002.05712, as its code",
    over="N, H, W of the batch and of past ones, constants to the gradient", parameters="gamma, beta", conv="yes",
    use="small batches or groups: 4 steps share their statistics",
    cost="two gradients by the filters, passes over the kept ones",
)  # fmt: skip
class CrossIterationBatchNorm(Variant):
    """Cross-iteration batch normalization (Yao et al. 2020, 2002.05712), as the authors' code.

    For x (N, C, H, W) from a convolution with filters W, per channel, with mean mu and biased variance v of the batch,
    and of the k = `memory` steps before: mean mu_i, mean square q_i, their derivatives by the channel's own filter, and
    the filter W_i then:

        mu_i' = mu_i + <dmu_i/dW, W - W_i>,   q_i' = q_i + <dq_i/dW, W - W_i>       constants in backpropagation
        m, q: means of mu, mu_i' and of v + mu², q_i', without the steps of q_i' < mu_i'²
        y = gamma · (x - m) / (sqrt(q - m²) + eps) + beta
        evaluation: y = gamma · (x - running mean) / (sqrt(running variance) + eps) + beta

    In the first `burn_in` steps, which are not kept, and with eval_stats=batch, it is the batch's statistics alone. The
    averages are of mu and the unbiased variance of each batch, at first their plain mean [A]. Computed are variances
    v_i' = q_i' - mu_i'², which is the same. Of groups each is averaged with the past, which has their means [A].
    Invariant: with filters that do not change, m is the mean of the newest k + 1 batches' means.
    """

    needs_convolution = True
    takes: tuple[str, ...] = ("scales", "shifts", "running statistics")
    refused: ClassVar[dict[str, dict[str, str]]] = {
        "precision": {"fp16": "the derivatives of its statistics do not fit into 16 bits; use bf16"},
        "engine": {"compile": "its forward pass takes derivatives, which torch.compile cannot follow"},
    }

    eps: float = option(1e-5, gt=0)
    momentum: float = option(0.1, gt=0, le=1)
    memory: int = option(3, ge=1)
    burn_in: int = option(8, ge=0)

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        """Return the convolution, which the norm after it will look at."""
        self._before = convolution
        return convolution

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return a `CrossIterationBatchNorm2d`."""
        layer = CrossIterationBatchNorm2d(norm.num_features, before=(self._before,), **self.options)
        return copy_affine(norm, layer)
