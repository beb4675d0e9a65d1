"""Statistics of the inputs and outputs of the norms of a network."""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normlab.common.registry import option, register
from normlab.common.rng import key
from normlab.norms.layer_statistics import full_precision
from normlab.probes.base import Probe, ProbedNetwork, Row, evenly_spaced
from normlab.probes.snapshot import StepSnapshot

LARGE = 3.0  # [A] standard deviations beyond which a value counts as large
SUMMED = 2**16  # features that are in float64 at a time
RANGE = 5.0  # [A] standard deviations of the first measurement that a histogram reaches to either side


@register("activations")
class Activations(Probe):
    """Moments of each site's norm, for its input x and output y (N, C, H, W), in the training step's forward pass.

    A norm is whatever stands at the site: in an arm without one x = y is the output of the convolution; in one that
    joins norm and activation, y is the activation. With moments m_k = mean (y - mean y)^k per channel over N, H and W:

        mean = mean y,   variance = m_2,   skewness = m_3 / m_2^(3/2)     each then averaged over the channels
                                                                          (skewness: over those that vary)
        large = share of |y| > 3,   large_normalised = share of |x - mean x| / std x > 3, per channel
        output_norm = sqrt(mean x²)                       of the convolution's output, over all values

    With A (N, C·H·W), a row per sample, the values of y as they are, not centered, and a_n its rows:

        sample_cosine = mean over pairs n != m of a_n · a_m / (|a_n| |a_m|), of the samples that are not all zero:
            its rise is feature condensation (Wang et al. 2023, 2311.15993; Lubana et al. 2021, 2106.05956)
        stable_rank = |A|_F² / |A|_2² = trace G / largest eigenvalue of G,   G = A·A^T (N, N); from 1 to N

    `histogram` counts the values of y of one channel, drawn by the layer's name, of a few layers, between `edges`:
    from -5 to 5 standard deviations about the mean at the run's first measurement. What is beyond counts as in the
    outermost bins.
    """

    histograms: int = option(3, ge=0)
    bins: int = option(50, ge=3)

    def __init__(self, probed: ProbedNetwork, **options: Any) -> None:
        super().__init__(probed, **options)
        self.histogram_layers = {probed.sites[place] for place in evenly_spaced(self.histograms, len(probed.sites))}
        self.edges: dict[str, list[float]] = {}

    def steps(self, chosen: Iterable[int], total: int) -> Iterable[int]:
        """Return pairs: each chosen step and the one after it; of the last step, the one before it."""
        first = {min(step, max(total - 2, 0)) for step in chosen}
        return {step for s in first for step in (s, s + 1) if step < total}

    def measure(self, snapshot: StepSnapshot) -> Iterator[Row]:
        """Yield one row per site."""
        rows: dict[str, Row] = {}
        layers = snapshot.in_order(self.probed.sites)

        def record(layer: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # At once: the activation that follows may work in place.
            rows[layer] = {"layer": layer, "position": layers.index(layer), **_moments(inputs[0], output)}
            rows[layer] |= _between_samples(output) | self._histogram(layer, output)

        snapshot.forward_with_hooks({layer: partial(record, layer) for layer in layers})
        yield from (rows[layer] for layer in layers)

    def _histogram(self, layer: str, output: Tensor) -> Row:
        if layer not in self.histogram_layers:
            return {"histogram": None, "edges": None}
        values = full_precision(output[:, key("histogram", layer.removeprefix(self.probed.prefix)) % output.shape[1]])
        if layer not in self.edges:
            mean, reach = float(values.mean()), RANGE * float(values.std(correction=0))
            grid = torch.linspace(-1, 1, self.bins + 1, dtype=torch.float64)
            candidates = mean + (reach or 1.0) * grid
            if not candidates.isfinite().all():
                return {"histogram": None, "edges": None}
            self.edges[layer] = candidates.tolist()
        edges = self.edges[layer]
        finite = values[values.isfinite()].double()
        inner = torch.tensor(edges[1:-1], dtype=torch.float64, device=values.device)
        counts = torch.bincount(torch.bucketize(finite, inner, right=True), minlength=len(edges) - 1)
        return {"histogram": counts.tolist(), "edges": edges}

    def state_dict(self) -> dict[str, Any]:
        """Return the edges of the histograms."""
        return {"edges": self.edges}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the edges of the histograms from a `state_dict`.

        Raises:
            ValueError: if it is none of this probe.
        """
        edges = state.get("edges")
        if not isinstance(edges, dict) or not edges.keys() <= self.histogram_layers:
            raise ValueError("probes.activations has the edges of other layers")
        for each in edges.values():
            if not isinstance(each, list) or len(each) != self.bins + 1 or {type(edge) for edge in each} != {float}:
                raise ValueError("probes.activations has other edges")
            if not all(map(math.isfinite, each)) or each != sorted(each):
                raise ValueError("probes.activations has edges out of order")
        self.edges = edges


def _between_samples(y: Tensor) -> Row:
    """Return `sample_cosine` and `stable_rank` of y (N, ...); nan where they are not defined."""
    parts = torch.split(y.flatten(1), SUMMED, 1)
    gram = (
        torch.stack([part.double() @ part.double().T for part in parts]).sum(0).cpu()
    )  # float64, which autocast leaves alone
    if not gram.isfinite().all():
        return {"sample_cosine": math.nan, "stable_rank": math.nan}
    gram = gram[gram.diagonal() > 0][:, gram.diagonal() > 0]  # samples of zeros have no direction and no part in A
    samples, unit = len(gram), gram.diagonal().rsqrt()
    pairs = samples * (samples - 1)
    return {
        "sample_cosine": float((unit @ gram @ unit - samples) / pairs) if pairs else math.nan,
        "stable_rank": float(gram.trace() / torch.linalg.eigvalsh(gram)[-1]) if samples else math.nan,
    }


def _moments(x: Tensor, y: Tensor) -> Row:
    x, y = full_precision(x), full_precision(y)
    over = (0, *range(2, y.dim()))
    mean = y.mean(over, keepdim=True)
    centered = y - mean
    square = centered.square()
    variance = square.mean(over)
    skewness = (square * centered).mean(over) / variance**1.5
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
