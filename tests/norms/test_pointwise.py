"""Dynamic tanh and dynamic erf against other formulas of both functions."""

import math

import pytest
import torch
from norms.oracle import CASES, compare, compare_rounded, images
from torch import Tensor, nn

from normlab.norms import named, parameter_roles


class Formula:
    def __init__(self, name: str) -> None:
        self.name = name

    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        z = parameters["alpha"] * x + parameters.get("s", torch.zeros(1).double())
        if self.name == "dyt":
            z = 1 - 2 / (torch.exp(2 * z.clamp(-300, 300)) + 1)
        else:  # by the distribution function of the normal distribution
            z = 2 * torch.special.ndtr(z * math.sqrt(2)) - 1
        return parameters["weight"][:, None, None] * z + parameters["bias"][:, None, None]

    evaluate = train


@pytest.mark.parametrize("name", ["dyt", "derf"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_formula(case: str, name: str) -> None:
    bound = 1e-8 if case == "tiny" else 1e-10  # the oracle subtracts numbers close to each other
    compare(named(name).norm(nn.BatchNorm2d(6)), Formula(name), CASES[case], bound=bound)


@pytest.mark.parametrize("name", ["dyt", "derf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_close_to_the_formula(dtype: torch.dtype, name: str) -> None:
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    layer = named(name).norm(nn.BatchNorm2d(6))
    compare_rounded(layer, Formula(name), dtype, lambda step: images(8, 6, 4, 4, seed=step), bound=bound)


def test_scalars_start_as_their_papers_have_them() -> None:
    layer = named("derf").norm(nn.BatchNorm2d(6))
    roles = {id(parameter): role for parameter, role, _ in parameter_roles(layer)}
    assert {name: (p.tolist(), roles[id(p)]) for name, p in layer.named_parameters() if len(p) == 1} == {
        "alpha": ([0.5], "scale"),
        "s": ([0.0], "shift"),
    }
    assert not hasattr(named("dyt").norm(nn.BatchNorm2d(6)).s, "grad")
    assert named("dyt", alpha=0.8).norm(nn.BatchNorm2d(6)).alpha.item() == pytest.approx(0.8)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.BatchNorm3d(6)])
def test_it_takes_any_shape(norm: nn.Module) -> None:
    layer = named("dyt").norm(norm)  # type: ignore[arg-type]
    x = torch.randn(4, 6, *[2] * (3 if isinstance(norm, nn.BatchNorm3d) else 0))
    torch.testing.assert_close(layer(x), torch.tanh(0.5 * x))
