"""Norms by past batches against loops over lists of them, in float64; the second forward pass against one by hand."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from norms.oracle import CASES, compare, compare_rounded, has_single_values, images, members, relative_error
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.norms import CrossIterationBatchNorm, MemorizedBatchNorm, Steps, Variant, batch_statistics, rewrite

EPS = 1e-5


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of (N, C, H, W), channel by channel."""
    pairs = [(channel.mean(), (channel - channel.mean()).pow(2).mean()) for channel in x.transpose(0, 1)]
    mean, variance = map(torch.stack, zip(*pairs, strict=True))
    return mean, variance


class Memorized:
    """A mixture of the batch (weight 1) and a list of past ones, newest first, by the law of total variance."""

    def __init__(self, k: int | None, memory: int = 5, decay: float = 0.9) -> None:
        self.k, self.memory, self.decay = k, memory, decay
        self.past: list[tuple[Tensor, Tensor]] = []

    def mixture(self, own: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        ages = [*[0] * len(own), *range(1, len(self.past) + 1)]
        entries, weights = own + self.past, [self.decay**age for age in ages]
        mean = sum(w * mu for w, (mu, _) in zip(weights, entries, strict=True)) / sum(weights)
        spread = sum(w * (v + (mu - mean) ** 2) for w, (mu, v) in zip(weights, entries, strict=True))
        return mean, spread / sum(weights)

    @staticmethod
    def standardized(x: Tensor, mean: Tensor, variance: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        z = (x - mean[:, None, None]) / torch.sqrt(variance + EPS)[:, None, None]
        return z * parameters["weight"][:, None, None] + parameters["bias"][:, None, None]

    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        y, means, variances = torch.empty_like(x), [], []
        for group in members(len(x), self.k):
            mu, v = moments(x[group])
            y = y.index_put((torch.tensor(group),), self.standardized(x[group], *self.mixture([(mu, v)]), parameters))
            means.append(mu.detach() * len(group) / len(x))
            variances.append(v.detach() * len(group) / len(x))
        self.past = [(sum(means), sum(variances)), *self.past][: self.memory]
        return y

    def evaluate(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return self.standardized(x, *self.mixture([]), parameters)


def layer(variant: Variant, channels: int = 6) -> nn.Module:
    return variant.norm(nn.BatchNorm2d(channels))


@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize("case", CASES)
def test_memorized_batches_are_those_of_a_list(case: str, k: int | None) -> None:
    if k is not None and has_single_values(case, k):
        with pytest.raises(ValueError, match="more than one value"):
            layer(MemorizedBatchNorm(norm_batch=k))(CASES[case](0).float())
        return
    bound = 1e-7 if case in ("huge", "constant channels") else 1e-9
    compare(layer(MemorizedBatchNorm(norm_batch=k)), Memorized(k), CASES[case], steps=8, bound=bound)


@pytest.mark.parametrize(("memory", "decay"), [(1, 0.9), (3, 0.5), (4, 1.0)])
def test_its_options_are_the_number_of_batches_and_their_weights(memory: int, decay: float) -> None:
    variant = MemorizedBatchNorm(memory=memory, decay=decay)
    compare(layer(variant), Memorized(None, memory, decay), CASES["plain"], steps=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_and_its_memory_is_not(dtype: torch.dtype) -> None:
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    compare_rounded(layer(MemorizedBatchNorm()), Memorized(None), dtype, CASES["plain"], bound=bound, steps=7)


def test_with_an_empty_memory_it_is_batch_normalization() -> None:
    ours, theirs = layer(MemorizedBatchNorm()).double(), nn.BatchNorm2d(6).double()
    x, y = (images(8, 6, 4, 4).requires_grad_() for _ in range(2))
    ours(x).pow(3).sum().backward()
    theirs(y).pow(3).sum().backward()
    assert relative_error(x.grad, y.grad) < 1e-10
    torch.testing.assert_close(ours.eval().running_mean, y.detach().mean((0, 2, 3)))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 5, 3, bias=False)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(4), nn.BatchNorm2d(5), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.second(self.relu(self.bn1(self.first(x)))))


def test_after_an_update_the_batch_is_forwarded_once_more_and_those_statistics_are_kept() -> None:
    """Two convolutions, by hand: nothing is kept of the first pass, and the second sees the updated weights."""
    network = rewrite(Small(), "mbn_style").double().train()
    weights = [network.first.weight.detach().clone(), network.second.weight.detach().clone()]
    affine = [{name: p.detach() for name, p in norm.named_parameters()} for norm in (network.bn1, network.bn2)]
    oracles, steps = (Memorized(None), Memorized(None)), Steps(network)
    optimizer = torch.optim.SGD([network.first.weight, network.second.weight], lr=0.1)

    def by_hand(x: Tensor, kernels: list[Tensor], *, keep: bool) -> Tensor:
        for kernel, oracle, parameters in zip(kernels, oracles, affine, strict=True):
            before = oracle.past
            x = oracle.train(F.conv2d(x, kernel), parameters)
            oracle.past = oracle.past if keep else before
            x = x.relu() if oracle is oracles[0] else x
        return x

    for step in range(7):
        x = images(4, 3, 6, 6, seed=step)
        kernels = [weight.requires_grad_() for weight in weights]
        expected = by_hand(x, kernels, keep=False)
        expected.pow(3).mean().backward()
        weights = [weight.detach() - 0.1 * weight.grad for weight in kernels]
        by_hand(x, weights, keep=True)
        steps.start()
        output = network(x)
        optimizer.zero_grad()
        output.pow(3).mean().backward()
        optimizer.step()
        steps.end(lambda x=x: network(x))
        assert relative_error(output, expected) < 1e-9
        for norm, oracle in zip((network.bn1, network.bn2), oracles, strict=True):
            assert relative_error(norm.running_mean, oracle.mixture([])[0]) < 1e-9
            assert relative_error(norm.running_var, oracle.mixture([])[1]) < 1e-9
        assert int(network.bn2.batches) == step + 1
    images_seen = images(2, 3, 6, 6, seed=99)
    together = network.eval()(images_seen)
    torch.testing.assert_close(network(images_seen[:1]), together[:1])  # evaluation depends on no other image
    with batch_statistics(network):  # but with eval_stats=batch, where the batch takes part
        assert not torch.allclose(network(images_seen[:1]), together[:1])


def test_averages_of_other_norms_see_a_batch_once() -> None:
    network = nn.Sequential(rewrite(nn.Sequential(nn.BatchNorm2d(3)), "bn"), rewrite(Small(), "mbn_style")).train()
    grouped = nn.Sequential(
        rewrite(nn.Sequential(nn.BatchNorm2d(3)), "bn", norm_batch=2), rewrite(Small(), "mbn_style")
    ).train()
    for each in (network, grouped):
        alone, steps, x = copy.deepcopy(each[0]), Steps(each), images(4, 3, 6, 6).float()
        steps.start()
        each(x)
        steps.end(lambda each=each, x=x: each(x))
        alone(x)
        for name, buffer in alone.named_buffers():
            torch.testing.assert_close(each[0].get_buffer(name), buffer)
        assert each[0][0].momentum == 0.1


def test_without_steps_or_a_second_pass_it_keeps_the_statistics_of_the_first() -> None:
    one, other = (rewrite(Small(), "mbn_style").train() for _ in range(2))
    steps, x = Steps(other), images(4, 3, 6, 6).float()
    one(x)
    steps.start()
    other(x)
    steps.end()
    assert all(torch.equal(*buffers) for buffers in zip(one.buffers(), other.buffers(), strict=True))


def test_trained_statistics_fill_the_memory() -> None:
    trained = nn.BatchNorm2d(6)
    trained(images(8, 6, 4, 4, scale=3, shift=1).float())
    network: Any = rewrite(nn.Sequential(trained), "mbn_style")
    x = images(2, 6, 4, 4).float()
    torch.testing.assert_close(network.eval()(x), trained.eval()(x))
    network.train()(x)
    assert relative_error(network[0].means[1:], trained.running_mean.expand(4, 6)) < 1e-6
    assert bool((network[0].weights() > 0).all())


class CrossIterations:
    """Per channel, from mean and mean square, with derivatives as sums over the patches that a filter sees."""

    def __init__(self, k: int | None, memory: int = 3, burn_in: int = 8) -> None:
        self.k, self.memory, self.burn_in = k, memory, burn_in
        self.past: list[list[tuple[Tensor, ...]]] = []  # of each step, newest first: of each channel mu, q, dmu, dq, W
        self.seen = self.left_out = 0
        self.running: list[tuple[Tensor, Tensor]] = []

    def entry(self, x: Tensor, patches: Tensor, filter: Tensor) -> tuple[Tensor, ...]:
        """Of one channel: x (values,), the patches (values, n) that they are products of, and the filter (n,)."""
        slope = sum(2 * value * patch for value, patch in zip(x, patches, strict=True)) / len(x)
        return x.mean(), x.pow(2).mean(), patches.mean(0), slope, filter

    def normalized(self, x: Tensor, channel: int, filter: Tensor) -> Tensor:
        """One channel (values,) of one group."""
        means, squares = [x.mean()], [x.pow(2).mean()]
        for step in self.past:
            mu, q, dmu, dq, then = step[channel]
            mean, square = mu + dmu @ (filter - then), q + dq @ (filter - then)
            if square >= mean**2:
                means.append(mean)
                squares.append(square)
            else:
                self.left_out += 1
        m, q = sum(means) / len(means), sum(squares) / len(squares)
        return (x - m) / (torch.sqrt(q - m**2) + EPS)

    def train(self, h: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        x, channels = F.conv2d(h, weight, padding=1), weight.shape[0]
        columns = F.unfold(h, 3, padding=1).transpose(1, 2).detach()  # (N, positions, n)
        y, now = torch.zeros_like(x), []
        for channel in range(channels):
            filter, parts = weight[channel].flatten().detach(), []
            for group in members(len(x), self.k):
                values = x[group, channel].flatten()
                normal = self.normalized(values, channel, filter) * gamma[channel] + beta[channel]
                places = (torch.tensor(group), torch.full((len(group),), channel))
                y = y.index_put(places, normal.view(len(group), *x.shape[2:]))
                entry = self.entry(values.detach(), columns[group].flatten(0, 1), filter)
                moments = (entry[0], entry[1] - entry[0] ** 2, entry[2], entry[3] - 2 * entry[0] * entry[2])
                unbiased = moments[1] * len(values) / (len(values) - 1)
                parts.append([part * len(group) / len(x) for part in (*moments, unbiased)])
            mu, v, dmu, dv, unbiased = (sum(parts) for parts in zip(*parts, strict=True))  # means over the groups
            now.append((mu, v + mu**2, dmu, dv + 2 * mu * dmu, filter))
            self.running = [*self.running, (mu, unbiased)]
        self.seen += 1
        if self.seen > self.burn_in:
            self.past = [now, *self.past][: self.memory]
        return y


@pytest.mark.parametrize(
    ("k", "memory", "burn_in", "scale"), [(None, 3, 8, 0.05), (2, 3, 2, 0.05), (3, 2, 0, 0.05), (None, 3, 1, 2.0)]
)
def test_cross_iterations_are_those_of_loops_over_channels_and_patches(
    k: int | None, memory: int, burn_in: int, scale: float
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)).double()
    network: Any = rewrite(plain, CrossIterationBatchNorm(norm_batch=k, memory=memory, burn_in=burn_in)).train()
    oracle, steps = CrossIterations(k, memory, burn_in), Steps(network)
    averages = dict.fromkeys(("running_mean", "running_var"), torch.zeros(4).double())
    for step in range(burn_in + 6):
        with torch.no_grad():  # as an update would
            for parameter in network.parameters():  # at 2 other filters altogether, so that Taylor's series fails
                parameter.mul_(scale < 1).add_(scale * torch.randn_like(parameter))
        h = images(5, 3, 4, 4, seed=step, shift=0.5)
        leaves = [h, *(p.detach() for p in network.parameters())]
        ours, theirs = h.clone().requires_grad_(), [leaf.clone().requires_grad_() for leaf in leaves]
        if step % 2:  # averages that move at the end of a step, or in the forward pass
            steps.start()
        output, expected = network(ours), oracle.train(*theirs)
        cotangent = images(*output.shape, seed=step + 50)
        network.zero_grad()
        output.backward(cotangent)
        steps.end()
        expected.backward(cotangent)
        assert relative_error(output, expected) < 1e-9
        for mine, other in zip((ours, *network.parameters()), theirs, strict=True):
            assert relative_error(mine.grad, other.grad) < 1e-8
        count, start = step + 1, 4 * step
        for name, index in (("running_mean", 0), ("running_var", 1)):
            newest = torch.stack([pair[index] for pair in oracle.running[start : start + 4]])
            averages[name] = averages[name] + max(1 / count, 0.1) * (newest - averages[name])
            assert relative_error(network[1].get_buffer(name), averages[name]) < 1e-9
    assert bool(oracle.left_out) == (scale > 1)
    mean, variance = (averages[name][:, None, None] for name in ("running_mean", "running_var"))
    gamma, beta = (p.detach()[:, None, None] for p in (network[1].weight, network[1].bias))
    evaluated = (F.conv2d(h, network[0].weight, padding=1) - mean) / (variance.sqrt() + EPS) * gamma + beta
    assert relative_error(network.eval()(h), evaluated) < 1e-9


def test_with_filters_that_stay_the_mean_is_that_of_the_newest_batches() -> None:
    network: Any = rewrite(Small(), "cbn", burn_in=0).double().train()
    seen = []
    for step in range(5):
        x = images(4, 3, 6, 6, seed=step)
        seen.append(network.first(x).mean((0, 2, 3)))
        y = network.bn1(network.first(x))
        m = network.first(x).mean((0, 2, 3)) - y.mean((0, 2, 3)) * (
            network.first(x).std((0, 2, 3), correction=0) / y.std((0, 2, 3), correction=0)
        )
        torch.testing.assert_close(m, torch.stack(seen[-4:]).mean(0))


def test_a_copy_looks_at_its_own_convolution_and_frozen_filters_have_no_slopes() -> None:
    network: Any = rewrite(Small(), "cbn", burn_in=0).train()
    other = copy.deepcopy(network)
    assert other.bn1.before[0] is other.first
    assert other.bn1.before[0] is not network.first
    assert "bn1.before.0.weight" not in network.state_dict()
    other.first.weight.requires_grad_(False)
    other(images(4, 3, 6, 6).float())
    assert not other.bn1.mean_slopes.any()
    assert other.bn2.mean_slopes.any()
    with torch.no_grad():
        network(images(4, 3, 6, 6).float())
    assert not network.bn2.mean_slopes.any()


def test_a_norm_without_a_convolution_before_it_is_refused() -> None:
    with pytest.raises(UserError, match="cbn rewrites the convolution before each norm"):
        rewrite(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), "cbn")
