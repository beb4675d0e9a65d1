"""The course of a run: epochs of steps, with what happens between them."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from normlab.common.errors import InterruptedRunError
from normlab.common.rng import key
from normlab.config.schema import RunConfig
from normlab.data.batches import Split
from normlab.data.datasets import Data
from normlab.norms import batch_statistics, independent_processes, precise_statistics
from normlab.probes import Probes, StepSnapshot
from normlab.training.device import autocast
from normlab.training.distributed.group import ALONE, Alone, Looks
from normlab.training.engines import Engine, Position
from normlab.training.interleaving import Turn
from normlab.training.interrupt import StopRequest
from normlab.training.optimizers import learning_rate, set_learning_rate
from normlab.training.step import Step
from normlab.training.tasks import Task

T = TypeVar("T")
BEAT_SECONDS = 1.0  # between looks at the clock's consequences: heartbeat, divergence, checkpoint


class DivergedError(Exception):
    """The loss of `step` (1-based), or a parameter after it, was not a finite number."""

    def __init__(self, step: int, what: str = "the loss") -> None:
        super().__init__(f"{what} of step {step} was not finite")
        self.step = step


def train(
    config: RunConfig,
    data: Data,
    step: Step,
    engine: Engine,
    at: Position,
    stop: StopRequest,
    *,
    probes: Probes | None = None,
    team: Alone = ALONE,
    turn: Turn = Turn(),  # noqa: B008  # it has no state
    beat: Callable[[Position], None],
    checkpoint: Callable[[Position], None],
    record: Callable[[dict[str, Any]], None],
) -> None:
    """Train from `at` to the end. `beat`, `checkpoint` and `record` write down progress, state and metrics.

    The processes of a `team` make every step together, each with its share of the batch. `engine` carries out `step`;
    `probes` look on; between two steps it may be the `turn` of other runs of this process.

    Raises:
        DivergedError: at the first loss that is not finite (found within a second or two).
        InterruptedRunError: after a checkpoint, when `stop` was requested.
    """
    device = at.losses.device
    # The global generator of this device alone: torch.manual_seed would seed every backend, at 0.1 ms a step.
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    steps = data.train.steps
    others = ("process", team.rank) if team.rank else ()
    settled = at.batch  # up to here the losses and hits of the epoch are those of all processes

    def seed(number: int) -> None:  # for dropout and the like: the same after a resume, and in a probe
        generator.manual_seed(key(config.seed, "step", number, *others))

    moment = partial(
        StepSnapshot,
        network=step.network,
        optimizer=step.optimizer,
        scaler=step.scaler,
        transform=step.transform,
        loss=step.task.loss,
        within=partial(autocast, config, device),
        seed=seed,
        pulse=partial(next, _watched(itertools.repeat(None), Looks(), stop, lambda: beat(at))),
    )

    def settle(before: int) -> None:
        """Add up what each process has noted of its shares since last time, and look for what is not finite."""
        nonlocal settled
        turn.wait()
        team.add_up(at.losses[settled : at.batch])
        team.add_up(at.hits[settled : at.batch])
        settled = at.batch
        _check_losses(at, before)

    lookout = _Lookout(device)
    every = config.checkpoint_seconds
    pause_seconds = BEAT_SECONDS if every is None else min(BEAT_SECONDS, every)
    started = time.monotonic() - at.wall_seconds
    last_beat, last_checkpoint = -math.inf, time.monotonic()

    for epoch in range(at.epoch, config.epochs):
        step.network.train()
        looks = team.looks(pause_seconds)
        clock = time.monotonic()
        engine.begin(epoch)
        for number in range(epoch * steps + at.batch, (epoch + 1) * steps):
            seed(number)
            step.layers.begin(number, config.epochs * steps)
            if probes and probes.due(number):
                settle(epoch * steps)
                begun = time.monotonic()
                lr = learning_rate(config, number, steps)
                set_learning_rate(step.optimizer, lr)  # a probe may ask what the step will do
                step.optimizer.zero_grad(set_to_none=True)
                try:
                    probes.measure(moment(number, lr, *engine.upcoming()))
                except InterruptedRunError:  # a resume begins with this measurement
                    at.wall_seconds, at.train_seconds = time.monotonic() - started, at.train_seconds + begun - clock
                    checkpoint(at)
                    raise
                clock += time.monotonic() - begun  # no training

            prepared = engine.capture_seconds
            engine.step()
            clock += engine.capture_seconds - prepared
            at.train_images += data.train.images_of(at.batch)
            at.batch += 1
            turn.over()

            now = time.monotonic()
            due = every is not None and now - last_checkpoint >= every
            beats, due, stopped = looks.agree(now - last_beat >= BEAT_SECONDS, due, stop.requested)
            if beats or due or stopped:
                if due or stopped or team.world > 1 or lookout.found(at.losses[: at.batch]):
                    settle(epoch * steps)  # waits for the device
                at.wall_seconds = time.monotonic() - started
                beat(at)
                if due or stopped:
                    at.train_seconds += time.monotonic() - clock
                    checkpoint(at)
                    last_checkpoint = clock = time.monotonic()
                if stopped:
                    raise InterruptedRunError(stopped)
                last_beat = time.monotonic()

        settle(epoch * steps)
        _check_parameters(step.network, (epoch + 1) * steps)
        at.train_seconds += time.monotonic() - clock
        at.wall_seconds = time.monotonic() - started
        last = epoch + 1 == config.epochs
        if last or (epoch + 1) % config.eval_every == 0:
            evaluated = step.averaged.module if step.averaged else step.network
            save, pulse = partial(checkpoint, at), partial(beat, at)
            row = _row(config, step.task, evaluated, data, at, epoch, team, turn, stop, save, pulse)
            at.wall_seconds = time.monotonic() - started
            record({**row, "wall_seconds": at.wall_seconds})
            at.train_seconds, at.train_images = 0.0, 0
        at.epoch, at.batch, settled = epoch + 1, 0, 0
        beat(at)


def _row(
    config: RunConfig,
    task: Task,
    network: nn.Module,
    data: Data,
    at: Position,
    epoch: int,
    team: Alone,
    turn: Turn,
    stop: StopRequest,
    save: Callable[[], None],
    beat: Callable[[], None],
) -> dict[str, Any]:
    """Evaluate; one row of metrics. Training loss and accuracy are those seen while training this epoch."""
    sizes = torch.full_like(at.losses, config.batch)
    images = data.train.images
    sizes[-1] = data.train.images_of(data.train.steps - 1)
    end = (epoch + 1) * data.train.steps
    row: dict[str, Any] = {"epoch": epoch + 1, "step": end}
    row |= task.metrics("train", task.train_loss(at.losses, sizes), int(at.hits.sum()), images)
    try:
        with independent_processes(), _statistics(config, network, data, at.losses.device, team, stop, beat):
            for name, split in (("val", data.val), ("test", data.test)):
                if split is not None:
                    loss, hits = evaluate(config, task, network, split, at.losses.device, team, turn, stop, beat)
                    row |= task.metrics(name, loss, hits, len(split))
    except InterruptedRunError:
        save()  # the epoch is complete: a resume begins with its evaluation
        raise
    lr = learning_rate(config, end - 1, data.train.steps)
    return row | {"lr": lr, "images_per_second": at.train_images / at.train_seconds}


def _statistics(
    config: RunConfig,
    network: nn.Module,
    data: Data,
    device: torch.device,
    team: Alone,
    stop: StopRequest,
    beat: Callable[[], None],
) -> AbstractContextManager[None]:
    """What an evaluation normalises by: `eval_stats`. Every process measures precise statistics by itself."""
    if config.eval_stats == "batch":
        return batch_statistics(network)
    if config.eval_stats == "precise":
        batches = _watched(data.train.plain_batches(config.precise_batches), team.looks(BEAT_SECONDS), stop, beat)
        return precise_statistics(network, batches, within=autocast(config, device))
    return nullcontext()


@torch.inference_mode()
def evaluate(
    config: RunConfig,
    task: Task,
    network: nn.Module,
    split: Split,
    device: torch.device,
    team: Alone,
    turn: Turn,
    stop: StopRequest,
    beat: Callable[[], None],
) -> tuple[float, int]:
    """The sums over `split` of the loss (without label smoothing) and of correct classifications."""
    network.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    hits = torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in _watched(split.batches(), team.looks(BEAT_SECONDS, split.shared_batches), stop, beat):
        with autocast(config, device):
            outputs = network(images)
        loss += task.test_loss(outputs, labels)
        hits += task.hits(outputs, labels)
        turn.over()
    turn.wait()
    if split.processes > 1:  # else every process has evaluated all of it
        team.add_up(loss)
        team.add_up(hits)
    return float(loss), int(hits)


def _watched(batches: Iterable[T], looks: Looks, stop: StopRequest, beat: Callable[[], None]) -> Iterator[T]:
    """`batches`, with a heartbeat and an ear for `stop` after each."""
    last_beat = time.monotonic()
    for batch in batches:
        yield batch
        beats, _, stopped = looks.agree(time.monotonic() - last_beat >= BEAT_SECONDS, False, stop.requested)
        if stopped:
            raise InterruptedRunError(stopped)
        if beats:
            beat()
            last_beat = time.monotonic()


class _Lookout:
    """Looks for losses that are not finite without waiting for a GPU, whose answer comes with a later look."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._answer = torch.zeros((), dtype=torch.bool, pin_memory=self._cuda)
        self._asked: torch.cuda.Event | None = None

    def found(self, losses: Tensor) -> bool:
        """Whether the losses of the last look that was answered had one; a CPU answers at once."""
        wrong = ~torch.isfinite(losses).all()
        if not self._cuda:
            return bool(wrong)
        if self._asked and not self._asked.query():
            return False
        answer = self._asked is not None and bool(self._answer)
        self._answer.copy_(wrong, non_blocking=True)
        self._asked = torch.cuda.Event()
        self._asked.record()
        return answer


def _check_losses(at: Position, before: int) -> None:
    """Look for a loss that is not finite among those of the epoch that began after step `before`."""
    wrong = (~torch.isfinite(at.losses[: at.batch])).nonzero()
    if len(wrong):
        raise DivergedError(before + int(wrong[0]) + 1)


def _check_parameters(network: nn.Module, step: int) -> None:
    """What the last step of an epoch broke, no later loss of training shows before the evaluation."""
    sums = torch.stack([parameter.detach().sum() for parameter in network.parameters()])  # one pass, no copies
    if not torch.isfinite(sums).all():
        raise DivergedError(step, "a parameter after the update")
