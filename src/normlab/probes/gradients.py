"""Norms of gradients."""

from collections.abc import Iterator

from normlab.config.schema import GradientsProbe
from normlab.probes.base import Probe, Row, norm
from normlab.probes.snapshot import StepSnapshot


class Gradients(Probe[GradientsProbe]):
    """norm = ||dL/dW|| and weight_norm = ||W|| of every convolution and linear layer, for its weight W.

    Of the gradient as backpropagation has it, before clipping, preconditioning and weight decay.
    """

    def measure(self, moment: StepSnapshot) -> Iterator[Row]:
        layers = self.subject.layers()
        parameters, gradients = moment.parameters, moment.here[1]
        for position, layer in enumerate(name for name in moment.order if name in layers):
            weight = f"{layer}.weight"
            if weight in gradients:
                yield {
                    "layer": layer,
                    "position": position,
                    "norm": float(norm(gradients[weight])),
                    "weight_norm": float(norm(parameters[weight])),
                }
