"""ICS and landscape: numbers worked out by hand, finite differences, and plain PyTorch on copies."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from probes.snapshots import Chain, rows, snapshot, squared
from small import SmallNet, SmallResNet
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.norms import BatchNorm, rewrite
from normlab.probes import ProbedNetwork
from normlab.probes.ics import ICS
from normlab.probes.landscape import Landscape

ONE = torch.ones(1, 1, dtype=torch.float64)  # sample and target of a chain
CHAIN = Chain(1.0, 2.0)  # its gradient by both numbers is (4, 2)


@pytest.mark.parametrize(("lr", "g_after", "cosine"), [(0.1, 0.24, 1.0), (0.2, -0.24, -1.0)])
def test_ics_of_two_numbers_by_hand(lr, g_after, cosine) -> None:
    """L = (w2 w1 - 1)²: g1 = 2 (w2 w1 - 1) w2 = 4, g2 = 2 (w2 w1 - 1) w1 = 2; then w1' = 1 - 4 lr."""
    [found] = rows(ICS, snapshot(CHAIN, ONE, ONE, lr=lr, criterion=squared), CHAIN)
    assert found["layer"] == "two"
    assert found["position"] == 1
    assert found["gradient_norm"] == pytest.approx(2, rel=1e-12)
    assert found["l2"] == pytest.approx(2 - g_after, rel=1e-12)
    assert found["cosine"] == pytest.approx(cosine, rel=1e-12)


def test_ics_of_the_first_layer_is_none() -> None:
    [found] = rows(ICS, snapshot(CHAIN, ONE, ONE, criterion=squared), CHAIN, layers=["one"])
    assert (found["l2"], found["cosine"]) == (0, pytest.approx(1))


def test_landscape_of_two_numbers_by_hand() -> None:
    """At W - eta g with eta = 0.1: w = (0.6, 1.8), L = 0.08², g = (0.16 · 1.8, 0.16 · 0.6); at 0.05: (0.8, 1.9)."""
    [found] = rows(Landscape, snapshot(CHAIN, ONE, ONE, criterion=squared), CHAIN, reach=[1, 0.5])
    far = math.hypot(4 - 0.16 * 1.8, 2 - 0.16 * 0.6)
    near = math.hypot(4 - 1.04 * 1.9, 2 - 1.04 * 0.8)
    assert found["eta"] == [0.1, 0.05]
    assert found["loss"] == pytest.approx(1, rel=1e-12)
    assert found["losses"] == pytest.approx([0.08**2, 0.52**2], rel=1e-12)
    assert found["gradient_norm"] == pytest.approx(math.sqrt(20), rel=1e-12)
    assert found["gradient_differences"] == pytest.approx([far, near], rel=1e-12)
    assert (found["loss_low"], found["loss_high"]) == pytest.approx((0.08**2, 0.52**2), rel=1e-12)
    assert (found["predictiveness_low"], found["predictiveness_high"]) == pytest.approx((near, far), rel=1e-12)
    assert found["beta"] == pytest.approx(max(far / 0.1, near / 0.05) / math.sqrt(20), rel=1e-12)


