"""Internal covariate shift by gradients."""

from collections.abc import Iterator
from typing import Any

from normlab.common.errors import UserError, nearest
from normlab.common.registry import option, register
from normlab.probes.base import Probe, ProbedNetwork, Row, dot, evenly_spaced, norm
from normlab.probes.snapshot import StepSnapshot


@register("ics")
class ICS(Probe):
    """Internal covariate shift of a layer (Santurkar et al. 2018, its definition by gradients).

    For layer i with weight W_i, on the batch of the step:

        G = dL/dW_i at the current parameters
        G' = dL/dW_i after the layers before i, and only they, took their step
        l2 = ||G - G'||,   cosine = <G, G'> / (||G|| ||G'||),   gradient_norm = ||G||

    Layers are convolutions and linear layers in order of execution; before layer i are all parameters of modules whose
    call ends before that of i, those of norms among them. Their step is the very one that the run will make [A: the
    paper has plain SGD]: optimizer, momentum, clipping, what layers do after a step. W_i is the weight without
    bias or gain, which not all arms have [A].
    Invariant: for the first layer l2 = 0.
    """

    layers: int | list[str] = option(5, names=True)

    def __init__(self, probed: ProbedNetwork, **options: Any) -> None:
        super().__init__(probed, **options)
        known = [name.removeprefix(probed.prefix) for name in probed.weight_layers()]
        for name in self.layers if isinstance(self.layers, list) else ():
            if name not in known:
                raise UserError(
                    f"probe.ics.layers names {name}, which is no convolution or linear layer of this network.\n"
                    f"Nearest: {nearest(name, known) or known[-1]}. A number chooses so many, evenly over depth."
                )

    def measure(self, snapshot: StepSnapshot) -> Iterator[Row]:
        """Yield one row per chosen layer."""
        layers = snapshot.in_order(self.probed.weight_layers())
        before, after = snapshot.parameters, snapshot.updated()
        _, gradients = snapshot.loss_and_gradient
        for position in self._positions(layers):
            layer = layers[position]
            weight = f"{layer}.weight"
            if weight not in gradients:  # frozen, or shared with a layer of another name
                continue
            earlier = set(snapshot.execution_order[: snapshot.execution_order.index(layer)])
            mixed = {name: after[name] if name.rpartition(".")[0] in earlier else before[name] for name in before}
            g, g_after = gradients[weight], snapshot.gradient(mixed, of=[weight])[1][weight]
            yield {
                "layer": layer,
                "position": position,
                "l2": float(norm(g - g_after)),
                "cosine": float(dot(g, g_after) / (norm(g) * norm(g_after))),
                "gradient_norm": float(norm(g)),
            }

    def _positions(self, layers: list[str]) -> list[int]:
        """Choose evenly among the layers that have one before them, or the only one, or those of the chosen names."""
        if isinstance(self.layers, list):
            names = {self.probed.prefix + name for name in self.layers}
            return [position for position, name in enumerate(layers) if name in names]
        if len(layers) == 1:
            return [0]
        return [1 + place for place in evenly_spaced(self.layers, len(layers) - 1)]
