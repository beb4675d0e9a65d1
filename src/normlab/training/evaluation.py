"""The evaluation of a network on one part of the data, batch after batch; on a GPU by the replays of graphs."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from normlab.config.schema import RunConfig
from normlab.data.batches import Split
from normlab.training.device import autocast
from normlab.training.graphs import LOSS
from normlab.training.tasks import Classification, Task


class Evaluation:
    """Sums up loss and correct classifications of a network over a split, again and again while it is trained.

    To be made and used in `torch.inference_mode`, the network in evaluation mode.

    Args:
        network: what is evaluated.
        by_graph: `Engine.evaluation`.

    Attributes:
        loss: sum of the loss without label smoothing over this process's images, float64.
        correct: their correct classifications, int64.
        hits: whether each image of the split is classified correctly, uint8 (N,); 0 for other processes' images.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        task: Task,
        network: nn.Module,
        split: Split,
        by_graph: Callable[..., Callable[[], None]],
    ) -> None:
        self.config, self.device, self.task, self.network, self.split = config, device, task, network, split
        self.by_graph = by_graph
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.hits = torch.zeros(len(split), dtype=torch.uint8, device=device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)  # of the batch
        self._own = self.hits[split.rank :: split.processes]
        self._numbers = torch.arange(split.steps, device=device)[:, None]
        self._in_batches = self.hits.new_zeros(split.steps, split.batch)
        self._places = torch.arange(split.batch, device=device)
        self._labels = split.labels.to(device) if self._gathers else split.labels
        self._works: dict[int, Callable[[], None]] = {}  # by the number of images

    @property
    def _gathers(self) -> bool:
        """Return whether a batch is gathered by its number: of images in memory, in one process."""
        return self.split.resident and self.split.processes == 1

    def batches(self) -> Iterator[Callable[[], None]]:
        """Start anew, and yield the work of each batch."""
        for total in (self.loss, self.correct, self.hits, self.number):
            total.zero_()
        if self._gathers:
            yield from map(self._of_size, map(self.split.images_of, range(self.split.steps)))
            self.hits.copy_(self._in_batches.flatten()[: len(self.hits)])
            return
        first = 0
        for images, labels in self.split.batches():
            yield partial(self._add, images, labels, self._own[first : first + len(labels)])
            first += len(labels)

    def _of_size(self, images: int) -> Callable[[], None]:
        if images not in self._works:
            self._works[images] = self.by_graph(partial(self._next, images), self._changes, images)
        return self._works[images]

    def _changes(self) -> dict[str, Tensor]:
        sums = {LOSS: self.loss, "correct": self.correct, "hits": self._in_batches}
        return sums | {"number of the batch": self.number}

    def _next(self, images: int) -> None:
        """Evaluate the next batch of so many images; reads nothing on the host."""
        places = self._places[:images] + self.number * self.split.batch
        hits = self.hits.new_zeros(self.split.batch)
        self._add(self.split.gather(places, None), self._labels.index_select(0, places), hits[:images])
        # Not index_copy_, which sorts its indices with deterministic=true.
        torch.where(self._numbers == self.number, hits, self._in_batches, out=self._in_batches)
        self.number.add_(1)

    def _add(self, images: Tensor, labels: Tensor, hits: Tensor) -> None:
        with autocast(self.config, self.device):
            outputs = self.network(images)
        self.loss += self.task.test_loss(outputs, labels)
        if isinstance(self.task, Classification):
            hits.copy_(self.task.hits(outputs, labels))
            self.correct += hits.sum()
