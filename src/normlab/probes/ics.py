"""Internal covariate shift by gradients."""

from collections.abc import Iterator

from normlab.common.errors import UserError, nearest
from normlab.config.schema import ICSProbe
from normlab.probes.base import Probe, Row, Subject, dot, evenly, norm
from normlab.probes.snapshot import StepSnapshot


class ICS(Probe[ICSProbe]):
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

    def __init__(self, settings: ICSProbe, subject: Subject) -> None:
        super().__init__(settings, subject)
        if isinstance(settings.layers, list):
            known = [name.removeprefix(subject.prefix) for name in subject.layers()]
            for name in settings.layers:
                if name not in known:
                    raise UserError(
                        f"probe.ics.layers names {name}, which is no convolution or linear layer of this network.\n"
                        f"Nearest: {nearest(name, known) or known[-1]}. A number chooses so many, evenly over depth."
                    )

    def measure(self, moment: StepSnapshot) -> Iterator[Row]:
        layers = self.subject.layers()
        ordered = [name for name in moment.order if name in layers]
        before = moment.parameters
        gradients = moment.here[1]
        after = moment.updated()
        for position in self._positions(ordered):
            layer = ordered[position]
            weight = f"{layer}.weight"
            if weight not in gradients:  # frozen, or shared with a layer of another name
                continue
            earlier = set(moment.order[: moment.order.index(layer)])
            mixed = {name: after[name] if name.rpartition(".")[0] in earlier else before[name] for name in before}
            g, g_after = gradients[weight], moment.gradient(mixed, of=[weight])[1][weight]
            yield {
                "layer": layer,
                "position": position,
                "l2": float(norm(g - g_after)),
                "cosine": float(dot(g, g_after) / (norm(g) * norm(g_after))),
                "gradient_norm": float(norm(g)),
            }

    def _positions(self, ordered: list[str]) -> list[int]:
        """Evenly over the layers that have one before them, or the only one."""
        chosen = self.settings.layers
        if isinstance(chosen, list):
            names = {self.subject.prefix + name for name in chosen}
            return [position for position, name in enumerate(ordered) if name in names]
        if len(ordered) == 1:
            return [0]
        return [1 + place for place in evenly(chosen, len(ordered) - 1)]
