"""How far a run is, and how long it has taken."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Position:
    """How far a run is; with the states of network, optimizer, scaler and probes, all that a resume needs.

    Attributes:
        epoch: epochs that are complete and evaluated.
        batch: batches that are done of the epoch under way.
        losses: loss of each batch of that epoch, float32 (steps,) on the device.
        correct: images classified correctly in each batch, int64 (steps,) on the device.
        wall_seconds: of the run so far, over all processes that carried it out one after the other.
        train_seconds: spent on training since the last evaluation.
        train_images: images trained on since the last evaluation.
    """

    epoch: int
    batch: int
    losses: Tensor
    correct: Tensor
    wall_seconds: float = 0.0
    train_seconds: float = 0.0
    train_images: int = 0

    @classmethod
    def start(cls, steps: int, device: torch.device) -> "Position":
        """Return the position before the first of `steps` batches of the first epoch."""
        return cls(0, 0, torch.zeros(steps, device=device), torch.zeros(steps, dtype=torch.int64, device=device))

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Become the position that `vars` gave, in place: engines keep the tensors."""
        for name, value in saved.items():
            if isinstance(value, Tensor):
                getattr(self, name).copy_(value)
            else:
                setattr(self, name, value)

    def next_epoch(self) -> None:
        """Move to the start of the next epoch."""
        self.epoch, self.batch = self.epoch + 1, 0


class Stopwatch:
    """Adds the time that passes to the seconds of a position."""

    def __init__(self, position: Position) -> None:
        self._position, self._last = position, time.monotonic()

    def lap(self, *, training: bool) -> None:
        """Count the time since the last lap; as time of training, or of what comes between (evaluation, probes)."""
        now = time.monotonic()
        self._position.wall_seconds += now - self._last
        if training:
            self._position.train_seconds += now - self._last
        self._last = now
