"""Adaptive clipping and BNP-style conditioning, each against a derivation of its own in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab import models
from normlab.common.errors import UserError
from normlab.training.gradient_transforms import AdaptiveClipping, Preconditioner, build_transform


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 2), nn.Flatten(), nn.Linear(4 * 9, 10))
    return layers.double()


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 + 1


def backward(network: nn.Module) -> None:
    F.cross_entropy(network(images()), torch.arange(6)).backward()


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("ratio", [1e-4, 0.01, 1e3])
def test_adaptive_clipping_equals_the_formula_unit_by_unit(ratio, vectors) -> None:
    network = small_network()
    backward(network)
    with torch.no_grad():
        network[0].weight[2] = 0  # a unit shorter than the least norm
        network[2].weight.grad[1] = 0
        network[2].bias.zero_()  # a vector shorter than the least norm
    before = {name: p.grad.numpy().copy() for name, p in network.named_parameters()}
    AdaptiveClipping(network, ratio, vectors=vectors)()
    for name, parameter in network.named_parameters():
        weights, grads = parameter.detach().numpy(), before[name]
        if name == "4.weight" or (grads.ndim == 1 and not vectors):  # the classifier, and what is no weight
            expected = grads
        else:
            units = [weights[None], grads[None]] if grads.ndim == 1 else [weights, grads]
            expected = np.empty_like(grads)
            for unit, (w, g) in enumerate(zip(*units, strict=True)):
                length = np.sqrt((g**2).sum())
                longest = ratio * max(np.sqrt((w**2).sum()), 1e-3)
                clipped = g * longest / length if length > longest else g
                expected[... if grads.ndim == 1 else unit] = clipped
        np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=1e-12, atol=0)


class OutOfOrder(nn.Module):
    """Declares its classifier first; has a norm of the user's own, whose forward pass cannot be traced."""

    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.std() if bool(x.std() > 0) else x

    def __init__(self, classifier: nn.Module, hidden: nn.Module) -> None:
        super().__init__()
        self.classifier, self.hidden, self.norm = classifier, hidden, self.Norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.hidden(x)))


@pytest.mark.parametrize("layer", [nn.Linear, lambda a, b: nn.Conv2d(a, b, 1)])
def test_the_classifier_is_what_is_executed_last(layer) -> None:
    network = OutOfOrder(layer(4, 3), layer(2, 4))
    (clipped,) = AdaptiveClipping(network, 0.01, vectors=False).parameters
    assert clipped is network.hidden.weight


def step_with_normalized_inputs(layer: nn.Conv2d | nn.Linear, h: Tensor, loss, rate: float) -> tuple[Tensor, Tensor]:
    """A plain gradient step in V, c of a = V·(h - mu)/s + c, written as the W, b of a = W·h + b."""
    over = (0, 2, 3) if isinstance(layer, nn.Conv2d) else (0,)
    mu, s = h.mean(over), h.var(over, correction=0).sqrt()
    shape = (1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (1, -1)
    v = (layer.weight.detach() * s.view(shape)).requires_grad_()
    c = layer.bias.detach() + (layer.weight.detach() * mu.view(shape)).flatten(1).sum(1)
    c.requires_grad_()
    normalized = (h - mu.view(shape)) / s.view(shape)
    a = F.conv2d(normalized, v, c, layer.stride) if isinstance(layer, nn.Conv2d) else F.linear(normalized, v, c)
    loss(a).backward()
    v_next, c_next = v.detach() - rate * v.grad, c.detach() - rate * c.grad
    weight = v_next / s.view(shape)
    return weight, c_next - (weight * mu.view(shape)).flatten(1).sum(1)


@pytest.mark.parametrize("layer", [nn.Linear(7, 4), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 2, 2)])
def test_conditioning_equals_a_plain_step_with_normalized_inputs(layer) -> None:
    layer = layer.double()
    shape = (6, 7) if isinstance(layer, nn.Linear) else (6, 3, 6, 6)
    h = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3 + 1

    def loss(a: Tensor) -> Tensor:
        return (a.sin() * torch.linspace(-1, 1, a.numel(), dtype=a.dtype).view_as(a)).sum()

    weight, bias = step_with_normalized_inputs(layer, h, loss, rate=0.1)
    condition = Preconditioner(layer)
    loss(layer(h)).backward()
    condition()
    torch.testing.assert_close(layer.weight - 0.1 * layer.weight.grad, weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.bias - 0.1 * layer.bias.grad, bias, rtol=1e-10, atol=1e-12)


def test_conditioning_of_a_grouped_convolution_is_that_of_its_parts() -> None:
    grouped = nn.Conv2d(4, 6, 2, groups=2).double()
    parts = [nn.Conv2d(2, 3, 2).double() for _ in range(2)]
    with torch.no_grad():
        for i, part in enumerate(parts):
            part.weight.copy_(grouped.weight[3 * i : 3 * i + 3])
            part.bias.copy_(grouped.bias[3 * i : 3 * i + 3])
    h = torch.randn(5, 4, 4, 4, dtype=torch.float64) + 1
    h[:, 2:] *= 2  # the same spread of variances in each part, so that no floor acts
    conditions = [Preconditioner(grouped), *map(Preconditioner, parts)]
    grouped(h).square().sum().backward()
    for i, part in enumerate(parts):
        part(h[:, 2 * i : 2 * i + 2]).square().sum().backward()
    for condition in conditions:
        condition()
    expected = torch.cat([part.weight.grad for part in parts])
    torch.testing.assert_close(grouped.weight.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "h"),
    [
        (nn.Linear(3, 2), torch.full((7, 3), 0.1)),
        (nn.Conv2d(3, 4, 3, padding=1), torch.randn(1, 3, 1, 1)),
        (nn.Conv2d(3, 4, 3, padding=1), torch.randn(1, 3, 1, 1).repeat(4, 1, 1, 1)),
        (nn.Conv2d(3, 4, 1), torch.full((4, 3, 2, 2), 5.0) + 0.01 * torch.randn(4, 3, 2, 2)),
        (nn.Conv2d(3, 4, 1), torch.zeros(4, 3, 2, 2)),
    ],
)
def test_a_layer_whose_inputs_do_not_vary_keeps_its_gradients(layer, h) -> None:
    condition = Preconditioner(layer)
    layer(h).square().sum().backward()
    plain = layer.weight.grad.clone(), layer.bias.grad.clone()
    condition()
    assert torch.equal(layer.weight.grad, plain[0])
    assert torch.equal(layer.bias.grad, plain[1])


@pytest.mark.parametrize(("norm", "why"), [("wn", "conv1 is a WeightNormConv2d"), ("none", "conv1 has no bias")])
def test_conditioning_that_cannot_be_is_refused_in_a_sentence(make, norm, why) -> None:
    config = make(f"norm={norm}", "optimizer.precondition=bnp")
    network = models.build(config, num_classes=10, image_size=8)
    with pytest.raises(UserError, match=why):
        build_transform(config.optimizer, network)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
def test_the_shipped_arms_set_what_they_are_about(make, optimizer) -> None:
    assert make("norm=bnp", f"optimizer={optimizer}").optimizer.precondition == "bnp"
    assert make("norm=nf", f"optimizer={optimizer}").optimizer.agc == 0.01
    assert make("norm=nf", f"optimizer={optimizer}", "optimizer.agc=null").optimizer.agc is None
    assert make("norm=bn", f"optimizer={optimizer}").optimizer.precondition is None
