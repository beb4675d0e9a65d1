"""Normalisers that use the statistics of the batch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.norms.sites import Variant


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose statistics come from groups of `norm_batch` images inside the batch.

    For x of shape (N, C, H, W), with N = G·k + r and k = `norm_batch`: image n < G·k belongs to group
    n mod G, so that the groups are a view of x and one kernel normalises them all; the last r images
    are a smaller group of their own. Per group and channel, mu and v are mean and biased variance:

        y = gamma · (x - mu) / sqrt(v + eps) + beta

    The moving averages take the mean over groups of each group's update, weighted by its images (Ioffe
    2017, section 4.2, normalises groups of 4 inside batches of 32 in this way).

    Invariant: with k >= N it is nn.BatchNorm2d.
    """

    def __init__(self, *args: Any, norm_batch: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm_batch = norm_batch

    def forward(self, input: Tensor) -> Tensor:
        images, channels, height, width = input.shape
        groups, rest = divmod(images, self.norm_batch)
        if not self.training or groups == 0 or (groups == 1 and rest == 0):
            return super().forward(input)
        whole = groups * self.norm_batch
        viewed = input[:whole].reshape(self.norm_batch, groups * channels, height, width)
        output, mean, var = self._normalise(viewed, groups)
        output = output.reshape(whole, channels, height, width)
        if rest:
            last, last_mean, last_var = self._normalise(input[whole:], 1)
            output = torch.cat([output, last])
            mean = torch.lerp(mean, last_mean, rest / images)
            var = torch.lerp(var, last_var, rest / images)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        self.num_batches_tracked.add_(1)
        return output

    def _normalise(self, input: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise (k, G·C, H, W); returns it with the moving averages' next values, mean over groups."""

        def repeated(per_channel: Tensor | None) -> Tensor | None:
            return None if per_channel is None else per_channel.repeat(groups)

        mean, var = repeated(self.running_mean), repeated(self.running_var)
        assert mean is not None
        assert var is not None
        assert self.momentum is not None
        output = F.batch_norm(
            input, mean, var, repeated(self.weight), repeated(self.bias), True, self.momentum, self.eps
        )
        return output, mean.view(groups, -1).mean(0), var.view(groups, -1).mean(0)


class BatchNorm(Variant):
    """Batch normalisation (Ioffe & Szegedy 2015), by PyTorch's own layer.

    For x of shape (N, C, H, W), per channel over m = N·H·W values, with mean mu and biased variance v:

        y = gamma · (x - mu) / sqrt(v + eps) + beta

    Evaluation uses moving averages of mu and of the unbiased variance, as PyTorch does.
    Invariant: at gamma = 1 and beta = 0 it equals `BatchNormMinus`, forward and backward.
    """

    affine = True

    def __init__(self, *, eps: float, momentum: float, norm_batch: int | None = None) -> None:
        super().__init__(norm_batch=norm_batch)
        self.eps = eps
        self.momentum = momentum

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        options: dict[str, Any] = {"eps": self.eps, "momentum": self.momentum, "affine": self.affine}
        if self.norm_batch is None:
            layer = nn.BatchNorm2d(norm.num_features, **options)
        else:
            layer = GroupedBatchNorm2d(norm.num_features, norm_batch=self.norm_batch, **options)
        if self.affine and norm.affine:  # the network's own start, e.g. zero in the last layer of a branch
            layer.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=False)
        return layer


class BatchNormMinus(BatchNorm):
    """Batch normalisation without its shift and scale (Peerthum & Stamp 2023, "BatchNorm-minus").

        y = (x - mu) / sqrt(v + eps)

    Invariant: every channel of the output has mean 0 and variance v / (v + eps) over the batch.
    """

    affine = False
