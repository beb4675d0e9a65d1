"""Task-balanced batch normalization, for batches of images of the current task and of a memory of earlier ones."""

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.common.registry import register
from normlab.norms.adapter import FullPrecision
from normlab.norms.batch import BatchNorm, GroupedBatchNorm2d
from normlab.norms.layer_statistics import BatchStatistics, full_precision
from normlab.norms.sites import copy_affine


def number_of_splits(task: int, current: int, memory: int) -> int:
    """Return r: the largest common divisor of both parts of a batch that is at most current / memory · task, or 1.

    So each of the `task` earlier tasks has about as many images in a split as the current one (Cha et al. 2023, as
    their code).

    Args:
        task: number of the current task, from 0.
        current: images of it in a batch.
        memory: images of earlier tasks in a batch.
    """
    both = math.gcd(current, memory)
    return max((r for r in range(1, both + 1) if both % r == 0 and r * memory <= current * task), default=1)


class TaskSplits(FullPrecision):
    """Which images of a batch share statistics; all layers of a variant share one.

    Attributes:
        images: of a batch.
        members: whether each image is in each split, 0.0 or 1.0, (splits, images). A tensor of one size for all tasks,
            changed in place, so that a captured step stays valid; splits beyond the task's r are empty.
    """

    members: Tensor
    of_tasks: Tensor

    def __init__(self, tasks: int, current: int, memory: int) -> None:
        super().__init__()
        self.tasks, self.images = tasks, current + memory
        splits = [number_of_splits(task, current, memory) for task in range(tasks)]
        of_tasks = torch.zeros(tasks, max(splits), self.images)
        for members, r in zip(of_tasks, splits, strict=True):
            members[torch.arange(current) % r, torch.arange(current)] = 1.0
            members[:r, current:] = 1.0
        self.register_buffer("of_tasks", of_tasks, persistent=False)
        self.register_buffer("members", of_tasks[0].clone(), persistent=False)

    def at_step(self, step: int, steps: int) -> None:
        """Set the splits to those of the task of `step` (0-based) of `steps`, which the tasks share equally."""
        self.members.copy_(self.of_tasks[step * self.tasks // steps])


class TaskBalancedBatchNorm2d(GroupedBatchNorm2d):
    """See `TaskBalancedBatchNorm`. In training, batches of another size than the splits' are normalized as a whole."""

    splits: TaskSplits

    def __init__(self, channels: int, *, splits: TaskSplits, **options: Any) -> None:
        super().__init__(channels, **options)
        self.splits = splits

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W)."""
        return BatchStatistics.forward(self, input) if self._is_split(input) else super().forward(input)

    def _is_split(self, input: Tensor) -> bool:
        return self.training and len(input) == self.splits.images

    def normalize(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `BatchStatistics.normalize`.

        The mean over an image's copies, each normalized by its split, is the image times one scale plus one shift: no
        copy is made.
        """
        if not self._is_split(input):
            return super().normalize(input, groups)
        x, members = full_precision(input), self.splits.members[:, :, None]  # (splits, N, 1)
        v_image, mu_image = torch.var_mean(x, (2, 3), correction=0)  # (N, C)
        images = members.sum(1)  # of each split, (splits, 1)
        weight = members / images.clamp_min(1)[:, None]
        mu = (weight * mu_image).sum(1)  # (splits, C)
        v = (weight * (v_image + (mu_image - mu[:, None]).square())).sum(1)
        inverse, copies = torch.rsqrt(v + self.eps), members / members.sum(0)
        scale = self.weight * (copies * inverse[:, None]).sum(0)  # (N, C)
        shift = self.bias - self.weight * (copies * (mu * inverse)[:, None]).sum(0)
        y = torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])
        with torch.no_grad():
            count, used = images * x[0, 0].numel(), images.clamp_max(1)
            used = used / used.sum()
            unbiased = v * (count / (count - 1).clamp_min(1))
        return y.to(input.dtype), ((used * mu.detach()).sum(0), (used * unbiased.detach()).sum(0))


@register(
    "tbbn", aliases=("taskbalancedbn", "taskbalancedbatchnorm"), family="statistics of the batch", order=34,
    needs="sampler=class_incremental",
    formula="per split: gamma · (x - mu) / sqrt(v + eps) + beta; of the images of the current task n is in split n "
    "mod r, a copy of each image of the memory in every split, whose mean it becomes; r the largest common divisor of "
    "both parts up to current / memory · task, 1 in the first; for `sampler=class_incremental` alone",
    source="Cha et al. 2023, 2201.12559, as its code", over="N, H, W of a split", parameters="gamma, beta",
    use="class-incremental learning with a memory, and nothing else",
    cost="moments of each image and one multiply-add, in passes of their own",
)  # fmt: skip
class TaskBalancedBatchNorm(BatchNorm):
    """Task-balanced batch normalization (Cha et al. 2023, 2201.12559, as their code), for sampler=class_incremental.

    A batch has Bc images of the current task, then Bp of the memory of earlier tasks. Current image n is in split
    n mod r, and a copy of each memory image is in every split; r is `number_of_splits`, 1 in the first task. Per split
    and channel, over m = (Bc / r + Bp) · H · W values with mean mu and biased variance v:

        y = gamma · (x - mu) / sqrt(v + eps) + beta             a memory image's is the mean over its r copies

    The moving averages take the mean over splits of mu and of the unbiased variance; evaluation is that of `BatchNorm`.
    Invariant: with r = 1 it is `BatchNorm`, forward and backward.
    """

    scale_init = 1.0  # no option here, nor is the next
    scale_lr_divisor = 1.0

    @cached_property
    def splits(self) -> TaskSplits:
        """The splits that all layers share.

        Raises:
            UserError: if `replay` is not known.
        """
        if self.replay is None:
            raise UserError(
                "tbbn balances the tasks of a batch, and nothing says which images are of which.\n"
                "Use sampler=class_incremental; in Python set the variant's `replay`, e.g. to (10, 48, 16): tasks,"
                " images of the current task and of the memory in a batch."
            )
        return TaskSplits(*self.replay)

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return a `TaskBalancedBatchNorm2d`."""
        layer = TaskBalancedBatchNorm2d(norm.num_features, splits=self.splits, eps=self.eps, momentum=self.momentum)
        return copy_affine(norm, layer)
