"""The loss landscape along the gradient."""

from collections.abc import Iterator

import torch

from normlab.common.registry import option, register
from normlab.probes.base import Probe, Row, norm
from normlab.probes.snapshot import StepSnapshot


@register("landscape")
class Landscape(Probe):
    """Loss, gradient predictiveness and effective beta-smoothness (Santurkar et al. 2018).

    With the plain gradient g at the parameters W, all those that are trained [A], and step lengths eta = reach · lr:

        losses = L(W - eta · g),   loss_low and loss_high: their range over eta
        gradient_differences = ||g - dL/dW(W - eta · g)||,   predictiveness_low and _high: their range
        beta = max over eta of ||g - dL/dW(W - eta · g)|| / (eta · ||g||)

    Invariant: on a quadratic, beta is at most the largest eigenvalue of its Hessian, and equal for every eta.
    """

    reach: list[float] = option((0.5, 1.0, 2.0, 4.0), gt=0)

    def measure(self, snapshot: StepSnapshot) -> Iterator[Row]:
        """Yield one row."""
        loss, g = snapshot.loss_and_gradient
        w = snapshot.parameters
        etas = [multiple * snapshot.lr for multiple in self.reach]
        loss_list, difference_list = [], []
        for eta in etas:
            loss_there, gradient = snapshot.gradient({name: w[name] - eta * g[name] for name in w})
            loss_list.append(loss_there.double())
            difference_list.append(norm(*(gradient[name] - g[name] for name in g)))
        length = norm(*g.values())
        losses, differences = torch.stack(loss_list), torch.stack(difference_list)
        beta = (differences / (length * torch.tensor(etas, dtype=torch.float64, device=length.device))).max()
        yield {
            "eta": etas,
            "loss": float(loss),
            "losses": losses.tolist(),
            "gradient_differences": differences.tolist(),
            "gradient_norm": float(length),
            "loss_low": float(losses.min()),
            "loss_high": float(losses.max()),
            "predictiveness_low": float(differences.min()),
            "predictiveness_high": float(differences.max()),
            "beta": float(beta),
        }
