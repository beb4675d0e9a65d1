"""How the steps of an epoch are carried out: each one said by Python, or one captured and then replayed.

All train on the same batches by the same formulas; `engine` chooses (conf/config.yaml).
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.config.schema import RMSprop, RunConfig
from normlab.data.batches import Epoch, Split
from normlab.training.graphs import Graph, graph_for
from normlab.training.optimizers import learning_rate, set_learning_rate
from normlab.training.step import Step

WARM_UP = 3  # steps before the captured one: libraries choose their kernels, optimizers make their state


@dataclass
class Position:
    """Where a run stands; with the states of network, optimizer and scaler, all that a resume needs."""

    epoch: int  # epochs that are complete and evaluated
    batch: int  # batches done of the one under way
    losses: Tensor  # (steps,) float32 on the device: loss of each batch of the epoch
    hits: Tensor  # (steps,) int64 on the device: images classified correctly
    wall_seconds: float  # of the run so far, over all its processes
    train_seconds: float  # spent on training since the last evaluation
    train_images: int  # images trained on since the last evaluation


class Engine(Protocol):
    capture_seconds: float  # spent so far on capturing or compiling, which is no training

    def begin(self, epoch: int) -> None:
        """Start the epoch, or go on with it, at the batch that the position names."""

    def upcoming(self) -> tuple[Tensor, Tensor]:
        """The batch that `step` will train on."""

    def step(self) -> None:
        """Train on the batch that the position names, and note its loss and hits there, without waiting for the
        device.
        """


def build(
    config: RunConfig, train: Split, step: Step, at: Position, processes: int, warn: Callable[[str], None]
) -> Engine:
    """The engine that a run asks for by `engine`; `warn` is told when engine=auto has to do without a graph.

    Raises:
        UserError: for engine=graph where a step cannot be captured.
    """
    why_not = _why_no_graph(config, train, processes)
    if config.engine == "graph" and why_not:
        raise UserError(f"engine=graph cannot capture the steps of this run: {why_not}.\nUse engine=auto or eager.")
    if may_capture(config, step.device) and not why_not:
        return Graphed(config, train, step, at, graph_for(step.device), warn)
    if config.engine == "compile":
        return Compiled(config, train, step, at)
    return Eager(config, train, step, at)


def may_capture(config: RunConfig, device: torch.device) -> bool:
    """Whether the steps of a run may be captured, for all that is known before it is built."""
    return config.engine == "graph" or (config.engine == "auto" and device.type == "cuda")


def compiled(config: RunConfig, network: nn.Module) -> nn.Module:
    """`network` as engine=compile wants it; the parameters are shared."""
    if config.engine != "compile":
        return network
    return cast(nn.Module, torch.compile(network, dynamic=False))  # the last batch of an epoch has a size of its own


def _why_no_graph(config: RunConfig, train: Split, processes: int) -> str | None:
    if processes > 1:
        return "several processes train it"
    if not train.resident:
        return "its images are read from files (dataset.storage=stream)"
    if config.precision == "fp16" and isinstance(config.optimizer, RMSprop):
        return "the scaler of fp16 asks the host before each update of RMSprop"
    return None


class Eager:
    """Every operation of every step is said by Python."""

    def __init__(self, config: RunConfig, train: Split, step: Step, at: Position) -> None:
        self.config, self.train, self.make, self.at = config, train, step, at
        self.epoch, self.capture_seconds = 0, 0.0
        self._batches: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._upcoming: tuple[Tensor, Tensor] | None = None

    def begin(self, epoch: int) -> None:
        self.epoch, self._upcoming = epoch, None
        self._batches = self.train.batches(epoch, start=self.at.batch)

    def upcoming(self) -> tuple[Tensor, Tensor]:
        if self._upcoming is None:
            self._upcoming = next(self._batches)
        return self._upcoming

    def step(self) -> None:
        images, labels = self.upcoming()
        self._upcoming = None
        set_learning_rate(self.make.optimizer, self._rate(self.at.batch))
        loss, hits = self.make(images, labels, self.train.images_of(self.at.batch))
        # Kept on the device: reading them here would make every step wait for the GPU (as fp16's scaler does).
        self.at.losses[self.at.batch] = loss
        self.at.hits[self.at.batch] = hits

    def _rate(self, batch: int) -> float:
        steps = self.train.steps
        return learning_rate(self.config, self.epoch * steps + batch, steps)


class Compiled(Eager):
    """The network compiled by torch.compile; its first steps, which compile it, count as preparation."""

    FIRST = 2  # the second time, what was taken for a constant may prove to be none

    def __init__(self, config: RunConfig, train: Split, step: Step, at: Position) -> None:
        super().__init__(config, train, step, at)
        self.made = 0

    def step(self) -> None:
        begun = time.monotonic()
        super().step()
        self.made += 1
        if self.made <= self.FIRST:
            if self.at.losses.is_cuda:
                torch.cuda.synchronize()
            self.capture_seconds += time.monotonic() - begun


class Graphed(Eager):
    """The whole step of a full batch is one graph: images gathered and augmented, forward and backward pass, update,
    loss and hits noted.

    What differs from step to step is on the device: the epoch's images, labels, draws and learning rates, and the
    number of the batch, which each replay counts up. The smaller last batch and the steps before the capture are eager.
    """

    def __init__(
        self, config: RunConfig, train: Split, step: Step, at: Position, graph: Graph, warn: Callable[[str], None]
    ) -> None:
        super().__init__(config, train, step, at)
        self.graph, self.warn = graph, warn
        self.state = "warming up"  # then "captured", or "eager" if it cannot be
        self.made = 0
        self.images: Epoch
        self.rates = torch.zeros(train.steps, device=step.device)
        self.number = torch.zeros(1, dtype=torch.int64, device=step.device)  # of the batch
        self.places = torch.arange(train.batch, device=step.device)

    def begin(self, epoch: int) -> None:
        self.epoch = epoch
        fresh = self.train.epoch(epoch)
        if self.state == "captured":  # a replay reads where the capture did
            self.images.copy_(fresh)
        else:
            self.images = fresh
        self.rates.copy_(torch.tensor([self._rate(batch) for batch in range(self.train.steps)]))
        self.number.fill_(self.at.batch)

    def upcoming(self) -> tuple[Tensor, Tensor]:
        return self._batch(self.places[: self.train.images_of(self.at.batch)] + self.at.batch * self.train.batch)

    def step(self) -> None:
        full = self.train.images_of(self.at.batch) == self.train.batch
        if full and self.state == "captured":
            self.graph.replay()
        elif full and self.state == "warming up" and self.made >= WARM_UP:
            self._capture()
        else:
            self._upcoming = self.upcoming()
            super().step()
            self.number.add_(1)
            self.made += 1

    def _capture(self) -> None:
        begun = time.monotonic()
        try:
            self.graph.capture(self._whole_step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            if self.config.engine == "graph":
                raise UserError(
                    f"engine=graph cannot capture a step of {self.config.model.name} with norm={self.config.norm.name}:"
                    f" {why}.\nUse engine=auto or engine=eager."
                ) from error
            self.warn(f"A step of this run cannot be captured ({why}); it goes on with engine=eager.")
            self.state = "eager"
            self.step()
            return
        self.state = "captured"
        self.capture_seconds += time.monotonic() - begun

    def _whole_step(self) -> None:
        images, labels = self._batch(self.places + self.number * self.train.batch)
        for group in self.make.optimizer.param_groups:
            group["lr"].copy_((self.rates.index_select(0, self.number) / group["lr_divisor"]).squeeze())
        loss, hits = self.make(images, labels, self.train.batch)
        self.at.losses.index_copy_(0, self.number, loss[None].to(self.at.losses.dtype))
        self.at.hits.index_copy_(0, self.number, hits[None])
        self.number.add_(1)

    def _batch(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The images and labels at `places` of the epoch, int64 (B,)."""
        draws = self.images.draws
        images = self.train.gather(
            self.images.positions.index_select(0, places), None if draws is None else draws.index_select(0, places)
        )
        return images, self.images.labels.index_select(0, places)
