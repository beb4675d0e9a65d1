"""Lp normalizers against their formula in plain autograd, with p-norms written out."""

import copy
import math

import pytest
import torch
from norms.oracle import CASES, compare, compare_rounded, images, relative_error
from torch import Tensor, nn

from normlab.norms import BatchNorm, LpNorm, batch_statistics, precise_statistics, synchronize
from normlab.norms.lp import LpNorm2d

EPS = 1e-3
POWERS = [1, 2, "inf"]


def make(p: object, channels: int = 6, norm_batch: int | None = None, eps: float = EPS) -> LpNorm2d:
    layer = LpNorm(p=p, eps=eps, momentum=0.3, norm_batch=norm_batch).norm(nn.BatchNorm2d(channels))  # type: ignore[arg-type]
    assert isinstance(layer, LpNorm2d)
    return layer


def rows(x: Tensor) -> Tensor:
    """(n, C, H, W) -> (C, n·H·W)."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def channels(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1)


def members(images: int, k: int | None) -> list[list[int]]:
    k = k or images
    whole, groups = images // k * k, images // k
    return [list(range(g, whole, groups)) for g in range(groups)] + ([list(range(whole, images))] if images % k else [])


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
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("case", ["plain", "odd sizes", "batch size changes", "constant channels", "channels last"])
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


def test_the_gradient_of_a_tied_maximum_is_that_of_pytorch() -> None:
    layer = make("inf").double()
    ours, theirs = tied(1).requires_grad_(), tied(1).requires_grad_()
    cotangent = images(6, 6, 3, 3, seed=8)
    layer(ours).backward(cotangent)
    norm = theirs.abs().amax((0, 2, 3)).clamp_min(math.sqrt(EPS))
    ((theirs - theirs.mean((0, 2, 3), keepdim=True)) / channels(norm)).backward(cotangent)
    assert relative_error(ours.grad, theirs.grad) < 1e-12  # type: ignore[arg-type]


@pytest.mark.parametrize("p", POWERS)
def test_gradients_are_those_of_finite_differences(p: object) -> None:
    layer = make(p).double()

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    inputs = [t.requires_grad_() for t in (images(3, 6, 2, 2), images(6, seed=1), images(6, seed=2))]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("norm_batch", [None, 1])
def test_l2_of_channels_without_mean_is_batch_normalization(norm_batch: int | None) -> None:
    """Groups of one image have a mean each, which is taken away here as well."""
    x = images(4, 6, 5, 5, scale=3.0)
    x = x - x.mean((2, 3) if norm_batch else (0, 2, 3), keepdim=True)
    bn = BatchNorm(eps=EPS, momentum=0.3, norm_batch=norm_batch).norm(nn.BatchNorm2d(6)).double()
    torch.testing.assert_close(make(2, norm_batch=norm_batch).double()(x), bn(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("p", "norm"),
    [(1, lambda a: a.abs().mean(1)), (2, lambda a: a.square().mean(1).sqrt()), ("inf", lambda a: a.abs().amax(1))],
)
def test_the_norm_is_taken_before_the_mean_shift(p: object, norm) -> None:
    """A shift of the input makes the output smaller, which none of batch normalization does."""
    layer = make(p, eps=1e-300).double()
    x = images(8, 6, 4, 4)
    shifted = x + 100.0
    ratio = rows(layer(x)).std(1) / rows(layer(shifted)).std(1)
    torch.testing.assert_close(ratio, norm(rows(shifted)) / norm(rows(x)))


@pytest.mark.parametrize("p", POWERS)
def test_the_scale_of_the_input_does_not_matter(p: object) -> None:
    layer = make(p, eps=1e-300).double()
    torch.testing.assert_close(layer(images(8, 6, 4, 4) * 1e3), layer(images(8, 6, 4, 4)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("p", POWERS)
def test_a_channel_of_zeros_is_finite_and_its_gradient_no_larger_than_batch_norms(p: object) -> None:
    gradients = []
    for layer in (make(p), BatchNorm(eps=EPS, momentum=0.3).norm(nn.BatchNorm2d(6))):
        x = torch.zeros(4, 6, 3, 3, requires_grad=True)
        output = layer(x)
        assert (output == 0).all()
        output.backward(images(4, 6, 3, 3).float())
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1])  # both are centered, and divided by sqrt(eps)


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


@pytest.mark.parametrize("p", POWERS)
def test_evaluation_changes_no_state_and_can_go_by_the_batch(p: object) -> None:
    layer = make(p).double()
    layer(images(8, 6, 3, 3))
    before = copy.deepcopy(layer.state_dict())
    in_training = copy.deepcopy(layer)(images(5, 6, 3, 3, seed=4))
    layer.eval()
    assert not torch.allclose(layer(images(5, 6, 3, 3, seed=4)), in_training)
    with batch_statistics(layer):
        assert torch.equal(layer(images(5, 6, 3, 3, seed=4)), in_training)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


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
