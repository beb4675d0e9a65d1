"""The drift of scales and shifts."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from normlab.common.registry import register
from normlab.norms import parameter_roles
from normlab.probes.base import Probe, ProbedNetwork, Row
from normlab.probes.snapshot import StepSnapshot


@register("affine")
class AffineDrift(Probe):
    """Scale (gamma) and shift (beta) of every layer that learns one, by the roles of `norms.parameter_roles`.

    Over the channels of a layer: scale_mean, scale_std (population), scale_start = mean |start|, and

        scale_drift = sqrt(mean (now - start)²)

    and the same of the shift, without its start; null for what a layer has not. Where a layer has several of a role
    (EvoNorm's gamma and v), it is the first.
    """

    def __init__(self, probed: ProbedNetwork, **options: Any) -> None:
        super().__init__(probed, **options)
        names = {parameter: name for name, parameter in probed.network.named_parameters()}
        self.names: dict[str, dict[str, str]] = {}  # layer -> role -> parameter
        self.start: dict[str, Tensor] = {}
        for parameter, role, _ in parameter_roles(probed.network):
            layer = names[parameter].rpartition(".")[0]
            if role in ("scale", "shift") and role not in self.names.setdefault(layer, {}):
                self.names[layer][role] = names[parameter]
                self.start[names[parameter]] = parameter.detach().clone()  # training goes on in place

    def measure(self, snapshot: StepSnapshot) -> Iterator[Row]:
        """Yield one row per layer."""
        for position, layer in enumerate(snapshot.in_order(self.names)):
            scale, shift = (self.names[layer].get(role) for role in ("scale", "shift"))
            yield {
                "layer": layer,
                "position": position,
                **self._drift("scale", scale, snapshot.parameters),
                "scale_start": float(self.start[scale].abs().mean()) if scale else None,
                **self._drift("shift", shift, snapshot.parameters),
            }

    def _drift(self, role: str, name: str | None, parameters: dict[str, Tensor]) -> dict[str, float | None]:
        if name is None:
            return {f"{role}_mean": None, f"{role}_std": None, f"{role}_drift": None}
        values, start = parameters[name].double(), self.start[name].to(parameters[name].device).double()
        drift = torch.sqrt((values - start).square().mean())
        mean, std = float(values.mean()), float(values.std(correction=0))
        return {f"{role}_mean": mean, f"{role}_std": std, f"{role}_drift": float(drift)}

    def state_dict(self) -> dict[str, Any]:
        """Return the scales and shifts at the start of the run."""
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the scales and shifts at the start of the run from a `state_dict`.

        Raises:
            ValueError: if it is none of this probe.
        """
        start = state.get("start")
        if not isinstance(start, dict) or start.keys() != self.start.keys():
            raise ValueError("probes.affine has the start of other layers")
        for name, own in self.start.items():
            if not isinstance(start[name], Tensor) or (start[name].shape, start[name].dtype) != (own.shape, own.dtype):
                raise ValueError(f"probes.affine has another start of {name}")
        self.start = start
