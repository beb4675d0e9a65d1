"""What every probe is."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from normlab.norms.steps import WEIGHT_LAYERS
from normlab.probes.snapshot import StepSnapshot

Settings = TypeVar("Settings")
Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is measured: a network at its start, and where its norms are, or would be without a variant.

    Layers are called in rows as they are in the base network, so that arms can be compared: `prefix` is what a wrapper
    has put before their names.
    """

    network: nn.Module
    sites: tuple[str, ...] = ()  # names of the norms, in order of execution
    prefix: str = ""

    def layers(self) -> dict[str, nn.Module]:
        """Every convolution and linear layer, by its name in the network."""
        return {name: module for name, module in self.network.named_modules() if isinstance(module, WEIGHT_LAYERS)}


class Probe(Generic[Settings]):
    """One measurement. A probe is made before the first step, and again when a run is resumed.

    It may keep what it has seen in the plain values and tensors of `state_dict`, which a checkpoint holds.
    """

    def __init__(self, settings: Settings, subject: Subject) -> None:
        """
        Raises:
            UserError: for settings that do not fit the network.
        """
        self.settings, self.subject = settings, subject

    def steps(self, chosen: Iterable[int], total: int) -> Iterable[int]:
        """The steps to measure before, of a run of `total`, given those that its settings choose."""
        return chosen

    def measure(self, moment: StepSnapshot) -> Iterator[Row]:
        """What it finds, without the step: one row, or one per layer (`layer`: its name in the network, `position`)."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` said."""


def norm(*tensors: Tensor) -> Tensor:
    """The Euclidean norm of all their values together, in float64: a scalar."""
    return torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]).norm()


def dot(one: Tensor, other: Tensor) -> Tensor:
    """Their inner product as flat vectors, in float64: a scalar."""
    return torch.dot(one.double().flatten(), other.double().flatten())


def evenly(count: int, places: int) -> list[int]:
    """`count` of the numbers 0 ... places - 1 (or all of them, if fewer), evenly, first and last among them."""
    count = min(count, places)
    if count < 2:
        return list(range(count))
    return [round(i * (places - 1) / (count - 1)) for i in range(count)]