def batch(images: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(images) % 4


def network(kind: type[nn.Module] = SmallNet) -> nn.Module:
    torch.manual_seed(1)
    return rewrite(kind(num_classes=4), BatchNorm(eps=1e-5, momentum=0.1)).double().train()


def plain_gradient(net: nn.Module) -> tuple[float, list[Tensor]]:
    """By a backward pass of a copy, with the random numbers of step 3."""
    net = copy.deepcopy(net)
    net.zero_grad()
    torch.manual_seed(3)
    images, targets = batch()
    loss = F.cross_entropy(net(images), targets)
    loss.backward()
    return loss.item(), [parameter.grad for parameter in net.parameters()]


def test_ics_by_copies_of_a_network_with_momentum() -> None:
    """Against loading, layer by layer, what the optimizer made of a copy; after a first step, so momentum counts."""
    net = network(SmallResNet)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    images, targets = batch()
    F.cross_entropy(net(images), targets).backward()
    optimizer.step()
    optimizer.zero_grad()

    order = [  # by torchvision's BasicBlock and the forward pass of SmallResNet
        "conv1", "bn1", "blocks.0.conv1", "blocks.0.bn1", "blocks.0.conv2", "blocks.0.bn2",
        "blocks.1.conv1", "blocks.1.bn1", "blocks.1.conv2", "blocks.1.bn2",
        "blocks.1.downsample.0", "blocks.1.downsample.1", "fc",
    ]  # fmt: skip
    stepped, its_optimizer = copy.deepcopy((net, optimizer))
    torch.manual_seed(3)
    F.cross_entropy(stepped(images), targets).backward()
    its_optimizer.step()

    found = rows(ICS, snapshot(net, images, targets, lr=0.05, optimizer=optimizer), net, layers=99)
    weights = [name for name in order if "bn" not in name and name != "blocks.1.downsample.1"]
    assert [row["layer"] for row in found] == weights[1:]
    assert [row["position"] for row in found] == list(range(1, 7))
    names = [name for name, _ in net.named_parameters()]
    for row in found:
        mixed = copy.deepcopy(net)
        for earlier in order[: order.index(row["layer"])]:
            mixed.get_submodule(earlier).load_state_dict(
                {name: value.detach() for name, value in stepped.get_submodule(earlier).named_parameters()},
                strict=False,
            )
        place = names.index(f"{row['layer']}.weight")
        g, g_after = plain_gradient(net)[1][place], plain_gradient(mixed)[1][place]
        assert row["l2"] == pytest.approx((g - g_after).norm().item(), rel=1e-9)
        assert row["cosine"] == pytest.approx(F.cosine_similarity(g.ravel(), g_after.ravel(), 0).item(), rel=1e-9)
        assert row["gradient_norm"] == pytest.approx(g.norm().item(), rel=1e-9)
    assert min(row["l2"] for row in found) > 1e-3


def test_landscape_by_copies_of_a_network() -> None:
    net = network()
    loss, g = plain_gradient(net)
    length = math.sqrt(sum(part.square().sum().item() for part in g))
    losses, differences = [], []
    for eta in (0.05, 0.1, 0.2, 0.4):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for parameter, part in zip(moved.parameters(), g, strict=True):
                parameter -= eta * part
        there, gradient = plain_gradient(moved)
        losses.append(there)
        change = sum((a - b).square().sum().item() for a, b in zip(gradient, g, strict=True))
        differences.append(math.sqrt(change))
    [found] = rows(Landscape, snapshot(net, *batch(), lr=0.1), net, reach=[0.5, 1, 2, 4])
    assert found["loss"] == pytest.approx(loss, rel=1e-9)
    assert found["losses"] == pytest.approx(losses, rel=1e-9)
    assert found["gradient_differences"] == pytest.approx(differences, rel=1e-9)
    ratios = [d / (eta * length) for d, eta in zip(differences, (0.05, 0.1, 0.2, 0.4), strict=True)]
    assert found["beta"] == pytest.approx(max(ratios), rel=1e-9)


def test_layers_are_chosen_evenly_over_depth_or_by_name() -> None:
    net = network(SmallResNet)

    def chosen(layers) -> list[int]:
        return [row["position"] for row in rows(ICS, snapshot(net, *batch()), net, layers=layers)]

    assert chosen(1) == [1]
    assert chosen(2) == [1, 6]
    assert chosen(3) == [1, 3, 6]
    assert chosen(["fc", "conv1"]) == [0, 6]
    with pytest.raises(UserError, match=r"names blocks\.0\.conv, .*\nNearest: blocks\.0\.conv[12]\."):
        ICS(ProbedNetwork(net), layers=["blocks.0.conv"])


def test_what_is_frozen_neither_steps_nor_is_measured() -> None:
    chain = Chain(1.0, 2.0)
    chain.one.weight.requires_grad_(False)
    [found] = rows(ICS, snapshot(chain, ONE, ONE, criterion=squared), chain, layers=["one", "two"])
    assert (found["layer"], found["l2"]) == ("two", 0)
    [found] = rows(Landscape, snapshot(chain, ONE, ONE, criterion=squared), chain, reach=[1])
    assert found["gradient_norm"] == pytest.approx(2)
