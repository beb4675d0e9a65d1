"""Heartbeats, checkpoints, requests to stop and the check of losses between the batches of a run."""

import math
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from normlab.common.errors import InterruptedRunError
from normlab.training.interrupt import StopRequest
from normlab.training.record import Recorder
from normlab.training.state import Stopwatch, TrainingState

T = TypeVar("T")
HEARTBEAT_SECONDS = 1.0  # between heartbeats, and between checks of the losses


class DivergedError(Exception):
    """The loss of `step` (counted from 1), or a parameter after it, was not a finite number."""

    def __init__(self, step: int, what: str = "the loss") -> None:
        super().__init__(f"{what} of step {step} was not finite")
        self.step = step


class LossCheck:
    """Checks losses without waiting for a GPU, whose result comes with a later check."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._result = torch.zeros((), dtype=torch.bool, pin_memory=self._on_gpu)
        self._copied: torch.Event | None = None  # the result of the latest check

    def failed(self, losses: Tensor) -> bool:
        """Return whether the latest check that is over met a loss that is not finite; on a CPU, this check."""
        if self._copied and not self._copied.query():
            return False
        earlier = bool(self._result)
        self._result.copy_(~torch.isfinite(losses).all(), non_blocking=True)
        if not self._on_gpu:
            return bool(self._result)
        self._copied = torch.cuda.current_stream().record_event()
        return earlier


class Supervisor:
    """Writes heartbeats and regular checkpoints when they are due, ends a run on request, and checks its losses.

    All processes of a run decide alike (`ProcessGroup.consensus`).
    """

    def __init__(self, state: TrainingState, recorder: Recorder, stop: StopRequest) -> None:
        self.stopwatch = Stopwatch(state.position)
        self._state, self._recorder, self._stop = state, recorder, stop
        self._consensus = state.group.consensus(HEARTBEAT_SECONDS)
        self._loss_check = LossCheck(state.device)
        self._gathered = 0  # batches of the epoch whose losses are those of all processes
        self._last_heartbeat, self._last_checkpoint = -math.inf, time.monotonic()

    def start_epoch(self) -> None:
        """Prepare for the batches of an epoch, or the rest of it."""
        self._gathered = self._state.position.batch
        every = self._state.config.checkpoint_seconds
        self._consensus = self._state.group.consensus(min(HEARTBEAT_SECONDS, math.inf if every is None else every))

    def supervise(self, batches: Iterable[T], at_most: int | None = None) -> Iterator[T]:
        """Yield `batches` of an evaluation, with heartbeats; all processes have `at_most` of them together.

        Raises:
            InterruptedRunError: when a stop was requested.
        """
        self._consensus = self._state.group.consensus(HEARTBEAT_SECONDS, at_most)
        for batch in batches:
            yield batch
            self.after_batch(training=False)

    def after_batch(self, *, training: bool) -> None:
        """Do what is due after a batch; after one of `training`, a regular checkpoint may be.

        Raises:
            DivergedError: for a loss that is not finite.
            InterruptedRunError: when a stop was requested.
        """
        now, every = time.monotonic(), self._state.config.checkpoint_seconds
        heartbeat, checkpoint, stop = self._consensus.decide(
            now - self._last_heartbeat >= HEARTBEAT_SECONDS,
            training and every is not None and now - self._last_checkpoint >= every,
            self._stop.requested,
        )
        if not (heartbeat or checkpoint or stop):
            return
        if training and (checkpoint or stop or self._diverged()):
            self.gather_losses()
        self.stopwatch.lap(training=training)
        self._recorder.heartbeat(self._state)
        if stop:
            raise InterruptedRunError(stop)
        if checkpoint:
            self._recorder.checkpoint(self._state)
            self.stopwatch.lap(training=False)
            self._last_checkpoint = time.monotonic()
        self._last_heartbeat = time.monotonic()

    def _diverged(self) -> bool:
        """Return whether a loss may not be finite; always, where it takes the other processes to know."""
        position = self._state.position
        return self._state.group.world > 1 or self._loss_check.failed(position.losses[: position.batch])

    def gather_losses(self) -> None:
        """Sum up over processes what each noted of its shares of batches since last time; waits for the device.

        Raises:
            DivergedError: if one of the epoch's losses is not finite.
        """
        state, position = self._state, self._state.position
        state.interleaver.synchronize()
        state.group.all_reduce(position.losses[self._gathered : position.batch])
        state.group.all_reduce(position.correct[self._gathered : position.batch])
        self._gathered = position.batch
        wrong = (~torch.isfinite(position.losses[: position.batch])).nonzero()
        if len(wrong):
            raise DivergedError(state.steps_until(position.epoch) + int(wrong[0]) + 1)
