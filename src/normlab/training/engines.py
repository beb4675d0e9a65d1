"""Engines: how the steps of an epoch are carried out, one by one from Python, or one captured and then replayed.

All train on the same batches by the same formulas; `engine` chooses (conf/config.yaml).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.config.schema import RMSprop, RunConfig
from normlab.data.batches import Epoch, Split
from normlab.training.graphs import GRAPHS, LOSS, Replayed, kind_of, new_pool
from normlab.training.optimizers import learning_rate, set_learning_rate
from normlab.training.state import Position
from normlab.training.step import TrainingStep

COMPILING = 2  # steps of engine=compile that compile: in the second, an assumed constant may prove to be none


def build(
    config: RunConfig,
    train: Split,
    step: TrainingStep,
    position: Position,
    warn: Callable[[str], None],
    *,
    packed: bool = False,
) -> "Engine":
    """Return the engine that a run requests by `engine`.

    Args:
        warn: called when a step cannot be captured that engine=auto or compile would capture.
        packed: whether other runs train in this process at the same time: each run's graphs are checked then.

    Raises:
        UserError: for engine=graph where a step cannot be captured.
    """
    why_not = _why_no_graph(config, train, step.device)
    if config.engine == "graph" and why_not:
        raise UserError(f"engine=graph cannot capture the steps of this run: {why_not}.\nUse engine=auto or eager.")
    if may_capture(config, step.device) and not why_not:
        return Graphed(config, train, step, position, warn, packed)
    kind = Compiled if config.engine == "compile" else Engine
    return kind(config, train, step, position)


def may_capture(config: RunConfig, device: torch.device) -> bool:
    """Return whether the steps of a run may be captured, for all that is known before it is built."""
    return config.engine == "graph" or (config.engine != "eager" and device.type == "cuda")


def compiled(config: RunConfig, network: nn.Module) -> nn.Module:
    """Return `network`, compiled for engine=compile; the parameters are shared."""
    if config.engine != "compile":
        return network
    return cast(nn.Module, torch.compile(network, dynamic=False))  # the last batch of an epoch has a size of its own


def _why_no_graph(config: RunConfig, train: Split, device: torch.device) -> str | None:
    if device.type not in GRAPHS:
        return "only a GPU can replay one"
    if train.processes > 1:
        return "several processes train it"
    if not train.resident:
        return "its images are read from files (dataset.storage=stream)"
    if config.precision == "fp16" and isinstance(config.optimizer, RMSprop):
        return "the scaler of fp16 needs the host before each update of RMSprop"
    return None


class Engine:
    """Carries out the steps of an epoch, every operation launched from Python (engine=eager).

    Attributes:
        capture_seconds: spent so far on capturing or compiling, which is not counted as training.
    """

    def __init__(self, config: RunConfig, train: Split, step: TrainingStep, position: Position) -> None:
        self.config, self.train, self.train_on, self.position = config, train, step, position
        self.epoch, self.capture_seconds = 0, 0.0
        self._batches: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._next: tuple[Tensor, Tensor] | None = None

    def start_epoch(self, epoch: int) -> None:
        """Start the epoch, or go on with it, at the batch of the position."""
        self.epoch, self._next = epoch, None
        self._batches = self.train.batches(epoch, start=self.position.batch)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Return the batch that `step` will train on."""
        if self._next is None:
            self._next = next(self._batches)
        return self._next

    def step(self) -> None:
        """Train on the batch of the position and keep its loss and correct classifications there, on the device."""
        (images, labels), batch = self.next_batch(), self.position.batch
        self._next = None
        set_learning_rate(self.train_on.optimizer, partial(self._learning_rate, batch))
        loss, correct = self.train_on(images, labels, self.train.images_of(batch))
        # Reading them here would make every step wait for the GPU (as fp16's scaler does).
        self.position.losses[batch] = loss
        self.position.correct[batch] = correct

    def evaluation(
        self, work: Callable[[], None], changes: Callable[[], dict[str, Tensor]], images: int
    ) -> Callable[[], None]:
        """Return how to do the work of a batch of an evaluation: itself, or by a graph.

        Args:
            work, changes: see `Replayed`.
            images: in the batch.
        """
        return work

    def _learning_rate(self, batch: int, divisor: float) -> float:
        steps = self.train.steps
        return learning_rate(self.config, self.epoch * steps + batch, steps, divisor)

    @contextmanager
    def _compiling(self, steps: int) -> Iterator[None]:
        """Count the time of a step as preparation if torch.compile compiles in it.

        Args:
            steps: of its kind before this one.
        """
        begun = time.monotonic()
        yield
        if self.config.engine == "compile" and steps < COMPILING:
            if self.position.losses.is_cuda:
                torch.cuda.synchronize()
            seconds = time.monotonic() - begun
            self.capture_seconds += seconds
            self.position.train_seconds -= seconds  # the step as a whole is counted there


class Compiled(Engine):
    """The network is compiled by torch.compile in its first steps."""

    _steps = 0

    def step(self) -> None:
        """See `Engine`."""
        with self._compiling(self._steps):
            super().step()
        self._steps += 1


