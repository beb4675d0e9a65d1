"""Lp normalizers against their formula in plain autograd, with p-norms written out."""

import math

import pytest
import torch
from norms.oracle import CASES, compare, compare_rounded, images, members, relative_error
from torch import Tensor, nn

from normlab.norms import LpNorm, precise_statistics, synchronize
from normlab.norms.lp import LpNorm2d

EPS = 1e-3
POWERS = [1, 2, "inf"]


def make(p: object, norm_batch: int | None = None) -> LpNorm2d:
    layer = LpNorm(p=p, eps=EPS, momentum=0.3, norm_batch=norm_batch).norm(nn.BatchNorm2d(6))  # type: ignore[arg-type]
    assert isinstance(layer, LpNorm2d)
    return layer


def rows(x: Tensor) -> Tensor:
    """(n, C, H, W) -> (C, n·H·W)."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def channels(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1)


class Formula:
    """Group after group. What evaluation divides by is made from the average of mean |a|^p or of max |a|."""

    def __init__(self, p: object, k: int | None = None) -> None:
        self.p, self.k = p, k
        self.mu, self.moment = torch.zeros(6).double(), torch.ones(6).double()

    def moment_of(self, a: Tensor) -> Tensor:
        if self.p == "inf":
            # The mean over the values that tie for it, which is the maximum, and gives each its share of the gradient.
            ties = a.abs() == a.abs().max(1, keepdim=True).values
            return (a.abs() * ties).sum(1) / ties.sum(1)
        return (a.abs() if self.p == 1 else a**2).mean(1)

    def norm_of(self, moment: Tensor) -> Tensor:
        floor = math.sqrt(EPS)
        if self.p == "inf":
            return torch.maximum(moment, torch.full_like(moment, floor))
        return moment + floor if self.p == 1 else torch.sqrt(moment + floor**2)

    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        y, mean, moment = torch.empty_like(x), torch.zeros(6).double(), torch.zeros(6).double()
        for index in members(len(x), self.k):
            a = rows(x[index])
            z = (x[index] - channels(a.mean(1))) / channels(self.norm_of(self.moment_of(a)))
            z = channels(parameters["weight"]) * z + channels(parameters["bias"])
            y = y.index_put((torch.tensor(index),), z)
            mean = mean + a.mean(1).detach() * len(index) / len(x)
            moment = moment + self.moment_of(a).detach() * len(index) / len(x)
        self.mu = 0.7 * self.mu + 0.3 * mean
        self.moment = 0.7 * self.moment + 0.3 * moment
        return y

    def evaluate(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        z = (x - channels(self.mu)) / channels(self.norm_of(self.moment))
        return channels(parameters["weight"]) * z + channels(parameters["bias"])


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_formula(case: str, p: object) -> None:
    compare(make(p), Formula(p), CASES[case])


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("case", ["odd sizes", "constant channels", "channels last"])
def test_groups_inside_the_batch_are_the_formula_for_each(case: str, k: int, p: object) -> None:
    compare(make(p, norm_batch=k), Formula(p, k), CASES[case])


@pytest.mark.parametrize("norm_batch", [None, 3])
@pytest.mark.parametrize("p", POWERS)
def test_synchronized_statistics_of_one_process_are_its_own(p: object, norm_batch: int | None) -> None:
    """Their path through the code is another one: means that autograd sees."""
    layer = make(p, norm_batch=norm_batch)
    synchronize(layer)
    compare(layer, Formula(p, norm_batch), CASES["plain"])


def tied(step: int) -> Tensor:
    """The values 0, ±1, ±2 many times each: every channel's maximum is tied, by both signs; one channel is zero."""
    x = images(6, 6, 3, 3, seed=step, scale=2.0).round().clamp(-2, 2)
    x[:, 5] = 0
    return x


@pytest.mark.parametrize("p", POWERS)
def test_values_that_tie_for_the_maximum_or_are_zero_are_the_formula(p: object) -> None:
    assert (rows(tied(0)).abs() == 2).sum(1).min() == 0
    assert (rows(tied(0)).abs()[:5] == 2).sum(1).min() > 1
    compare(make(p), Formula(p), tied)
    compare(make(p, norm_batch=2), Formula(p, 2), tied)


@pytest.mark.parametrize("norm_batch", [None, 2])
@pytest.mark.parametrize("p", POWERS)
def test_precise_averages_are_those_of_all_images(p: object, norm_batch: int | None) -> None:
    """For p = inf, the mean over training's groups of each group's maximum."""
    layer = make(p, norm_batch=norm_batch).double()
    batches = [images(4, 6, 3, 3, seed=1), images(7, 6, 3, 3, seed=2)]
    with precise_statistics(layer, batches):
        mean, moment = layer.running_mean.clone(), layer.running_moment.clone()
    pooled = rows(torch.cat(batches))
    torch.testing.assert_close(mean, pooled.mean(1))
    if p == "inf":
        groups = [(len(i) / 11, rows(b[i]).abs().amax(1)) for b in batches for i in members(len(b), norm_batch)]
        assert len(groups) == (2 + 4 if norm_batch else 2)
        torch.testing.assert_close(moment, sum(share * highest for share, highest in groups))
    else:
        torch.testing.assert_close(moment, (pooled.abs() if p == 1 else pooled**2).mean(1))
    assert not torch.equal(layer.running_mean, mean)


@pytest.mark.parametrize("norm_batch", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", POWERS)
def test_lower_precision_stays_close_to_the_formula(p: object, dtype: torch.dtype, norm_batch: int | None) -> None:
    layer, oracle = make(p, norm_batch=norm_batch), Formula(p, norm_batch)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    compare_rounded(layer, oracle, dtype, lambda step: images(8, 6, 4, 4, seed=step, shift=2.0), bound=bound, steps=3)
    assert relative_error(layer.running_moment.double(), oracle.moment) < 1e-6


@pytest.mark.parametrize(("p", "same"), [(float("inf"), "inf"), (2.0, 2), ("1", 1)])
def test_a_power_may_be_written_as_a_number_or_a_word(p: object, same: object) -> None:
    assert torch.equal(make(p)(images(4, 6, 2, 2).float()), make(same)(images(4, 6, 2, 2).float()))
