"""Norms of gradients."""

from collections.abc import Iterator

from normlab.common.registry import register
from normlab.probes.base import Probe, Row, norm
from normlab.probes.snapshot import StepSnapshot


@register("gradients")
class GradientNorms(Probe):
    """norm = ||dL/dW|| and weight_norm = ||W|| of every convolution and linear layer, for its weight W.

    Of the gradient as backpropagation has it, before clipping, preconditioning and weight decay.
    """

    def measure(self, snapshot: StepSnapshot) -> Iterator[Row]:
        """Yield one row per layer."""
        parameters, (_, gradients) = snapshot.parameters, snapshot.loss_and_gradient
        for position, layer in enumerate(snapshot.in_order(self.probed.weight_layers())):
            weight = f"{layer}.weight"
            if weight in gradients:
                yield {
                    "layer": layer,
                    "position": position,
                    "norm": float(norm(gradients[weight])),
                    "weight_norm": float(norm(parameters[weight])),
                }
