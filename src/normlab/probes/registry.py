"""The probes by name, and those of a run: which of them measure before which step."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from normlab.common.registry import registered
from normlab.config.schema import ProbeConfig
from normlab.probes.base import Probe, ProbedNetwork, Row, evenly_spaced
from normlab.probes.snapshot import StepSnapshot


def probe_classes() -> dict[str, type[Probe]]:
    """Return every probe of this package by the name that it registers."""
    package = importlib.import_module("normlab.probes")
    for module in pkgutil.iter_modules(package.__path__, "normlab.probes."):
        importlib.import_module(module.name)
    return {name: cls for name, (cls, _) in registered(Probe).items()}


class Probes:
    """The probes in `settings`, over a run of `total` steps.

    Args:
        record: called with a probe's name and its rows.

    Raises:
        UserError: for settings that do not fit the network.
    """

    def __init__(
        self,
        settings: Mapping[str, ProbeConfig],
        probed: ProbedNetwork,
        total: int,
        record: Callable[[str, Sequence[Row]], None],
    ) -> None:
        classes = probe_classes()
        self._prefix, self._record, self._settings = probed.prefix, record, settings
        self._probes = {one.name: classes[one.name](probed, **one.options) for one in settings.values()}
        self._steps = {name: frozenset(self._of(name, total)) for name in self._probes}
        self._execution_order: list[str] | None = None

    def due(self, step: int) -> bool:
        """Return whether any probe measures before update number `step` (0-based)."""
        return any(step in steps for steps in self._steps.values())

    def others_before(self, total: int) -> list[str]:
        """Return the probes whose steps below `total` are not those of a run of `total` steps."""
        return [
            name
            for name, steps in self._steps.items()
            if {step for step in steps if step < total} != set(self._of(name, total))
        ]

    def _of(self, name: str, total: int) -> Iterable[int]:
        return self._probes[name].steps(_chosen_steps(self._settings[name], total), total)

    def measure(self, snapshot: StepSnapshot) -> None:
        """Let each probe that is due measure, and record its rows. Global random numbers are left as they were."""
        device = snapshot.images.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if self._execution_order is None:
                self._execution_order = snapshot.execution_order
            snapshot.execution_order = self._execution_order
            for name, probe in self._probes.items():
                if snapshot.step in self._steps[name]:
                    rows = [self._recorded(snapshot.step, row) for row in probe.measure(snapshot)]
                    if rows:  # an arm may have nothing to measure, e.g. no scale and no shift
                        self._record(name, rows)

    def _recorded(self, step: int, row: Row) -> Row:
        if "layer" in row:
            row = {**row, "layer": row["layer"].removeprefix(self._prefix)}
        return {"step": step, **{key: _rounded(value) for key, value in row.items()}}

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all probes, by name."""
        return {name: probe.state_dict() for name, probe in self._probes.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let all probes go on from a `state_dict`.

        Raises:
            ValueError: if it is none of theirs.
        """
        if state.keys() != self._probes.keys():
            raise ValueError("probes are others")
        for name, probe in self._probes.items():
            probe.load_state_dict(state[name])


def _rounded(value: Any) -> Any:
    """Round numbers to the seven significant digits that float32 has, which halves a record."""
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _chosen_steps(settings: ProbeConfig, total: int) -> list[int]:
    if settings.steps is not None:
        return [step for step in settings.steps if step < total]
    assert settings.times is not None
    return evenly_spaced(settings.times, total)
