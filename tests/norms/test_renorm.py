"""Batch renormalization against its formula, its identity with batch normalization, and the traps of others."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from norms.oracle import CASES, compare, compare_rounded, images, relative_error
from torch import Tensor, nn

from normlab.norms import (
    BatchRenorm,
    Clock,
    GroupedBatchNorm2d,
    Steps,
    batch_statistics,
    parameter_roles,
    precise_statistics,
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


def make(channels: int = 6, norm_batch: int | None = None, **changes: Any) -> BatchRenorm2d:
    layer = BatchRenorm(**(OPTIONS | changes), norm_batch=norm_batch).norm(nn.BatchNorm2d(channels))
    assert isinstance(layer, BatchRenorm2d)
    return layer


def corrected(rmax: float, dmax: float, **changes: Any) -> BatchRenorm2d:
    """A float64 layer whose ramp is over, with averages that are not those of any batch here."""
    layer = make(rmax=rmax, dmax=dmax, **changes).double()
    layer.clock.now.fill_(100)
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
        k = self.k or len(x)
        whole = len(x) // k * k
        members = [list(range(g, whole, len(x) // k)) for g in range(len(x) // k)]
        members += [list(range(whole, len(x)))] if whole < len(x) else []
        rmax, dmax = 1 + 2 * self.ramped(self.ramp[2]), 5 * self.ramped(self.ramp[1])
        y, mean, std = torch.empty_like(x), torch.zeros(6).double(), torch.zeros(6).double()
        for index in members:
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


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("case", ["plain", "odd sizes", "batch size changes", "constant channels", "channels last"])
def test_groups_inside_the_batch_are_the_formula_for_each(case: str, k: int) -> None:
    check(make(norm_batch=k), Formula(k=k), CASES[case])


def test_groups_of_4_inside_32_are_each_corrected_by_the_same_averages() -> None:
    oracle = Formula(k=4)
    check(make(norm_batch=4), oracle, lambda step: images(32, 6, 3, 3, seed=step, scale=1 + step))
    assert len(oracle.corrections) == 7 * 8


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


@pytest.mark.parametrize("norm_batch", [None, 4, 3])
@pytest.mark.parametrize("limits", ["rmax=1, dmax=0", "before the ramp"])
def test_it_is_batch_normalization(limits: str, norm_batch: int | None) -> None:
    layer = corrected(1.0, 0.0) if limits == "rmax=1, dmax=0" else corrected(3.0, 5.0)
    if limits == "before the ramp":
        layer.clock.now.fill_(1)
    layer.norm_batch = norm_batch
    bn = GroupedBatchNorm2d(6, norm_batch=norm_batch, eps=EPS).double()
    for parameter, name in ((bn.weight, "weight"), (bn.bias, "bias")):
        nn.init.normal_(parameter)
        getattr(layer, name).data.copy_(parameter)
    ours, theirs = images(8, 6, 4, 4).requires_grad_(), images(8, 6, 4, 4).requires_grad_()
    output, expected = layer(ours), bn(theirs)
    output.backward(images(8, 6, 4, 4, seed=9))
    expected.backward(images(8, 6, 4, 4, seed=9))
    pairs = [(output, expected), (ours.grad, theirs.grad), (layer.weight.grad, bn.weight.grad)]
    for a, b in [*pairs, (layer.bias.grad, bn.bias.grad)]:
        assert relative_error(a, b) <= 1e-12


def test_input_gradient_is_orthogonal_to_ones_and_to_the_centered_input() -> None:
    layer = corrected(3.0, 5.0)
    x = images(8, 6, 5, 5, scale=2.0, shift=1.0).requires_grad_()
    layer(x).backward(images(8, 6, 5, 5, seed=3))
    assert x.grad is not None
    centered = (x - x.mean((0, 2, 3), keepdim=True)).detach()
    norms = x.grad.norm() * centered.norm()
    assert (x.grad.sum((0, 2, 3)).abs() / x.grad.abs().sum((0, 2, 3))).max() < 1e-12
    # Exactly so without eps: mean(xhat²) = v / (v + eps) leaves a remainder of that order.
    assert ((x.grad * centered).sum((0, 2, 3)).abs() / norms).max() < 2e-4
    layer.eps = 0.0
    x.grad = None
    layer(x).backward(images(8, 6, 5, 5, seed=3))
    assert ((x.grad * centered).sum((0, 2, 3)).abs() / norms).max() < 1e-13


def test_gradients_are_right_as_far_as_the_corrections_are_constants() -> None:
    """Finite differences with r and d on their bounds, where small changes of the input do not move them."""
    layer = corrected(1.01, 0.01)
    layer.running_std.fill_(0.01)
    layer.running_mean.fill_(-9.0)
    layer.num_batches_tracked.fill_(0)
    layer.update = lambda *statistics: None  # type: ignore[method-assign]

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    inputs = [t.requires_grad_() for t in (images(3, 6, 2, 2), images(6, seed=1), images(6, seed=2))]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_corrections_are_by_the_averages_from_before_the_step() -> None:
    """A planted case: averages (10, 2), a batch of mean 14 and deviation 3, momentum 1/2."""
    layer = make(1, eps=1e-300, momentum=0.5, dmax=5.0, rmax=3.0).double()
    layer.clock.now.fill_(4)
    layer.running_mean.fill_(10)
    layer.running_std.fill_(2)
    layer.num_batches_tracked.fill_(100)
    output = layer(torch.tensor([11.0, 17.0]).double().reshape(2, 1, 1, 1))
    # r = 3/2 and d = (14 - 10)/2 = 2. By averages after the step, (12, 2.5), they were 6/5 and 4/5.
    torch.testing.assert_close(output.flatten(), torch.tensor([-1 * 1.5 + 2, 1.5 + 2]).double())
    assert layer.running_mean == 12
    assert layer.running_std == 2.5  # the deviation is averaged: the variance would give the root of 6.5


def test_eps_is_inside_the_root_and_r_has_a_lower_bound() -> None:
    layer = make(1, eps=0.25, rmax=4.0).double()
    layer.clock.now.fill_(4)
    layer.num_batches_tracked.fill_(100)
    layer.running_std.fill_(100)
    x = torch.tensor([-1.0, 1.0]).double().reshape(2, 1, 1, 1)
    # sB = sqrt(1 + 1/4); sB / s is far below 1/rmax = 1/4.
    torch.testing.assert_close(layer(x).flatten(), torch.tensor([-1, 1]).double() / 1.25**0.5 / 4)


def test_the_first_averages_are_the_plain_mean_of_the_batches() -> None:
    layer = make(momentum=0.01).double()
    for step in range(5):
        layer(images(8, 6, 3, 3, seed=step, shift=4.0))
    batches = torch.stack([images(8, 6, 3, 3, seed=step, shift=4.0) for step in range(5)])
    torch.testing.assert_close(layer.running_mean, batches.mean((0, 1, 3, 4)))
    stds = torch.stack([torch.sqrt(b.var((0, 2, 3), correction=0) + EPS) for b in batches])
    torch.testing.assert_close(layer.running_std, stds.mean(0))


def test_evaluation_changes_no_state() -> None:
    layer = corrected(3.0, 5.0)
    before = copy.deepcopy(layer.state_dict())
    layer.eval()(images(4, 6, 3, 3))
    with batch_statistics(layer):
        layer(images(4, 6, 3, 3))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_evaluation_by_the_batch_has_no_corrections() -> None:
    layer = corrected(3.0, 5.0).eval()
    bn = nn.BatchNorm2d(6, eps=EPS).double()
    with batch_statistics(layer):
        torch.testing.assert_close(layer(images(8, 6, 3, 3)), bn(images(8, 6, 3, 3)))


def test_precise_averages_are_those_of_all_images() -> None:
    layer = corrected(3.0, 5.0)
    batches = [images(4, 6, 3, 3, seed=1), images(7, 6, 3, 3, seed=2)]
    pooled = torch.cat(batches)
    with precise_statistics(layer, batches):
        torch.testing.assert_close(layer.running_mean, pooled.mean((0, 2, 3)))
        torch.testing.assert_close(layer.running_std, torch.sqrt(pooled.var((0, 2, 3), correction=0) + EPS))


def test_a_scale_fixed_at_one_is_no_parameter() -> None:
    layer = make(learn_scale=False)
    assert [role for _, role, _ in parameter_roles(layer)] == ["shift"]
    check(layer, Formula())


def test_layers_of_one_variant_share_a_clock_also_in_copies() -> None:
    variant = BatchRenorm(**OPTIONS)
    network = copy.deepcopy(nn.Sequential(variant.norm(nn.BatchNorm2d(2)), variant.norm(nn.BatchNorm2d(3))))
    Steps(network).begin(3, 10)
    assert [module.now.item() for module in network.modules() if isinstance(module, Clock)] == [3]
    assert network[0].clock is network[1].clock


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
    ramps = []
    for step in range(5):
        Steps(layer).begin(step, 5)
        ramps.append(layer._ramp(2).item())
    assert ramps == [0, 0, 0, 1, 1]
