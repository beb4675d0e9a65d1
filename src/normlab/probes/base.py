"""The base class of the probes, and arithmetic that several of them need."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normlab.common.registry import option, options_of
from normlab.norms.steps import WEIGHT_LAYERS
from normlab.probes.snapshot import StepSnapshot

Row = dict[str, Any]


@dataclass(frozen=True)
class ProbedNetwork:
    """A network at its start, and where its norms are, or would be without a variant.

    Layers are called in rows as they are in the base network, so that arms can be compared.

    Attributes:
        sites: names of the norms, in order of execution.
        prefix: of the base network's names in a wrapper around it.
    """

    network: nn.Module
    sites: tuple[str, ...] = ()
    prefix: str = ""

    def weight_layers(self) -> list[str]:
        """Return the names in the network of every convolution and linear layer."""
        return [name for name, module in self.network.named_modules() if isinstance(module, WEIGHT_LAYERS)]


class Probe:
    """One measurement. A probe is made before the first step, and again when a run is resumed.

    Its options, declared by `option` in its class, are attributes of the same names. What it keeps between measurements
    are plain values and tensors in `state_dict`, which a checkpoint holds.

    Raises:
        UserError: for options that do not fit the network.
    """

    times: int = option(20, ge=1)  # measurements, evenly over a run, unless `steps` of the settings says when

    def __init__(self, probed: ProbedNetwork, **options: Any) -> None:
        self.probed = probed
        for name, declared in options_of(type(self)).items():
            setattr(self, name, options.get(name, declared.default))

    def steps(self, chosen: Iterable[int], total: int) -> Iterable[int]:
        """Return the steps to measure before, of a run of `total`, given those that its settings choose."""
        return chosen

    def measure(self, snapshot: StepSnapshot) -> Iterator[Row]:
        """Yield rows without the step: one, or one per layer (`layer`: its name in the network, `position`)."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what later measurements depend on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: if it is none of this probe.
        """
        if state:
            raise ValueError("probes have an unknown state")


def norm(*tensors: Tensor) -> Tensor:
    """Return the Euclidean norm of all values together, in float64: a scalar."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    length: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return length


def dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner product as flat vectors, in float64: a scalar."""
    return torch.dot(one.double().flatten(), other.double().flatten())


def evenly_spaced(count: int, total: int) -> list[int]:
    """Return `count` of the numbers 0 ... total - 1 (or all of them, if fewer), first and last among them."""
    count = min(count, total)
    if count < 2:
        return list(range(count))
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]
