"""The largest eigenvalue of the loss's Hessian."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from normlab.config import SharpnessProbe
from normlab.probes.base import Probe, Row, norm
from normlab.probes.moment import Moment
from normlab.streams import stream

DIFFERENCE = 1e-4  # [A] length of a step that a gradient's change is measured over, relative to the weights' norm


class Top(NamedTuple):
    eigenvalue: float
    iterations: int
    converged: bool


class Sharpness(Probe[SharpnessProbe]):
    """The largest (algebraic) eigenvalue of the Hessian of the loss of the step's batch, by all trained parameters.

    Products of the Hessian and a vector come from a second backward pass. Layers that forbid one (`lp1`, `lp2`,
    `lpinf`) get central differences of the gradient, (g(W + h·v) - g(W - h·v)) / 2h with h = 1e-4 · ||W||, which
    also sees the kinks of ReLU in between. Where the backward pass is not the derivative of the loss (`mabn`,
    `powernorm`) there is no Hessian, and the probe is refused.
    """

    def measure(self, moment: Moment) -> Iterator[Row]:
        parameters = moment.parameters
        size = sum(parameter.numel() for parameter in parameters.values())
        device = moment.images.device
        length = norm(*parameters.values())
        start = torch.randn(size, generator=stream("sharpness")).to(device)
        top = lanczos(_hessian(moment, float(length)), start, self.settings.iterations, self.settings.tolerance)
        yield {**top._asdict(), "weight_norm": float(length)}


def lanczos(multiply: Callable[[Tensor], Tensor], start: Tensor, iterations: int, tolerance: float) -> Top:
    """The largest eigenvalue of a symmetric matrix (n, n) by its products with vectors (n,).

    Lanczos' method without reorthogonalisation: three vectors of memory instead of one per iteration. Rounding makes it
    find some eigenvalues again, which does not harm the largest (Paige 1972). It has converged when the residual of
    the eigenpair, ||A u - theta u|| = beta · |last entry of theta's vector|, is at most `tolerance` · |theta|.
    """
    q, previous = start / start.norm(), torch.zeros_like(start)
    alphas: list[float] = []
    betas: list[float] = []
    theta, converged = float("nan"), False
    while len(alphas) < iterations and not converged:
        w = multiply(q) - (betas[-1] * previous if betas else 0)
        alphas.append(float(torch.dot(w, q)))
        w = w - alphas[-1] * q
        beta = float(w.norm())
        if not torch.tensor([alphas[-1], beta]).isfinite().all():
            return Top(float("nan"), len(alphas), False)
        last = len(alphas) - 1
        values, vectors = eigh_tridiagonal(alphas, betas, select="i", select_range=(last, last))
        theta = float(values[0])
        converged = beta * abs(float(vectors[-1, 0])) <= tolerance * abs(theta)
        if beta == 0:
            break
        betas.append(beta)
        q, previous = w / beta, q
    return Top(theta, len(alphas), converged)


def _hessian(moment: Moment, length: float) -> Callable[[Tensor], Tensor]:
    """v (n,) -> H v (n,)."""
    w = moment.parameters
    sizes = [value.numel() for value in w.values()]

    def unflat(v: Tensor) -> list[Tensor]:
        return [part.view_as(value) for part, value in zip(v.split(sizes), w.values(), strict=True)]

    def differences(v: Tensor) -> Tensor:
        h = DIFFERENCE * length
        ahead, behind = (
            moment.gradient({name: w[name] + sign * h * part for name, part in zip(w, unflat(v), strict=True)})[1]
            for sign in (1, -1)
        )
        return torch.cat([((ahead[name] - behind[name]) / (2 * h)).flatten() for name in w])

    leaves, gradient = moment.differentiable()

    def product(v: Tensor) -> Tensor:
        moment.pulse()
        found = torch.autograd.grad(gradient, leaves, unflat(v), retain_graph=True, materialize_grads=True)
        return torch.cat([part.detach().flatten() for part in found])

    try:
        product(torch.zeros(sum(sizes), device=moment.images.device))
    except RuntimeError as error:
        if "once_differentiable" not in str(error):
            raise
        return differences
    return product
