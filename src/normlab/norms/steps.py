"""The work of layers around an optimization step, and the roles of their parameters for an optimizer."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normlab.norms.adapter import FullPrecision
from normlab.norms.layer_statistics import BatchStatistics, move_averages

Role = Literal["weight", "scale", "shift", "bias"]
WEIGHT_LAYERS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


class Clock(FullPrecision):
    """The progress of a run, for layers that change in its course; all layers of a variant share one.

    Args:
        unit: "fraction": `now` is the fraction of the run that is done, in [0, 1); "steps": the number of steps.
        others: returns further scalars for the layers, by name, from `now` and `end`: computed once for all of them.

    Attributes:
        now, end: the time before and after the step under way; 0 until a training loop calls `at_step`. They are
            float32 scalars on the layers' device, as the others are.
    """

    now: Tensor
    end: Tensor

    def __init__(self, unit: str, others: Callable[[float, float], dict[str, float]] | None = None) -> None:
        super().__init__()
        self.unit, self.others = unit, others
        for name, value in self._values(0.0, 0.0).items():
            self.register_buffer(name, torch.tensor(value), persistent=name == "now")

    def _values(self, now: float, end: float) -> dict[str, float]:
        return {"now": now, "end": end} | (self.others(now, end) if self.others else {})

    def at_step(self, step: int, steps: int) -> None:
        """Set the time to before `step` (0-based) of `steps`."""
        scale = 1 if self.unit == "steps" else steps
        self._set(step / scale, (step + 1) / scale)

    def _set(self, now: float, end: float) -> None:
        for name, value in self._values(now, end).items():
            self.get_buffer(name).fill_(value)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if not self.now.is_meta:
            self._set(float(self.now), float(self.now))  # no record has more than `now`


class Steps:
    """Calls `at_step(step, steps)` of the modules that have it before a step (0-based), `after_step()` after it.

    Between `start` and `end` layers leave their moving averages to `end`, which moves all in a few operations; in any
    other forward pass each layer moves its own.
    """

    def __init__(self, network: nn.Module) -> None:
        modules: list[Any] = list(network.modules())
        self._layers = [module for module in modules if isinstance(module, BatchStatistics)]
        self._others = [module for module in modules if hasattr(module, "at_step") and not isinstance(module, Clock)]
        self._before = [module.at_step for module in modules if hasattr(module, "at_step")]
        self._after = [module.after_step for module in modules if hasattr(module, "after_step")]

    def begin(self, step: int, steps: int) -> None:
        """Call before each training step."""
        for at_step in self._before:
            at_step(step, steps)

    def python_numbers(self) -> list[dict[str, Any]]:
        """Return the numbers, flags and texts of Python that modules with `at_step` have, but for a `Clock`."""
        plain = (bool, int, float, str)
        return [{key: value for key, value in vars(each).items() if isinstance(value, plain)} for each in self._others]

    def start(self) -> None:
        """Call before the forward pass of a step, if the averages shall move together."""
        for layer in self._layers:
            layer.alone, layer.pending = False, None

    def end(self, again: Callable[[], object] | None = None) -> None:
        """Call after each training step.

        Args:
            again: forwards the step's batch once more, for layers that keep its statistics as they are after the
                update (mbn_style). Without it they keep those of the step's forward pass.
        """
        if again is not None and any(layer.forwards_again for layer in self._layers):
            self._forward_again(again)
        move_averages(self._layers)
        for layer in self._layers:
            layer.alone = True
        for after_step in self._after:
            after_step()

    def _forward_again(self, again: Callable[[], object]) -> None:
        """Let layers note statistics anew, but for those that do not want it, whose averages stay where they are."""
        others = [(layer, layer.pending, layer.momentum) for layer in self._layers if not layer.forwards_again]
        for layer in self._layers:
            layer.pending = None
        for layer, *_ in others:
            layer.momentum = 0.0
        with torch.no_grad():
            again()
        for layer, pending, momentum in others:
            layer.pending, layer.momentum = pending, momentum


def parameter_roles(network: nn.Module) -> Iterator[tuple[nn.Parameter, Role, float]]:
    """Yield each trainable parameter once, with its role and the divisor of its learning rate.

    By the type of the owning module: shapes and names misfile a 1-output Linear or a 1-channel norm. A module may
    name the roles of parameters of its own in `roles`, e.g. ``{"g": "scale"}``, their divisors in `lr_divisors`, and
    those that decay whatever their role in `decays` (`decayed_parameters`). Otherwise convolutions and linear layers
    have weight and bias; elsewhere what is called bias is a shift, all else a scale.
    """
    seen: set[nn.Parameter] = set()
    for module in network.modules():
        own: dict[str, Role] = getattr(module, "roles", {})
        divisors: dict[str, float] = getattr(module, "lr_divisors", {})
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:  # shared between modules, or frozen
                continue
            seen.add(parameter)
            usual: Role
            if isinstance(module, WEIGHT_LAYERS):
                usual = "bias" if name == "bias" else "weight"
            else:
                usual = "shift" if name == "bias" else "scale"
            yield parameter, own.get(name, usual), divisors.get(name, 1.0)


def decayed_parameters(network: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that decay as weights do, whatever their role: those that a module names in `decays`."""
    return {
        parameter
        for module in network.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name in getattr(module, "decays", ())
    }
