"""Batch normalization: PyTorch's kernel, for the whole batch or for groups inside it."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.common.registry import option, register
from normlab.norms.adapter import FullPrecision
from normlab.norms.layer_statistics import BatchStatistics, broadcast, full_precision, per_group
from normlab.norms.sites import NO_GAMMA, Variant, copy_affine


class GroupedBatchNorm2d(BatchStatistics, nn.BatchNorm2d):  # type: ignore[misc]  # its momentum is never None
    """BatchNorm2d, over groups of `norm_batch` images if that is given (see `BatchStatistics`).

    Per group and channel, with mean mu and biased variance v:

        y = gamma · (x - mu) / sqrt(v + eps) + beta

    The moving averages take the mean over groups of each group's mean and unbiased variance, weighted by its
    images (Ioffe 2017, section 4.2, normalizes groups of 4 inside batches of 32 in this way).

    Invariant: with k >= N it is nn.BatchNorm2d, and runs by its kernel.
    """

    counter = "num_batches_tracked"
    lr_divisors: dict[str, float]

    def __init__(self, channels: int, *, norm_batch: int | None = None, **options: Any) -> None:
        nn.BatchNorm2d.__init__(self, channels, **options)
        self.norm_batch = norm_batch
        self.lr_divisors = {}

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W), by PyTorch's kernel where that can do it."""
        whole = self.norm_batch is None or self.norm_batch >= len(input)
        # What PyTorch's kernel cannot do.
        others = self.synchronized or self.averages_over_processes or self.evaluates_on_batch
        if (whole and not others) or not (self.training or self.evaluates_on_batch):
            return self.evaluate(input)
        return super().forward(input)

    def normalize(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `BatchStatistics.normalize`."""
        gamma = None if self.weight is None else per_group(self.weight, groups)
        beta = None if self.bias is None else per_group(self.bias, groups)
        if self.synchronized:
            return self._normalize_together(input, gamma, beta)
        mean, var = torch.zeros(2, input.shape[1], device=input.device, dtype=full_precision(input[:0]).dtype)
        return F.batch_norm(input, mean, var, gamma, beta, True, 1.0, self.eps), (mean, var)

    def _normalize_together(
        self, input: Tensor, gamma: Tensor | None, beta: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The formula, with means over all processes."""
        x = full_precision(input)
        mu = self.batch_mean(x)
        centered = x - broadcast(mu)
        v = self.batch_mean(centered.square())
        y = centered * broadcast(torch.rsqrt(v + self.eps))
        if gamma is not None and beta is not None:
            y = y * broadcast(gamma) + broadcast(beta)
        count = self.batch_count(input)
        return y.to(input.dtype), (mu.detach(), v.detach() * count / (count - 1))

    def evaluate(self, input: Tensor) -> Tensor:
        """Run PyTorch's kernel, which in training takes the batch into the averages."""
        self._check_input_dim(input)
        if self.training:
            self.note()  # counts the batch
        averages = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(input, *averages, self.weight, self.bias, self.training, self.momentum, self.eps)

    def newest(self, count: Tensor) -> float | Tensor:
        """See `BatchStatistics.newest`: PyTorch's averages do not begin as plain means."""
        return self.momentum

    def start_averages(self, mean: Tensor, var: Tensor, batches: int) -> None:
        """See `BatchStatistics.start_averages`; here they are the same."""
        for name, value in (("running_mean", mean), ("running_var", var)):
            self.get_buffer(name).copy_(value)
        self.get_buffer("num_batches_tracked").fill_(batches)


@register(
    "bn", aliases=("batch", "batchnorm", "batchnorm2d", "batchnormalization", "syncbatchnorm", "syncbn"),
    family="BN and its parts", order=0,
    formula="gamma · (x - mu) / sqrt(v + eps) + beta", source="Ioffe & Szegedy 2015", over="N, H, W",
    parameters="gamma, beta", use="the reference; of fewer than 16 images its statistics cost accuracy (Wu & He 2018)",
    cost="PyTorch's kernel",
)  # fmt: skip
@register(
    "bn_scaled", family="BN and its parts", order=4, defaults={"scale_init": 0.1, "scale_lr_divisor": 100.0},
    formula="as `bn`; gamma starts at 0.1 and learns at lr / 100 (`norm.scale_init`, `norm.scale_lr_divisor`, of `bn` "
    "as well)",
    source="Davis & Frank 2021", over="N, H, W", parameters="gamma, beta",
    use="in place of `bn`: its authors report more accuracy at no cost", cost="as `bn`",
)  # fmt: skip
class BatchNorm(Variant):
    """Batch normalization (Ioffe & Szegedy 2015), by PyTorch's own layer.

    For x of shape (N, C, H, W), per channel over m = N·H·W values, with mean mu and biased variance v:

        y = gamma · (x - mu) / sqrt(v + eps) + beta

    Evaluation uses moving averages of mu and of the unbiased variance, as PyTorch does. gamma starts at
    `scale_init` times the network's own start and learns at lr / `scale_lr_divisor` (Davis & Frank 2021: 0.1, 100).
    Invariant: at gamma = 1 and beta = 0 it equals `BatchNormMinus`, forward and backward.
    """

    affine = True
    takes: tuple[str, ...] = ("scales", "shifts", "running statistics")

    eps: float = option(1e-5, gt=0)
    momentum: float = option(0.1, gt=0, le=1)
    scale_init: float = option(1.0)
    scale_lr_divisor: float = option(1.0, gt=0)

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return a `GroupedBatchNorm2d`."""
        layer = GroupedBatchNorm2d(
            norm.num_features, norm_batch=self.norm_batch, eps=self.eps, momentum=self.momentum, affine=self.affine
        )
        if self.affine and norm.affine:  # the network's own start, e.g. zero in the last layer of a branch
            start = {"weight": norm.weight * self.scale_init, "bias": norm.bias}
            layer.to(norm.weight.device, norm.weight.dtype).load_state_dict(start, strict=False)
            layer.lr_divisors = {"weight": self.scale_lr_divisor}
        return layer


class FrozenBatchNorm2d(FullPrecision):
    """See `FrozenBatchNorm`. weight and bias, and the buffers running_mean and running_var, are (C,)."""

    takes_any_shape = True

    def __init__(self, channels: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, ...) by the fixed statistics."""
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        """Return channels and eps for `repr`."""
        return f"{self.weight.numel()}, eps={self.eps}"


@register(
    "bn_frozen", aliases=("frozenbn", "frozenbatchnorm", "frozenbatchnorm2d"), family="BN and its parts", order=27,
    formula="gamma · (x - m) / sqrt(s + eps) + beta by the fixed running statistics m, s of `model.weights`; gamma "
    "and beta fixed, too (`norm.train_affine`)",
    source="torchvision's FrozenBatchNorm2d", over="nothing", parameters="none",
    use="fine-tuning from trained weights with batches too small for statistics of their own", cost="one multiply-add",
)  # fmt: skip
class FrozenBatchNorm(Variant):
    """Batch normalization by fixed statistics, as fine-tuning from trained weights has it.

    With the running mean m and variance s of the norm that it replaces, in training and in evaluation:

        y = gamma · (x - m) / sqrt(s + eps) + beta

    gamma and beta are fixed, too, unless `train_affine`; what is fixed is not decayed. A network that was not trained
    has m = 0 and s = 1. Nothing depends on the batch, so `norm_batch` and `eval_stats` change nothing.
    Invariant: its output is that of batch normalization in evaluation.
    """

    takes = ("scales", "shifts", "running statistics")
    refused: ClassVar[dict[str, dict[str, str]]] = {
        "init": dict.fromkeys(("zero_gamma", "uniform_gamma"), "its scales are those of trained weights")
    }

    eps: float = option(1e-5, gt=0)
    train_affine: bool = option(False)

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return a `FrozenBatchNorm2d`."""
        layer = copy_affine(norm, FrozenBatchNorm2d(norm.num_features, eps=self.eps))
        layer.load_state_dict(norm.state_dict(), strict=False)  # which has no statistics without track_running_stats
        return layer if self.train_affine else layer.requires_grad_(False)


@register(
    "bnminus", aliases=("batchnormminus",), family="BN and its parts", order=2,
    formula="(x - mu) / sqrt(v + eps)", source="Peerthum & Stamp 2023", over="N, H, W", parameters="none",
    use="to see what gamma and beta buy", cost="as `bn`",
)  # fmt: skip
class BatchNormMinus(BatchNorm):
    """Batch normalization without its shift and scale (Peerthum & Stamp 2023, "BatchNorm-minus").

        y = (x - mu) / sqrt(v + eps)

    Invariant: every channel of the output has mean 0 and variance v / (v + eps) over the batch.
    """

    affine = False
    takes = ("running statistics",)
    scale_init = 1.0  # no option here, nor is the next
    scale_lr_divisor = 1.0
    refused: ClassVar[dict[str, dict[str, str]]] = NO_GAMMA
