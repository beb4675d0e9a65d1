"""A convolution without the taps that meet nothing but padding is the same function."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from normlab import models
from normlab.norms.weights import WeightNormConv2d
from normlab.training.taps import live, trim

KINDS = [
    (size, kernel, stride, padding, dilation)
    for size, kernel, stride, padding, dilation in itertools.product(
        (1, 2, 3, 4, 7), (1, 2, 3, 5, 7), (1, 2, 3), (0, 1, 2, 3), (1, 2)
    )
    if size + 2 * padding >= dilation * (kernel - 1) + 1
]


def taps_that_meet_the_image(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[int]:
    """By asking the convolution: those whose weight has an influence."""
    weight = torch.zeros(1, 1, kernel, requires_grad=True)
    ones = torch.ones(1, 1, size)
    torch.nn.functional.conv1d(ones, weight, None, stride, padding, dilation).sum().backward()
    return weight.grad.flatten().nonzero().flatten().tolist()


def test_no_tap_that_meets_the_image_is_left_out() -> None:
    for kind in KINDS:
        start, end, _ = live(*kind)
        left_out = {*range(start), *range(kind[1] - end, kind[1])}
        assert not left_out & set(taps_that_meet_the_image(*kind)), kind


def test_those_of_a_resnet_on_small_maps_are_left_out() -> None:
    assert live(1, 3, 1, 1, 1) == (1, 1, 0)  # one pixel: the center alone
    assert live(2, 3, 2, 1, 1) == (1, 0, 0)  # two pixels to one: the first tap is outside
    assert live(2, 3, 1, 1, 1) == (0, 0, 1)
    assert live(1, 7, 2, 3, 1) == (3, 3, 0)
    assert live(224, 7, 2, 3, 1) == (0, 0, 3)


def gradients(module: nn.Module, images: Tensor) -> list[Tensor]:
    images = images.clone().requires_grad_()
    output = module(images)
    (output * torch.arange(output.numel()).reshape(output.shape)).sum().backward()
    return [output.detach(), images.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_and_gradients_are_those_of_the_whole_kernel(groups) -> None:
    trimmed_kinds = [kind for kind in KINDS if any(live(*kind)[:2])]
    assert len(trimmed_kinds) > 30
    for size, kernel, stride, padding, dilation in trimmed_kinds:
        whole = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups, dtype=torch.float64)
        trimmed = copy.deepcopy(whole)
        images = torch.randn(3, 4, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        trim(trimmed, images)
        for mine, theirs in zip(gradients(trimmed, images), gradients(whole, images), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    rectangular = nn.Conv2d(2, 3, (3, 5), (2, 1), (1, 2), dtype=torch.float64)
    images = torch.randn(2, 2, 1, 2, dtype=torch.float64)
    expected = rectangular(images)
    trim(rectangular, images)
    torch.testing.assert_close(rectangular(images), expected)


def test_second_derivatives_are_those_of_the_whole_kernel() -> None:
    module = nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)
    images = torch.randn(2, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    trim(module, images)
    parameters = tuple(p.detach().clone().requires_grad_() for p in module.parameters())

    def function(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, images).square()

    assert torch.autograd.gradgradcheck(function, (images, *parameters))


@pytest.mark.parametrize("settings", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_other_padding_is_left_alone(settings) -> None:
    module = nn.Conv2d(2, 3, 3, **settings)
    trim(module, torch.zeros(1, 2, 4, 4))
    assert type(module) is nn.Conv2d


def test_a_trimmed_layer_is_still_one_of_its_class() -> None:
    """Its convolution is replaced by the method that nn.Conv2d of PyTorch 2.9 to 2.15 convolves with."""
    module = WeightNormConv2d.of(nn.Conv2d(2, 3, 3, padding=1), eps=1e-24, gain_start="one")
    calls = []
    trim(module, torch.zeros(1, 2, 1, 1))
    assert type(module) is not WeightNormConv2d
    assert isinstance(module, WeightNormConv2d)
    with pytest.MonkeyPatch.context() as patch:
        conv2d = torch.nn.functional.conv2d
        patch.setattr(torch.nn.functional, "conv2d", lambda x, w, *a: (calls.append(w.shape), conv2d(x, w, *a))[1])
        module(torch.zeros(1, 2, 1, 1))
    assert calls == [(3, 2, 1, 1)]


@pytest.mark.parametrize("norm", ["bn", "wn", "nf", "mimicnorm", "mabn", "normprop"])
def test_a_network_keeps_its_function_names_and_copies(make, norm) -> None:
    network = models.build(make(f"norm={norm}"), num_classes=10, image_size=8).double().eval()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    before, names = network(images), list(network.state_dict())
    trim(network, images[:1])
    assert not network.training
    assert list(network.state_dict()) == names
    for same in (network, copy.deepcopy(network)):
        torch.testing.assert_close(same(images), before, rtol=1e-10, atol=1e-10)
    copied = copy.deepcopy(network)
    with torch.no_grad():
        next(copied.parameters()).zero_()  # a copy computes with its own weights
    assert not torch.allclose(copied(images), before)