class Graphed(Engine):
    """The whole step is one graph for each size of batch: that of the full ones, and that of a smaller last one.

    Images gathered and augmented, forward and backward pass, update, loss and correct classifications kept. All that
    differs from step to step is on the device: the epoch's images, labels, draws and learning rates, and the number of
    the batch, which each step counts up. Steps before a capture are launched from Python.
    """

    def __init__(
        self,
        config: RunConfig,
        train: Split,
        step: TrainingStep,
        position: Position,
        warn: Callable[[str], None],
        packed: bool,
    ) -> None:
        super().__init__(config, train, step, position)
        self.warn, self.packed = warn, packed
        self.images: Epoch | None = None
        self.rates = torch.zeros(len(step.optimizer.param_groups), train.steps, device=step.device)
        self.rate = self.rates.new_zeros(len(self.rates), 1)  # of the batch, of each group
        self.number = torch.zeros(1, dtype=torch.int64, device=step.device)  # of the batch
        self.numbers = torch.arange(train.steps, device=step.device)
        self.steps: dict[int, Replayed] = {}  # by the number of images
        self._all: list[Replayed] = []  # those of evaluations, too
        self._pool = new_pool(step.device)
        self._python_numbers: object = None

    def start_epoch(self, epoch: int) -> None:
        """See `Engine`."""
        self.epoch = epoch
        fresh = self.train.epoch(epoch)
        if self.images:  # a replay reads where the capture did
            self.images.copy_(fresh)
        else:
            self.images = fresh
        groups = self.train_on.optimizer.param_groups
        divisors, numbers = [group["lr_divisor"] for group in groups], range(self.train.steps)
        rates = [[self._learning_rate(number, divisor) for number in numbers] for divisor in divisors]
        self.rates.copy_(torch.tensor(rates))
        for group, rate in zip(groups, self.rate, strict=True):
            group["lr"] = rate[0]  # a view, so that one operation sets all rates
        self.number.fill_(self.position.batch)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        first = self.position.batch * self.train.batch
        return self._batch(lambda of_images: of_images[first : first + self.train.batch])

    def step(self) -> None:
        """See `Engine`."""
        images = self.train.images_of(self.position.batch)
        if images not in self.steps:
            self.steps[images] = self._replayed(partial(self._whole_step, images), self._changes, "a step", images)
        numbers = self.train_on.layers.python_numbers()
        if self._python_numbers not in (None, numbers) and not self.steps[images].refused:
            self._refuse("at_step of a layer changes a number of Python, which no replay sees; only tensors may change")
        self._python_numbers = numbers
        step, begun = self.steps[images], time.monotonic()
        captures = step.captures_next
        with self._compiling(step.times):
            step()
        if captures:
            seconds = time.monotonic() - begun
            self.position.train_seconds -= seconds  # no time of training
            self.capture_seconds += seconds if step.graph else 0.0

    def evaluation(
        self, work: Callable[[], None], changes: Callable[[], dict[str, Tensor]], images: int
    ) -> Callable[[], None]:
        """See `Engine`. Other statistics than running ones are beyond the graph."""
        return self._replayed(work, changes, "an evaluation", images) if self.config.eval_stats == "running" else work

    def _replayed(
        self, work: Callable[[], None], changes: Callable[[], dict[str, Tensor]], what: str, images: int
    ) -> Replayed:
        made = Replayed(
            self.train_on.device,
            work,
            changes,
            kind=(what, kind_of(self.config, images, packed=self.packed)),
            precision=self.config.precision,
            pool=self._pool,
            refuse=partial(self._refuse, what=what),
        )
        if any(each.refused for each in self._all):
            made.launch_from_now_on()
        self._all.append(made)
        return made

    def _refuse(self, why: str, what: str = "a step") -> None:
        """Launch all from Python from now on, or end a run that insists on graphs."""
        if self.config.engine == "graph":
            raise UserError(
                f"engine=graph cannot capture {what} of {self.config.model.name} with norm={self.config.norm.name}:"
                f" {why}.\nUse engine=auto or engine=eager."
            )
        instead = "without a graph" if self.config.engine == "compile" else "with engine=eager"
        self.warn(f"{what.capitalize()} of this run cannot be captured ({why}); it goes on {instead}.")
        for each in self._all:
            each.launch_from_now_on()

    def _whole_step(self, images: int) -> None:
        full = self.train.images // self.train.batch

        def part(of_images: Tensor) -> Tensor:
            if images < self.train.batch:  # the last one
                return of_images[full * self.train.batch :]
            batches = of_images[: full * self.train.batch].view(full, self.train.batch, *of_images.shape[1:])
            return batches.index_select(0, self.number)[0]

        pixels, labels = self._batch(part)
        torch.index_select(self.rates, 1, self.number, out=self.rate)
        loss, correct = self.train_on(pixels, labels, images)
        here = self.numbers == self.number  # deterministic=true makes index_copy_ sort its indices
        for value, kept in ((loss, self.position.losses), (correct, self.position.correct)):
            torch.where(here, value, kept, out=kept)
        self.number.add_(1)

    def _batch(self, part: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the images and labels of a `part` of what there is of the images of the epoch, (images, ...)."""
        assert self.images
        draws = self.images.draws
        images = self.train.gather(part(self.images.positions), None if draws is None else part(draws))
        return images, part(self.images.labels)

    def _changes(self) -> dict[str, Tensor]:
        """Return what a step changes; not its correct classifications, where half precision has ties."""
        step = self.train_on
        changed: dict[str, Tensor] = {LOSS: self.position.losses, "number of the batch": self.number}
        network = {**dict(step.network.named_parameters()), **dict(step.network.named_buffers())}
        changed |= {f"{name} of the network": value for name, value in network.items()}
        if step.averaged:
            changed |= {f"{name} of the average": value for name, value in step.averaged.state_dict().items()}
        for number, state in enumerate([vars(step.scaler), *step.optimizer.state.values()]):
            tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            changed |= {f"{key} of the optimizer ({number})": value for key, value in tensors.items()}
        return changed
