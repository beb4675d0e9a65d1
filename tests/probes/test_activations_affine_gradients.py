"""Activations against numpy and scipy, affine against planted changes, gradients against a plain backward pass."""

import copy
import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from probes.snapshots import rows, snapshot
from small import SmallNet
from torch import Tensor, nn

from normlab import models
from normlab.norms import find_sites
from normlab.probes import ProbedNetwork, activations
from normlab.probes.activations import Activations
from normlab.probes.affine import AffineDrift
from normlab.probes.gradients import GradientNorms

SITES = tuple(site.norm for site in find_sites(SmallNet(num_classes=4)))  # body.1, body.4


def build(make, *settings: str) -> nn.Module:
    config = make("model=custom", "model.target=small.SmallNet", *settings)
    torch.manual_seed(0)
    return models.build(config, num_classes=4, image_size=8)


def batch(images: int = 40) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(images, 3, 8, 8) ** 3, torch.arange(images) % 4  # heavy tails: some values are large


def expected(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """By channel, of arrays (C, values)."""
    z = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    return {
        "mean": y.mean(1).mean(),
        "variance": y.var(1).mean(),
        "skewness": scipy.stats.skew(y, axis=1).mean(),
        "large": (np.abs(y) > 3).mean(),
        "large_normalised": (np.abs(z) > 3).mean(),
        "output_norm": np.sqrt((x**2).mean()),
    }


def channels(values: Tensor) -> np.ndarray:
    return values.detach().double().transpose(0, 1).flatten(1).numpy()


def test_activations_of_batch_normalisation_are_those_of_numpy(make) -> None:
    network = build(make, "norm=bn")
    with torch.no_grad():
        network.body[1].weight.uniform_(0.5, 4)
        network.body[1].bias.uniform_(-1, 1)
    images, targets = batch()
    x = channels(F.conv2d(images, network.body[0].weight, padding=1))
    scale, shift = (p.detach().double().numpy()[:, None] for p in (network.body[1].weight, network.body[1].bias))
    y = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * scale + shift
    first, second = rows(Activations, snapshot(network, images, targets), network, SITES, histograms=0)
    assert (first["layer"], first["position"]) == ("body.1", 0)
    assert (second["layer"], second["position"]) == ("body.4", 1)
    assert {key: first[key] for key in expected(x, y)} == pytest.approx(expected(x, y), rel=1e-4)
    assert first["large"] > 0.01  # or the comparison says nothing
    assert first["large_normalised"] > 0.01
    assert first["histogram"] is first["edges"] is None


def test_an_arm_without_norm_has_rows_of_its_convolutions(make) -> None:
    network = build(make, "norm=none", "norm.conv_bias=true")
    with torch.no_grad():
        network.body[0].bias.uniform_(-2, 2)
        network.body[0].weight[0] = 0  # a channel without variance has no skewness, and nothing large
    images, targets = batch()
    x = channels(F.conv2d(images, network.body[0].weight, network.body[0].bias, padding=1))
    first, _ = rows(Activations, snapshot(network, images, targets), network, SITES, histograms=0)
    found = {key: first[key] for key in ("mean", "variance", "large", "output_norm")}
    plain = {
        "mean": x.mean(1).mean(),
        "variance": x.var(1).mean(),
        "large": (np.abs(x) > 3).mean(),
        "output_norm": np.sqrt((x**2).mean()),
    }
    assert found == pytest.approx(plain, rel=1e-4)
    assert first["skewness"] == pytest.approx(expected(x[1:], x[1:])["skewness"], rel=1e-3)
    assert first["large_normalised"] == pytest.approx(expected(x[1:], x[1:])["large_normalised"] * 7 / 8, rel=1e-4)


def by_pairs(a: np.ndarray) -> tuple[float, float]:
    """Mean cosine of the pairs of rows (those that are not zero) and stable rank of (samples, features), by loops."""
    total, pairs = 0.0, 0
    for n, one in enumerate(a):
        for m, other in enumerate(a):
            lengths = sum(v * v for v in one) ** 0.5 * sum(v * v for v in other) ** 0.5
            if n != m and lengths > 0:
                total, pairs = total + sum(v * w for v, w in zip(one, other, strict=True)) / lengths, pairs + 1
    direction = np.arange(1.0, 1 + a.shape[1])
    for _ in range(3000):  # the power method
        direction = a.T @ (a @ direction)
        direction /= np.linalg.norm(direction)
    return total / pairs, sum(v * v for row in a for v in row) / np.linalg.norm(a @ direction) ** 2


@pytest.mark.parametrize("zeros", [0, 2])
def test_samples_are_compared_as_loops_over_pairs_do(make, zeros) -> None:
    network = build(make, "norm=none")
    images, targets = batch(7)
    images = 0.3 * images + 1
    images[:zeros] = 0
    x = F.conv2d(images.double(), network.body[0].weight.double(), padding=1).detach().flatten(1).numpy()
    found, _ = rows(Activations, snapshot(network, images, targets), network, SITES, histograms=0)
    cosine, rank = by_pairs(x)
    assert found["sample_cosine"] == pytest.approx(cosine, abs=2e-6)
    assert found["stable_rank"] == pytest.approx(rank, rel=2e-5)
    assert abs(cosine) > 0.01  # or the comparison says nothing
    assert 1 < rank < 7 - zeros


def test_equal_samples_have_cosine_and_stable_rank_1_and_orthogonal_ones_0_and_their_number() -> None:
    same = torch.tensor([[1.0, -2.0, 3.0]]).repeat(5, 1)[:, :, None, None]
    scaled = same * torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])[:, None, None, None]
    for y, expected in ((scaled, (1, 1)), (2 * torch.eye(4)[:, :, None, None], (0, 4)), (-same[:1], (math.nan, 1))):
        found = activations._between_samples(y)
        assert tuple(found.values()) == pytest.approx(expected, nan_ok=True)
    for y in (torch.zeros(3, 2, 1, 1), torch.full((3, 2, 1, 1), math.inf)):
        assert all(map(math.isnan, activations._between_samples(y).values()))


