"""The state of a run: what it trains, and how far it is."""

from dataclasses import dataclass
from typing import Any

import torch

from normlab.config.schema import RunConfig
from normlab.data.datasets import Data
from normlab.probes import Probes
from normlab.training import device
from normlab.training.distributed.group import ProcessGroup
from normlab.training.engines import Engine
from normlab.training.interleaving import Interleaver
from normlab.training.position import Position
from normlab.training.step import TrainingStep


@dataclass
class TrainingState:
    """All that a run trains with, and how far it is.

    Attributes:
        peak_memory_before: bytes that earlier processes of the run, or the others of now, needed.
    """

    config: RunConfig
    device: torch.device
    group: ProcessGroup
    interleaver: Interleaver
    data: Data
    step: TrainingStep
    engine: Engine
    probes: Probes | None
    position: Position
    memory_format: str
    peak_memory_before: int = 0

    @property
    def step_number(self) -> int:
        """The step that comes next, counted from 0."""
        return self.steps_until(self.position.epoch) + self.position.batch

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_until(self.config.epochs)

    def steps_until(self, epoch: int) -> int:
        """Return the number of steps before `epoch`."""
        return epoch * self.data.train.steps

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
        }
