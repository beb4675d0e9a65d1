"""The probes of a run: which of them measure before which step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from normlab.config.schema import ProbeConfig
from normlab.probes.activations import Activations
from normlab.probes.affine import Affine
from normlab.probes.base import Probe, Row, Subject, evenly
from normlab.probes.gradients import Gradients
from normlab.probes.ics import ICS
from normlab.probes.landscape import Landscape
from normlab.probes.sharpness import Sharpness
from normlab.probes.snapshot import StepSnapshot

KINDS: dict[str, type[Probe[Any]]] = {
    "ics": ICS,
    "landscape": Landscape,
    "activations": Activations,
    "affine": Affine,
    "gradients": Gradients,
    "sharpness": Sharpness,
}


class Probes:
    """The probes that `settings` ask for, over a run of `total` steps.

    Args:
        record: is given a probe's name and its rows.

    Raises:
        UserError: for settings that do not fit the network.
    """

    def __init__(
        self,
        settings: Mapping[str, ProbeConfig],
        subject: Subject,
        total: int,
        record: Callable[[str, Sequence[Row]], None],
    ) -> None:
        self._probes = {one.name: KINDS[one.name](one, subject) for one in settings.values()}
        self._prefix, self._record = subject.prefix, record
        self._steps = {
            one.name: frozenset(self._probes[one.name].steps(_chosen(one, total), total)) for one in settings.values()
        }
        self._order: list[str] | None = None

    def due(self, step: int) -> bool:
        """Whether any of them measures before update number `step` (0-based)."""
        return any(step in steps for steps in self._steps.values())

    def measure(self, moment: StepSnapshot) -> None:
        """Let each that is due measure, and record its rows. Global random numbers are left as they were."""
        device = moment.images.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if self._order is None:
                self._order = moment.executed()
            moment.order = self._order
            for name, probe in self._probes.items():
                if moment.step in self._steps[name]:
                    rows = [self._row(moment.step, found) for found in probe.measure(moment)]
                    if rows:  # an arm may have nothing to measure, e.g. no scale and no shift
                        self._record(name, rows)

    def _row(self, step: int, found: Row) -> Row:
        if "layer" in found:
            found = {**found, "layer": found["layer"].removeprefix(self._prefix)}
        return {"step": step, **{key: _rounded(value) for key, value in found.items()}}

    def state_dict(self) -> dict[str, Any]:
        return {name: probe.state_dict() for name, probe in self._probes.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, probe in self._probes.items():
            probe.load_state_dict(state[name])


def _rounded(value: Any) -> Any:
    """Numbers to the seven significant digits that float32 has, which halves a record."""
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _chosen(settings: ProbeConfig, total: int) -> list[int]:
    if settings.steps is not None:
        return [step for step in settings.steps if step < total]
    assert settings.times is not None
    return evenly(settings.times, total)