@pytest.mark.parametrize("split", [1, 5, 48])
def test_features_are_summed_in_parts_whatever_their_number(split, monkeypatch) -> None:
    y = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = activations._between_samples(y)
    monkeypatch.setattr(activations, "SUMMED", split)
    assert activations._between_samples(y) == pytest.approx(whole, rel=1e-12)
    assert activations._between_samples(y.to(memory_format=torch.channels_last)) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("norm", ["noisy_bn", "wn_trelu", "frn", "mimicnorm"])
def test_every_arm_has_a_row_per_site(make, norm) -> None:
    network = build(make, f"norm={norm}")
    found = rows(Activations, snapshot(network, *batch()), network, SITES)
    assert [row["layer"] for row in found] == ["body.1", "body.4"]
    assert all(np.isfinite(row["variance"]) for row in found)


def test_a_histogram_counts_one_channel_between_the_edges_of_the_first_measurement(make) -> None:
    network = build(make, "norm=bn")
    images, targets = batch()
    probe = Activations(ProbedNetwork(network, SITES), histograms=1, bins=10)
    first, second = probe.measure(snapshot(network, images, targets))
    assert second["histogram"] is None
    y = channels(network.train().body[:2](images))
    edges = np.array(first["edges"])

    def counts(values: np.ndarray) -> list[int]:
        return np.histogram(np.clip(values, *edges[[0, -1]]), edges)[0].tolist()

    [channel] = [c for c in range(8) if counts(y[c]) == first["histogram"]]
    assert edges == pytest.approx(np.linspace(-5, 5, 11) * y[channel].std() + y[channel].mean(), abs=1e-5)
    assert sum(first["histogram"]) == 40 * 64

    resumed = Activations(ProbedNetwork(network, SITES), histograms=1, bins=10)
    resumed.load_state_dict(copy.deepcopy(probe.state_dict()))
    with torch.no_grad():
        network.body[1].weight.fill_(20)  # beyond the outermost edges
    later, _ = resumed.measure(snapshot(network, images, targets))
    assert later["edges"] == first["edges"]
    assert later["histogram"] == counts(y[channel] * 20)


