"""The loss landscape along the gradient."""

from collections.abc import Iterator

import torch

from normlab.config.schema import LandscapeProbe
from normlab.probes.base import Probe, Row, norm
from normlab.probes.snapshot import StepSnapshot


class Landscape(Probe[LandscapeProbe]):
    """Loss, gradient predictiveness and effective beta-smoothness (Santurkar et al. 2018).

    With the plain gradient g at the parameters W, all those that are trained [A], and step lengths eta = reach · lr:

        losses = L(W - eta · g),   loss_low and loss_high: their range over eta
        gradient_differences = ||g - dL/dW(W - eta · g)||,   predictiveness_low and _high: their range
        beta = max over eta of ||g - dL/dW(W - eta · g)|| / (eta · ||g||)

    Invariant: on a quadratic, beta is at most the largest eigenvalue of its Hessian, and equal for every eta.
    """

    def measure(self, moment: StepSnapshot) -> Iterator[Row]:
        loss, g = moment.here
        w = moment.parameters
        etas = [multiple * moment.lr for multiple in self.settings.reach]
        losses, differences = [], []
        for eta in etas:
            there, gradient = moment.gradient({name: w[name] - eta * g[name] for name in w})
            losses.append(there.double())
            differences.append(norm(*(gradient[name] - g[name] for name in g)))
        length = norm(*g.values())
        at, changes = torch.stack(losses), torch.stack(differences)
        beta = (changes / (length * torch.tensor(etas, dtype=torch.float64, device=length.device))).max()
        yield {
            "eta": etas,
            "loss": float(loss),
            "losses": at.tolist(),
            "gradient_differences": changes.tolist(),
            "gradient_norm": float(length),
            "loss_low": float(at.min()),
            "loss_high": float(at.max()),
            "predictiveness_low": float(changes.min()),
            "predictiveness_high": float(changes.max()),
            "beta": float(beta),
        }
