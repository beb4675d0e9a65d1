"""The state of a run: what it trains, and how far it is."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normlab.config.schema import RunConfig
from normlab.data.datasets import Data
from normlab.data.incremental import TaskSequence
from normlab.probes import Probes
from normlab.training import device
from normlab.training.distributed.process_group import ProcessGroup
from normlab.training.interleaving import Interleaver
from normlab.training.step import TrainingStep

if TYPE_CHECKING:
    from normlab.training.engines import Engine
    from normlab.training.evaluation import Evaluation


@dataclass
class Position:
    """The progress of a run; with the states of network, optimizer, scaler and probes, all that a resume needs.

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


@dataclass
class TrainingState:
    """All that a run trains with, and how far it is.

    Attributes:
        correct: whether each test image was classified correctly at the end of the run, bool (N,) in the order of its
            split, on the host; None before, and where there are no classes.
        evaluations: by part of the data, those made so far.
        peak_memory_before: bytes that earlier processes of the run, or the others of now, needed.
    """

    config: RunConfig
    device: torch.device
    group: ProcessGroup
    interleaver: Interleaver
    data: Data
    step: TrainingStep
    engine: "Engine"
    probes: Probes | None
    position: Position
    memory_format: str
    peak_memory_before: int = 0
    correct: Tensor | None = None
    evaluations: dict[str, "Evaluation"] = field(default_factory=dict)

    @property
    def step_number(self) -> int:
        """The step that comes next, counted from 0."""
        return self.steps_until(self.position.epoch) + self.position.batch

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_until(self.config.epochs)

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(p.numel() for p in self.step.network.parameters() if p.requires_grad)

    def steps_until(self, epoch: int) -> int:
        """Return the number of steps before `epoch`."""
        return epoch * self.data.train.steps

    @property
    def ends_task(self) -> bool:
        """Whether the position's epoch is the last one of a task."""
        tasks = self.data.train.tasks
        return tasks is not None and (self.position.epoch + 1) % tasks.epochs == 0

    @property
    def herding(self) -> TaskSequence | None:
        """The tasks of a run whose network chooses the images that are kept; None of others."""
        tasks = self.data.train.tasks
        return tasks if tasks is not None and tasks.sampler.exemplars == "herding" else None

    def peak_memory(self) -> int:
        """Return the run's highest memory use in bytes, as far as this process knows it."""
        return max(self.peak_memory_before, device.peak_memory_bytes(self.device))

    def update_peak_memory(self) -> None:
        """Take the highest memory use of all processes; they call this together."""
        self.peak_memory_before = self.group.all_reduce_max(self.peak_memory())

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: tensors and plain values."""
        step = self.step
        return {
            "data_fingerprint": self.data.fingerprint,
            "network": step.network.state_dict(),
            "averaged": step.averaged.state_dict() if step.averaged else None,
            "optimizer": step.optimizer.state_dict(),
            "scaler": step.scaler.state_dict(),
            "probes": self.probes.state_dict() if self.probes else {},
            "position": vars(self.position).copy(),
            "threads": torch.get_num_threads(),
            "memory_format": self.memory_format,
            "processes": self.group.world,
            "peak_memory_bytes": self.peak_memory_before,
            **({"exemplar_ranks": self.herding.ranks} if self.herding else {}),
        }
