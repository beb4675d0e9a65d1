"""The noise of Santurkar et al. 2018: its two levels of draws, its gradient, and what it leaves alone."""

import math

import pytest
import torch
from norms.oracle import images
from torch import Tensor, nn

from normlab.norms import (
    BatchNorm,
    GroupedBatchNorm2d,
    NoisyBatchNorm,
    NoisyNoNorm,
    NoNorm,
    batch_statistics,
    precise_statistics,
    rewrite,
)
from normlab.norms.layer_statistics import statistics_layers
from normlab.norms.noise import Noise

PAPER = {"mu_range": 0.5, "sigma_low": 1.0, "sigma_high": 1.25, "spread": 0.1}
NOTHING = {"mu_range": 0.0, "sigma_low": 1.0, "sigma_high": 1.0, "spread": 0.0}
BN = {"eps": 1e-5, "momentum": 0.1}
SIGMA = 5  # tolerances, in standard deviations of the estimate; the seed is fixed, so that nothing is left to chance


def draws(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """s and m of one call: 0 comes out as m, and 1 as s + m."""
    noise = Noise(**PAPER)
    torch.manual_seed(seed)
    m = noise(torch.zeros(*shape, dtype=torch.float64))
    torch.manual_seed(seed)
    return noise(torch.ones(*shape, dtype=torch.float64)) - m, m


def close(values: Tensor, mean: float, variance: float, kurtosis: float) -> None:
    """Independent `values` have this mean and variance; `kurtosis` is E[(x - mean)^4] / variance²."""
    n = values.numel()
    assert abs(values.mean().item() - mean) < SIGMA * math.sqrt(variance / n)
    assert abs((values - mean).square().mean().item() - variance) < SIGMA * variance * math.sqrt((kurtosis - 1) / n)


def test_moments_over_units_are_those_of_the_two_level_draw() -> None:
    """40000 units of one value each, so that all draws are independent.

    m is the sum of uniform variables of half-widths 1/2 and 1/10; s of a uniform one of width 1/4 and a normal one.
    """
    s, m = draws(1, 40_000, 1, 1)
    wide, narrow = 0.5**2 / 3, 0.1**2 / 3
    variance = wide + narrow
    close(m, 0.0, variance, (1.8 * wide**2 + 6 * wide * narrow + 1.8 * narrow**2) / variance**2)
    level, normal = 0.25**2 / 12, 0.1**2
    variance_s = level + normal
    close(s, 1.125, variance_s, (1.8 * level**2 + 6 * level * normal + 3 * normal**2) / variance_s**2)
    a = 3.0
    torch.manual_seed(1)
    y = Noise(**PAPER)(torch.full((1, 40_000, 1, 1), a, dtype=torch.float64))
    close(y, 1.125 * a, a**2 * variance_s + variance, 3.0)  # close to normal, with lighter tails


def test_values_of_a_unit_share_its_mu_and_sigma() -> None:
    """30000 values in each of 8 channels: N, H and W all count as its batch."""
    s, m = (draw.transpose(0, 1).reshape(8, -1) for draw in draws(300, 8, 10, 10))
    mu, sigma = (m.amin(1) + m.amax(1)) / 2, s.mean(1)
    assert mu.abs().max() < 0.5
    assert sigma.min() > 1.0 - 0.01
    assert sigma.max() < 1.25 + 0.01
    assert mu.std() > 0.1  # not one for all units
    assert sigma.std() > 0.02
    for unit in range(8):
        assert (m[unit] - mu[unit]).abs().max() <= 0.1
        close(m[unit], mu[unit].item(), 0.1**2 / 3, 1.8)
        assert abs(s[unit].var().item() - 0.1**2) < SIGMA * 0.1**2 * math.sqrt(2 / 30_000)
        kurtosis = ((s[unit] - sigma[unit]) ** 4).mean().item() / 0.1**4
        assert abs(kurtosis - 3) < SIGMA * math.sqrt(96 / 30_000)  # s is normal, not uniform
    for image in (0, 299):  # each image alone has the unit's mean: 100 values of it
        assert (draws(300, 8, 10, 10)[1][image].mean((1, 2)) - mu).abs().max() < SIGMA * 0.1 / math.sqrt(3 * 100)


def test_the_gradient_is_s_and_none_passes_the_draws() -> None:
    s, m = draws(4, 3, 5, 5, seed=3)
    a = images(4, 3, 5, 5, shift=1.0).requires_grad_()
    torch.manual_seed(3)
    output = Noise(**PAPER)(a)
    cotangent = images(4, 3, 5, 5, seed=8)
    output.backward(cotangent)
    torch.testing.assert_close(output.detach(), s * a.detach() + m)
    torch.testing.assert_close(a.grad, cotangent * s)


def test_it_is_fresh_at_every_call_and_repeats_with_the_seed() -> None:
    noise, a = Noise(**PAPER), images(4, 3, 5, 5)
    torch.manual_seed(0)
    first, second = noise(a), noise(a)
    assert (first != second).all()
    torch.manual_seed(0)
    assert torch.equal(noise(a), first)
    torch.manual_seed(1)
    assert (noise(a) != first).all()


def test_evaluation_is_without_noise_and_draws_nothing() -> None:
    noise, a = Noise(**PAPER).eval(), images(4, 3, 5, 5)
    state = torch.get_rng_state()
    assert noise(a) is a
    assert "spread=0.1" in repr(noise)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_output_has_the_inputs_dtype_and_the_draws_float32s_resolution(dtype: torch.dtype) -> None:
    noise = Noise(**PAPER)
    torch.manual_seed(0)
    output = noise(torch.ones(1, 2, 40, 40, dtype=dtype))
    assert output.dtype == dtype
    torch.manual_seed(0)
    expected = noise(torch.ones(1, 2, 40, 40, dtype=torch.promote_types(dtype, torch.float32)))
    assert torch.equal(output, expected.to(dtype))


def test_memory_format_is_kept() -> None:
    a = images(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    assert Noise(**PAPER)(a).is_contiguous(memory_format=torch.channels_last)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()


def test_noisy_bn_is_batch_norm_then_noise() -> None:
    noisy = rewrite(network(), NoisyBatchNorm(**PAPER, **BN)).double()
    plain = rewrite(network(), BatchNorm(**BN)).double()
    x = images(8, 3, 6, 6)
    normalized = plain[1](plain[0](x))
    torch.manual_seed(4)
    s, m = draws(*normalized.shape, seed=4)
    torch.manual_seed(4)
    torch.testing.assert_close(noisy[1](noisy[0](x)), s * normalized + m)


@pytest.mark.parametrize("norm_batch", [None, 3])
def test_without_amplitudes_noisy_bn_is_bn_and_noisy_none_is_none(norm_batch: int | None) -> None:
    x = images(8, 3, 6, 6)
    for noisy, plain in (
        (NoisyBatchNorm(**NOTHING, **BN, norm_batch=norm_batch), BatchNorm(**BN, norm_batch=norm_batch)),
        (NoisyNoNorm(**NOTHING, conv_bias=True, norm_batch=norm_batch), NoNorm(conv_bias=True)),
    ):
        ours, theirs = rewrite(network(), noisy).double(), rewrite(network(), plain).double()
        for a, b in ((ours(x), theirs(x)), (ours.eval()(x), theirs.eval()(x))):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_options_of_bn_and_none_are_theirs() -> None:
    noisy = NoisyBatchNorm(**PAPER, **BN, scale_init=0.1, scale_lr_divisor=100.0).norm(nn.BatchNorm2d(3))
    assert (noisy[0].weight == 0.1).all()  # type: ignore[index]
    assert noisy[0].lr_divisors == {"weight": 100.0}  # type: ignore[index]
    assert rewrite(network(), NoisyNoNorm(**PAPER, conv_bias=True))[0].bias is not None  # type: ignore[index]
    assert rewrite(network(), NoisyNoNorm(**PAPER, conv_bias=False))[0].bias is None  # type: ignore[index]


def test_tools_for_evaluation_find_the_batch_norm_and_leave_the_noise_off() -> None:
    noisy = rewrite(network(), NoisyBatchNorm(**PAPER, **BN)).double()
    plain = rewrite(network(), BatchNorm(**BN)).double()
    x = images(8, 3, 6, 6)
    assert [type(layer) for layer in statistics_layers(noisy)] == [GroupedBatchNorm2d]
    with batch_statistics(noisy.eval()), batch_statistics(plain.eval()):
        assert torch.equal(noisy(x), plain(x))
    with precise_statistics(noisy, [x]), precise_statistics(plain, [x]):
        assert torch.equal(noisy(x), plain(x))
