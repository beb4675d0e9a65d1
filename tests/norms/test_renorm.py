"""Batch renormalization against its formula, its identity with batch normalization, and the traps of others."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from norms.oracle import CASES, compare, compare_rounded, images, members, relative_error
from small import SmallNet
from torch import Tensor, nn

from normlab.norms import (
    BatchRenorm,
    Clock,
    Steps,
    batch_statistics,
    named,
    parameter_roles,
    rewrite,
    synchronize,
)
from normlab.norms.renorm import BatchRenorm2d

EPS = 1e-3
OPTIONS: dict[str, Any] = {
    "eps": EPS,
    "momentum": 0.4,
    "rmax": 3.0,
    "dmax": 5.0,
    "ramp_unit": "steps",
    "ramp_start": 1,
    "dmax_end": 3,
    "rmax_end": 4,
    "learn_scale": True,
}


def make(norm_batch: int | None = None, **changes: Any) -> BatchRenorm2d:
    layer = BatchRenorm(**(OPTIONS | changes), norm_batch=norm_batch).norm(nn.BatchNorm2d(6))
    assert isinstance(layer, BatchRenorm2d)
    return layer


def corrected(rmax: float, dmax: float) -> BatchRenorm2d:
    """A float64 layer whose ramp is over, with averages that are not those of any batch here."""
    layer = make(rmax=rmax, dmax=dmax).double()
    layer.clock.at_step(100, 101)
    layer.running_mean.copy_(images(6, seed=50))
    layer.running_std.copy_(images(6, seed=51).abs() + 0.5)
    layer.num_batches_tracked.fill_(100)
    return layer


def channels(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1)


class Formula:
    """Group after group; the ramp as (start, end of d's, end of r's) in the unit of `now`."""

    def __init__(self, ramp: tuple[float, float, float] = (1, 3, 4), k: int | None = None, momentum: float = 0.4):
        self.ramp, self.k, self.momentum = ramp, k, momentum
        self.mu, self.s = torch.zeros(6).double(), torch.ones(6).double()
        self.now, self.batches = 0.0, 0
        self.corrections: list[tuple[Tensor, Tensor]] = []

    def ramped(self, end: float) -> float:
        return min(max((self.now - self.ramp[0]) / (end - self.ramp[0]), 0.0), 1.0)

    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        rmax, dmax = 1 + 2 * self.ramped(self.ramp[2]), 5 * self.ramped(self.ramp[1])
        y, mean, std = torch.empty_like(x), torch.zeros(6).double(), torch.zeros(6).double()
        for index in members(len(x), self.k):
            part = x[index]
            mu_b = part.mean((0, 2, 3))
            s_b = torch.sqrt(EPS + ((part - channels(mu_b)) ** 2).mean((0, 2, 3)))
            r = torch.clamp(s_b / self.s, 1 / rmax, rmax).detach()
            d = torch.clamp((mu_b - self.mu) / self.s, -dmax, dmax).detach()
            xhat = (part - channels(mu_b)) / channels(s_b) * channels(r) + channels(d)
            gamma = parameters.get("weight", torch.ones(6).double())
            y = y.index_put((torch.tensor(index),), channels(gamma) * xhat + channels(parameters["bias"]))
            mean = mean + mu_b.detach() * len(index) / len(x)
            std = std + s_b.detach() * len(index) / len(x)
            self.corrections.append((r, d))
        self.batches += 1
        alpha = max(self.momentum, 1 / self.batches)
        self.mu = self.mu + alpha * (mean - self.mu)
        self.s = self.s + alpha * (std - self.s)
        return y

    def evaluate(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        gamma = parameters.get("weight", torch.ones(6).double())
        return channels(gamma) * (x - channels(self.mu)) / channels(self.s) + channels(parameters["bias"])


def check(
    layer: BatchRenorm2d,
    oracle: Formula,
    case: Callable[[int], Tensor] = CASES["plain"],
    dtype: torch.dtype = torch.float64,
) -> None:
    steps = 7

    def before_step(step: int) -> None:
        Steps(layer).begin(step, steps)
        oracle.now = step if layer.clock.unit == "steps" else step / steps

    if dtype == torch.float64:
        compare(layer, oracle, case, steps=steps, before_step=before_step)
    else:
        bound = 2e-5 if dtype == torch.float32 else 2e-2
        compare_rounded(layer, oracle, dtype, case, bound=bound, steps=steps, before_step=before_step)


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_formula_through_the_whole_ramp(case: str) -> None:
    check(make(), Formula(), CASES[case])


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("case", ["odd sizes", "constant channels", "channels last"])
def test_groups_inside_the_batch_are_the_formula_for_each(case: str, k: int) -> None:
    check(make(norm_batch=k), Formula(k=k), CASES[case])


def test_the_ramp_by_fraction_is_the_formula() -> None:
    ramp = {"ramp_start": 0.1, "dmax_end": 0.5, "rmax_end": 0.8}
    check(make(ramp_unit="fraction", **ramp), Formula(ramp=(0.1, 0.5, 0.8)))


def test_the_cases_reach_corrections_on_and_inside_their_bounds() -> None:
    """Otherwise the comparisons above would be of batch normalization."""
    oracle = Formula()
    check(make(), oracle)
    assert all((r == 1).all() and (d == 0).all() for r, d in oracle.corrections[:2])  # up to and at ramp_start
    later = oracle.corrections[2:]
    assert all((r != 1).any() and (d != 0).any() for r, d in later)
    layer = corrected(1.2, 0.3)
    r, d = layer._corrections(images(6, seed=1), layer.running_std * torch.tensor([0.5, 0.9, 1.0, 1.1, 2.0, 3.0]), 1)
    torch.testing.assert_close(r, torch.tensor([1 / 1.2, 0.9, 1.0, 1.1, 1.2, 1.2]).double())
    assert d.abs().max() == 0.3
    assert (d.abs() < 0.3).any()


def test_evaluation_by_the_batch_has_no_corrections() -> None:
    layer = corrected(3.0, 5.0).eval()
    bn = nn.BatchNorm2d(6, eps=EPS).double()
    with batch_statistics(layer):
        torch.testing.assert_close(layer(images(8, 6, 3, 3)), bn(images(8, 6, 3, 3)))


def test_a_scale_fixed_at_one_is_no_parameter() -> None:
    layer = make(learn_scale=False)
    assert [role for _, role, _ in parameter_roles(layer)] == ["shift"]
    check(layer, Formula())


@pytest.mark.parametrize("name", ["renorm", "mabn", "powernorm"])
def test_layers_of_one_variant_share_a_clock_also_in_copies(name: str) -> None:
    network = copy.deepcopy(rewrite(SmallNet(10), named(name)))
    Steps(network).begin(3, 10)
    (clock,) = (module for module in network.modules() if isinstance(module, Clock))
    assert clock.now.item() == pytest.approx(0.3)
    assert network.body[1].clock is network.body[4].clock is clock


@pytest.mark.parametrize("norm_batch", [None, 4])
def test_synchronized_statistics_of_one_process_are_its_own(norm_batch: int | None) -> None:
    """Their path through the code is another one: means that autograd sees."""
    layer = make(norm_batch=norm_batch)
    synchronize(layer)
    check(layer, Formula(k=norm_batch))


@pytest.mark.parametrize("norm_batch", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_close_to_the_formula(dtype: torch.dtype, norm_batch: int | None) -> None:
    """With a mean of 20 deviations, which statistics in half precision would lose."""
    layer, oracle = make(norm_batch=norm_batch), Formula(k=norm_batch)
    check(layer, oracle, lambda step: images(8, 6, 4, 4, seed=step, shift=20.0), dtype)
    assert relative_error(layer.running_std.double(), oracle.s) < 1e-4


def test_a_jump_in_place_of_a_ramp_comes_after_its_step() -> None:
    layer = make(ramp_start=2, dmax_end=2, rmax_end=2)
    bounds = []
    for step in range(5):
        Steps(layer).begin(step, 5)
        bounds.append((layer.clock.r_most.item(), layer.clock.d_most.item()))
    assert bounds == [(1, 0)] * 3 + [(3, 5)] * 2
