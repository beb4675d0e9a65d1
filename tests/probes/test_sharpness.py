"""The largest eigenvalue of the Hessian: known ones, dense Hessians, and another way to multiply by them."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from probes.snapshots import rows, snapshot, squared
from small import SmallResNet
from torch import Tensor, nn

from normlab import models
from normlab.common.errors import UserError
from normlab.norms import Steps
from normlab.probes.sharpness import Sharpness, hessian, lanczos

NORMS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "norm").glob("*.yaml"))
WITHOUT_HESSIAN = ("mabn", "powernorm", "online")


PRECISE = {"iterations": 100, "tolerance": 1e-10}


def test_a_quadratic_has_the_eigenvalues_that_were_planted() -> None:
    """L = sum ||W x - t||² has the Hessian 2 X^T X once per output; X = diag(sqrt(d / 2)) Q gives Q^T diag(d) Q."""
    q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    x = torch.tensor([7.0, 3.0, 1.0, 0.5], dtype=torch.float64).div(2).sqrt()[:, None] * q
    network = nn.Linear(4, 2, bias=False).double()
    at = snapshot(network, x, torch.zeros(4, 2, dtype=torch.float64), criterion=squared)
    [found] = rows(Sharpness, at, network, **PRECISE)
    assert found["eigenvalue"] == pytest.approx(7, rel=1e-9)
    assert found["converged"]
    assert found["iterations"] <= 5  # as many as there are eigenvalues, and rounding
    assert found["weight_norm"] == pytest.approx(network.weight.norm().item())


@pytest.mark.parametrize("diagonal", [[1.0, -10.0, 0.2, -3.0], [-1.0, -2.0, -30.0, -4.0]])
def test_it_is_the_largest_and_not_the_one_of_largest_magnitude(diagonal) -> None:
    d = torch.tensor(diagonal, dtype=torch.float64)
    top = lanczos(lambda v: d * v, torch.ones(4, dtype=torch.float64), 50, 1e-12)
    assert top.eigenvalue == pytest.approx(max(diagonal), rel=1e-9)


def test_what_has_not_converged_says_so() -> None:
    d = torch.linspace(0, 1, 1000, dtype=torch.float64)
    top = lanczos(lambda v: d * v, torch.ones_like(d), 5, 1e-6)
    assert (top.iterations, top.converged) == (5, False)
    assert top.eigenvalue < 1
    again = lanczos(lambda v: d * v, torch.ones_like(d), 500, 1e-6)
    assert again.converged
    assert again.eigenvalue == pytest.approx(1, rel=1e-5)


def test_what_is_not_finite_ends_it() -> None:
    top = lanczos(lambda v: v * float("nan"), torch.ones(3), 9, 1e-3)
    assert (top.iterations, top.converged) == (1, False)
    assert top.eigenvalue != top.eigenvalue


def batch(images: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(images) % 4


def tiny(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(72, 4)).double()


def dense(network: nn.Module) -> Tensor:
    """The whole Hessian, by torch.autograd.functional."""
    names = [name for name, _ in network.named_parameters()]
    sizes = [value.numel() for value in network.parameters()]
    shapes = [value.shape for value in network.parameters()]
    images, targets = batch()

    def loss(w: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(w.split(sizes), shapes, strict=True)]
        at = dict(zip(names, parts, strict=True))
        return F.cross_entropy(torch.func.functional_call(copy.deepcopy(network), at, images), targets)

    return torch.autograd.functional.hessian(loss, nn.utils.parameters_to_vector(network.parameters()).detach())


def test_it_is_that_of_the_dense_hessian() -> None:
    network = tiny(nn.BatchNorm2d(2))
    expected = torch.linalg.eigvalsh(dense(network))[-1].item()
    [found] = rows(Sharpness, snapshot(network, *batch()), network, **PRECISE)
    assert found["eigenvalue"] == pytest.approx(expected, rel=1e-6)
    assert found["converged"]


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm not in WITHOUT_HESSIAN])
def test_the_product_is_the_derivative_of_the_gradient_for_every_norm(make, norm) -> None:
    """Against central differences of the gradient in float64, over steps too short to meet a kink of ReLU."""
    config = make("model=custom", "model.target=small.SmallResNet", f"norm={norm}")
    torch.manual_seed(0)
    network = models.build(config, num_classes=4, image_size=8).double().train()
    if norm in ("nf", "fixup", "skipinit"):  # whose start puts activations right onto a kink
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    Steps(network).begin(0, 10)  # where renorm's constants are 1 and 0
    at = snapshot(network, *batch(8))
    w = at.parameters
    generator = torch.Generator().manual_seed(1)
    v = {name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in w.items()}
    h = 1e-8
    ahead, behind = (at.gradient({name: w[name] + sign * h * v[name] for name in w})[1] for sign in (1, -1))
    expected = torch.cat([((ahead[name] - behind[name]) / (2 * h)).flatten() for name in w])
    found = hessian(at)(torch.cat([part.flatten() for part in v.values()]))
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_other_layers_without_second_derivatives_are_refused() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * 2

    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(x)

    network = tiny(Double())
    with pytest.raises(UserError, match="second derivatives"):
        rows(Sharpness, snapshot(network, *batch()), network, **PRECISE)


@pytest.mark.parametrize("norm", WITHOUT_HESSIAN)
def test_where_there_is_no_hessian_the_probe_is_refused(make, norm) -> None:
    config = make("model=custom", "model.target=small.SmallResNet", f"norm={norm}", "probe=sharpness")
    with pytest.raises(UserError, match=f"norm={norm} cannot have probe=sharpness: .*no Hessian"):
        models.build(config, num_classes=4, image_size=8)


def test_half_precision_training_is_measured_in_its_own_arithmetic() -> None:
    torch.manual_seed(0)
    network = SmallResNet(num_classes=4)
    images, targets = batch()
    exact = rows(Sharpness, snapshot(network, images.float(), targets), network)[0]
    half = snapshot(
        network, images.float(), targets, forward_context=lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    )
    [found] = rows(Sharpness, half, network)
    assert found["eigenvalue"] == pytest.approx(exact["eigenvalue"], rel=0.1)
    assert found["eigenvalue"] != exact["eigenvalue"]
