"""Classes that come task after task, with a memory of images of earlier tasks: sampler=class_incremental."""

import math

import torch
from torch import Tensor

from normlab.common.errors import UserError
from normlab.common.rng import stream
from normlab.config.schema import ClassIncremental
from normlab.data.splits import shuffled_by_class


class TaskSequence:
    """The tasks of a run, and the images of each of its epochs; positions are those of its training images.

    The classes are put into the tasks in an order that the seed draws [A], the same for every arm. Once a task is over,
    the memory has floor(memory / classes seen) images of each class seen (FACIL, whose framework Cha et al. 2023 use,
    rounds up), those of lowest rank: a class that shrinks keeps its first ones (Rebuffi et al. 2017). Ranks are random,
    or `herded` at the end of a class's task.

    Args:
        labels: of the training images; int64 (N,).
        classes: the number of classes, which the tasks divide.
        epochs: of each task.
        sampler: its settings.
        seed: of the order of classes and of the random ranks.

    Attributes:
        classes: of each task; int64 (tasks, classes of a task).
        ranks: of each image in its class, from 0; int64 (N,).
        largest: images of the largest task.

    Raises:
        UserError: if a task has no image.
    """

    def __init__(self, labels: Tensor, classes: int, epochs: int, sampler: ClassIncremental, seed: int) -> None:
        self.labels, self.epochs, self.sampler = labels, epochs, sampler
        self.classes = torch.randperm(classes, generator=stream(seed, "class order")).view(sampler.tasks, -1)
        counts = [len(self.current(task)) for task in range(sampler.tasks)]
        if not min(counts):
            raise UserError(
                f"Task {counts.index(0) + 1} of sampler.tasks={sampler.tasks} has no image to train on.\n"
                "Use fewer tasks, or more images."
            )
        self.largest = max(counts)
        self.ranks = torch.empty_like(labels)
        for members in shuffled_by_class(labels, stream(seed, "exemplars")):
            self.ranks[members] = torch.arange(len(members))

    def task_of(self, epoch: int) -> int:
        """Return the number of the task of an epoch, both from 0."""
        return epoch // self.epochs

    def seen(self, task: int) -> Tensor:
        """Return whether each class has come by the time of `task`; bool (classes,)."""
        seen = torch.zeros(self.classes.numel(), dtype=torch.bool)
        seen[self.classes[: task + 1].flatten()] = True
        return seen

    def current(self, task: int) -> Tensor:
        """Return the positions of the images of a task; int64."""
        return torch.isin(self.labels, self.classes[task]).nonzero().flatten()

    def exemplars(self, task: int) -> Tensor:
        """Return the positions of the images of earlier tasks that the memory has during a task; int64."""
        seen = self.classes[:task]
        if not seen.numel():
            return torch.empty(0, dtype=torch.int64)
        kept = self.ranks < self.sampler.memory // seen.numel()
        return (kept & torch.isin(self.labels, seen)).nonzero().flatten()

    def steps(self, batch: int) -> int:
        """Return the number of batches of an epoch, the same in every task: as many as the largest one needs."""
        return math.ceil(self.largest / (batch - self.sampler.memory_batch))

    def draw(self, epoch: int, batch: int, generator: torch.Generator) -> Tensor:
        """Draw the positions of an epoch, batch by batch: images of its task, then of the memory; int64.

        Every image of the task comes once before any comes twice, and so does every image of the memory. The first
        task has all places of a batch.
        """
        task, steps, remembered = self.task_of(epoch), self.steps(batch), self.sampler.memory_batch
        if task == 0:
            return _passes(self.current(task), steps * batch, generator)
        current = _passes(self.current(task), steps * (batch - remembered), generator)
        memory = _passes(self.exemplars(task), steps * remembered, generator)
        return torch.cat([current.view(steps, -1), memory.view(steps, -1)], dim=1).flatten()

    def seen_images(self, epoch: int, labels: Tensor) -> int:
        """Return how many of the images with `labels` (int64, (n,)) are of classes that have come by an epoch."""
        return int(self.seen(self.task_of(epoch))[labels].sum())

    def accuracies(self, epoch: int, hits: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the columns of a row of metrics: the task of an epoch, from 1, and the accuracy of each so far.

        Args:
            epoch: from 0.
            hits: whether each image is classified correctly among all classes seen; uint8 (n,).
            labels: of these images; int64 (n,). A task without any has no column.
        """
        task, columns = self.task_of(epoch), {}
        for number, classes in enumerate(self.classes[: task + 1], start=1):
            of_task = hits[torch.isin(labels, classes)].double()
            if len(of_task):
                columns[f"task_{number}_accuracy"] = float(of_task.mean())
        return {"task": task + 1, **columns}

    def herd(self, positions: Tensor, features: Tensor) -> None:
        """Rank the images of one class by herding: each next one brings the mean of those taken nearest to the class's.

        Rebuffi et al. 2017, algorithm 4, of features of unit length. Only images that the memory can hold are ranked.

        Args:
            positions: of the images of the class; int64 (n,).
            features: of each; float (n, d).
        """
        features = torch.nn.functional.normalize(features.double(), dim=1)
        mean, total, left = features.mean(0), torch.zeros_like(features[0]), features.new_zeros(len(features))
        self.ranks[positions] = len(self.labels)
        most = self.sampler.memory // self.classes.shape[1]  # after the first task; later ones hold fewer
        for rank in range(min(most, len(positions))):
            distances = (mean - (total + features) / (rank + 1)).norm(dim=1) + left
            chosen = int(distances.argmin())
            self.ranks[positions[chosen]] = rank
            total, left[chosen] = total + features[chosen], math.inf


def _passes(positions: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` of the positions in random order, each once before any comes twice, and so on; int64."""
    passes = math.ceil(count / len(positions))
    orders = [torch.randperm(len(positions), generator=generator) for _ in range(passes)]
    return positions[torch.cat(orders)[:count]]
