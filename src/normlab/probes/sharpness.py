"""The largest eigenvalue of the loss's Hessian."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor, nn
from torch.autograd.graph import Node

from normlab.common.errors import UserError
from normlab.common.registry import option, register
from normlab.common.rng import stream
from normlab.norms.lp import LpNorm2d
from normlab.probes.base import Probe, Row, norm
from normlab.probes.snapshot import StepSnapshot


class LanczosResult(NamedTuple):
    """The largest eigenvalue, the number of products it took, and whether the residual is small enough."""

    eigenvalue: float
    iterations: int
    converged: bool


@register("sharpness", defaults={"times": 5})
class Sharpness(Probe):
    """The largest (algebraic) eigenvalue of the Hessian of the loss of the step's batch, by all trained parameters.

    Products of the Hessian and a vector come from a second backward pass through the first, so that the kinks of ReLU
    count for nothing, and what the gradient takes for constant (batch renormalization's r and d) is constant. Where the
    backward pass is not the derivative of the loss (`mabn`, `powernorm`) there is no Hessian: the probe is refused.
    """

    iterations: int = option(30, ge=2)
    tolerance: float = option(0.01, gt=0, lt=1)

    def measure(self, snapshot: StepSnapshot) -> Iterator[Row]:
        """Yield one row."""
        parameters = snapshot.parameters.values()
        size = sum(parameter.numel() for parameter in parameters)
        like = next(iter(parameters))
        start = torch.randn(size, generator=stream("sharpness"), dtype=like.dtype).to(like.device)
        largest = lanczos(hessian(snapshot), start, self.iterations, self.tolerance)
        yield {**largest._asdict(), "weight_norm": float(norm(*parameters))}


def lanczos(multiply: Callable[[Tensor], Tensor], start: Tensor, iterations: int, tolerance: float) -> LanczosResult:
    """Compute the largest eigenvalue of a symmetric matrix (n, n) by its products with vectors (n,).

    Lanczos' method without reorthogonalization: three vectors of memory instead of one per iteration. Rounding makes
    some eigenvalues come twice, which does not harm the largest (Paige 1972). It has converged when the residual of
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
            return LanczosResult(float("nan"), len(alphas), False)
        last = len(alphas) - 1
        values, vectors = eigh_tridiagonal(alphas, betas, select="i", select_range=(last, last))
        theta = float(values[0])
        converged = beta * abs(float(vectors[-1, 0])) <= tolerance * abs(theta)
        if beta == 0:
            break
        betas.append(beta)
        q, previous = w / beta, q
    return LanczosResult(theta, len(alphas), converged)


def hessian(snapshot: StepSnapshot) -> Callable[[Tensor], Tensor]:
    """Return v -> H v for the Hessian H of the loss by all trained parameters, in their order, as one vector (n,).

    Raises:
        UserError: if a layer's backward pass cannot be differentiated.
    """
    with _twice_differentiable(snapshot.network):
        leaves, gradients = snapshot.differentiable_gradient()
    _check_differentiable(gradients)
    sizes = [leaf.numel() for leaf in leaves]

    def product(v: Tensor) -> Tensor:
        snapshot.on_evaluation()
        parts = [part.view_as(leaf) for part, leaf in zip(torch.split(v, sizes), leaves, strict=True)]
        products = torch.autograd.grad(gradients, leaves, parts, retain_graph=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in products])

    return product


def _check_differentiable(gradients: list[Tensor]) -> None:
    """Refuse a backward pass that is marked as once_differentiable.

    PyTorch raises an error where it is reached, but does not go there for the sake of given leaves, and leaves it out
    of their second derivatives without a warning.
    """
    nodes: list[Node | None] = [gradient.grad_fn for gradient in gradients]
    seen: set[Node] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("Error"):
            raise UserError(
                "probe=sharpness needs second derivatives, which a layer of this network forbids (PyTorch's"
                " once_differentiable).\nUse another norm or network, or other probes."
            )
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]


@contextmanager
def _twice_differentiable(network: nn.Module) -> Iterator[None]:
    """Let Lp norms compute as they do over several processes: by operations that can be differentiated twice."""
    layers = [module for module in network.modules() if isinstance(module, LpNorm2d) and not module.synchronized]
    for layer in layers:
        layer.synchronized = True
    try:
        yield
    finally:
        for layer in layers:
            layer.synchronized = False