@pytest.mark.parametrize(
    ("chosen", "total", "measured"),
    [([0, 5, 9], 10, {0, 1, 5, 6, 8, 9}), ([9], 10, {8, 9}), ([0], 1, {0}), ([0, 1], 2, {0, 1})],
)
def test_activations_are_measured_in_pairs_of_steps(chosen, total, measured) -> None:
    probe = Activations(ProbedNetwork(SmallNet(4), SITES))
    assert set(probe.steps(chosen, total)) == measured


def test_affine_measures_planted_changes(make) -> None:
    network = build(make, "norm=bn", "norm.scale_init=0.5")
    probe = AffineDrift(ProbedNetwork(network))
    first, _ = probe.measure(snapshot(network, *batch()))
    assert first == {
        "layer": "body.1", "position": 0,
        "scale_mean": 0.5, "scale_std": 0.0, "scale_drift": 0.0, "scale_start": 0.5,
        "shift_mean": 0.0, "shift_std": 0.0, "shift_drift": 0.0,
    }  # fmt: skip
    with torch.no_grad():
        network.body[4].weight += torch.tensor([3.0, -3.0] * 8)
        network.body[4].bias.copy_(torch.tensor([1.0] * 4 + [0.0] * 12))
    resumed = AffineDrift(ProbedNetwork(network))  # as a resume makes it: from weights that have moved
    resumed.load_state_dict(probe.state_dict())
    first, second = resumed.measure(snapshot(network, *batch()))
    assert (first["scale_drift"], first["shift_drift"]) == (0, 0)
    assert (second["layer"], second["position"]) == ("body.4", 1)
    assert second["scale_mean"] == pytest.approx(0.5)
    assert second["scale_std"] == second["scale_drift"] == pytest.approx(3)
    assert second["scale_start"] == 0.5
    assert second["shift_mean"] == pytest.approx(0.25)
    assert second["shift_std"] == pytest.approx(np.sqrt(3) / 4)
    assert second["shift_drift"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("norm", "layers", "has"),
    [
        ("none", [], None),
        ("affine", ["body.1", "body.4"], ("scale", "shift")),
        ("wn", ["body.0", "body.3"], ("scale",)),  # its gain; its bias is a bias
        ("frn", ["body.1", "body.4"], ("scale", "shift")),
        ("wn_trelu", ["body.1", "body.4"], ("shift",)),
        ("renorm", ["body.1", "body.4"], ("shift",)),
    ],
)
def test_affine_has_rows_for_layers_with_a_learned_scale_or_shift(make, norm, layers, has) -> None:
    settings = ["norm.learn_scale=false"] if norm == "renorm" else []
    network = build(make, f"norm={norm}", *settings)
    found = rows(AffineDrift, snapshot(network, *batch()), network)
    assert [row["layer"] for row in found] == layers
    for row in found:
        for role in ("scale", "shift"):
            assert (row[f"{role}_mean"] is not None) == (row[f"{role}_drift"] is not None) == (role in has)
        assert (row["scale_start"] is not None) == ("scale" in has)


def test_gradients_are_those_of_a_backward_pass(make) -> None:
    network = build(make, "norm=bn").double()
    images, targets = batch()
    found = rows(GradientNorms, snapshot(network, images.double(), targets), network)
    torch.manual_seed(3)
    F.cross_entropy(network(images.double()), targets).backward()
    assert [(row["layer"], row["position"]) for row in found] == [("body.0", 0), ("body.3", 1), ("head", 2)]
    for row in found:
        weight = network.get_submodule(row["layer"]).weight
        assert row["norm"] == pytest.approx(weight.grad.norm().item(), rel=1e-9)
        assert row["weight_norm"] == pytest.approx(weight.norm().item(), rel=1e-9)
