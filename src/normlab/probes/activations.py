"""What goes into the norms of a network and what comes out."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from normlab.common.rng import key
from normlab.config.schema import ActivationsProbe
from normlab.norms.layer_statistics import full_precision
from normlab.probes.base import Probe, Row, Subject, evenly
from normlab.probes.snapshot import StepSnapshot

LARGE = 3.0  # [A] standard deviations beyond which a value counts as large
RANGE = 5.0  # [A] standard deviations of the first measurement that a histogram reaches to either side


class Activations(Probe[ActivationsProbe]):
    """Moments of each site's norm, for its input x and output y (N, C, H, W), in the training step's forward pass.

    A norm is whatever stands at the site: in an arm without one x = y is what the convolution gives; in one that joins
    norm and activation, y is the activation. With moments m_k = mean (y - mean y)^k per channel over N, H and W:

        mean = mean y,   variance = m_2,   skewness = m_3 / m_2^(3/2)     each then averaged over the channels
                                                                          (skewness: over those that vary)
        large = share of |y| > 3,   large_normalised = share of |x - mean x| / std x > 3, per channel
        output_norm = sqrt(mean x²)                       of the convolution's output, over all values

    `histogram` counts the values of y of one channel, drawn by the layer's name, of a few layers, between `edges`:
    from -5 to 5 standard deviations about the mean at the run's first measurement. What is beyond counts as in the
    outermost bins.
    """

    def __init__(self, settings: ActivationsProbe, subject: Subject) -> None:
        super().__init__(settings, subject)
        self.watched = {subject.sites[place] for place in evenly(settings.histograms, len(subject.sites))}
        self.edges: dict[str, list[float]] = {}

    def steps(self, chosen: Iterable[int], total: int) -> Iterable[int]:
        """Pairs: each step and the one after it; of the last step, the one before it."""
        first = {min(step, max(total - 2, 0)) for step in chosen}
        return {step for s in first for step in (s, s + 1) if step < total}

    def measure(self, moment: StepSnapshot) -> Iterator[Row]:
        found: dict[str, Row] = {}
        order = [name for name in moment.order if name in self.subject.sites]

        def note(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # At once: the activation that follows may work in place.
            found[name] = {"layer": name, "position": order.index(name), **_moments(inputs[0], output)}
            found[name] |= self._histogram(name, output)

        handles = [
            moment.network.get_submodule(name).register_forward_hook(
                lambda _, inputs, output, name=name: note(name, inputs, output)
            )
            for name in order
        ]
        moment.look(handles)
        for name in order:
            yield found[name]

    def _histogram(self, name: str, output: Tensor) -> Row:
        if name not in self.watched:
            return {"histogram": None, "edges": None}
        values = full_precision(output[:, key("histogram", name.removeprefix(self.subject.prefix)) % output.shape[1]])
        if name not in self.edges:
            mean, reach = float(values.mean()), RANGE * float(values.std(correction=0))
            grid = torch.linspace(-1, 1, self.settings.bins + 1, dtype=torch.float64)
            edges = (mean + (reach or 1.0) * grid).tolist()
            if not torch.tensor(edges).isfinite().all():
                return {"histogram": None, "edges": None}
            self.edges[name] = edges
        edges = self.edges[name]
        finite = values[values.isfinite()].double()
        inner = torch.tensor(edges[1:-1], dtype=torch.float64, device=values.device)
        counts = torch.bincount(torch.bucketize(finite, inner, right=True), minlength=len(edges) - 1)
        return {"histogram": counts.tolist(), "edges": edges}

    def state_dict(self) -> dict[str, Any]:
        return {"edges": self.edges}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.edges = state["edges"]


def _moments(x: Tensor, y: Tensor) -> Row:
    x, y = full_precision(x), full_precision(y)
    over = (0, *range(2, y.dim()))
    mean = y.mean(over, keepdim=True)
    centred = y - mean
    square = centred.square()
    variance = square.mean(over)
    skewness = (square * centred).mean(over) / variance**1.5
    deviation = x - x.mean(over, keepdim=True)
    large = deviation.square() > LARGE**2 * deviation.square().mean(over, keepdim=True)
    return {
        "mean": float(mean.mean()),
        "variance": float(variance.mean()),
        "skewness": float(skewness[variance > 0].mean()),
        "large": float((y.abs() > LARGE).double().mean()),
        "large_normalised": float(large.double().mean()),
        "output_norm": float(x.square().mean().sqrt()),
    }
