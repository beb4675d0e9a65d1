"""How far scales and shifts have moved."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from normlab.config.schema import AffineProbe
from normlab.norms import parameter_roles
from normlab.probes.base import Probe, Row, Subject
from normlab.probes.snapshot import StepSnapshot


class Affine(Probe[AffineProbe]):
    """Scale (gamma) and shift (beta) of every layer that learns one, by the roles of `norms.parameter_roles`.

    Over the channels of a layer: scale_mean, scale_std (population), scale_start = mean |start|, and

        scale_drift = sqrt(mean (now - start)²)

    and the same of the shift, without its start; null for what a layer has not. Where a layer has several of a role
    (EvoNorm's gamma and v), it is the first.
    """

    def __init__(self, settings: AffineProbe, subject: Subject) -> None:
        super().__init__(settings, subject)
        names = {parameter: name for name, parameter in subject.network.named_parameters()}
        self.names: dict[str, dict[str, str]] = {}  # layer -> role -> parameter
        for parameter, role, _ in parameter_roles(subject.network):
            if role in ("scale", "shift"):
                name = names[parameter]
                self.names.setdefault(name.rpartition(".")[0], {}).setdefault(role, name)
        chosen = {name for roles in self.names.values() for name in roles.values()}
        # Copies, for training goes on in place.
        self.start = {name: p.detach().clone() for p, name in names.items() if name in chosen}

    def measure(self, moment: StepSnapshot) -> Iterator[Row]:
        now = moment.parameters
        for position, layer in enumerate(name for name in moment.order if name in self.names):
            roles = self.names[layer]
            scale, shift = (self._moved(now, roles.get(role)) for role in ("scale", "shift"))
            start = self.start[roles["scale"]].abs().mean().item() if "scale" in roles else None
            yield {
                "layer": layer,
                "position": position,
                **{f"scale_{key}": value for key, value in scale.items()},
                "scale_start": start,
                **{f"shift_{key}": value for key, value in shift.items()},
            }

    def _moved(self, now: dict[str, Tensor], name: str | None) -> dict[str, float | None]:
        if name is None:
            return {"mean": None, "std": None, "drift": None}
        values, start = now[name].double(), self.start[name].to(now[name].device).double()
        drift = torch.sqrt((values - start).square().mean())
        return {"mean": float(values.mean()), "std": float(values.std(correction=0)), "drift": float(drift)}

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["start"]
