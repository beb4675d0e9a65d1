"""Networks as a run gets them."""

import pytest
import torch
from torch import nn

from normlab import models
from normlab.common.errors import UserError


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("depth", "arm", "count"),
    [
        *((18, arm, 11_173_962) for arm in ("bn", "affine")),
        *((18, arm, 11_164_362) for arm in ("bnminus", "none")),
        (50, "bn", 23_520_842),
        (50, "none", 23_467_722),
    ],
)
def test_parameter_counts_are_those_worked_out_for_the_papers_networks(make, depth, arm, count) -> None:
    """docs/papers.md, section 1: 10 classes, 3x3 stem."""
    with torch.device("meta"):
        network = models.build(make(f"depth={depth}", f"norm={arm}"), num_classes=10, image_size=32)
    assert parameters(network) == count


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_depth_builds_and_maps_images_to_classes(make, depth) -> None:
    with torch.device("meta"):
        network = models.build(make(f"depth={depth}"), num_classes=7, image_size=8)
    assert network(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 7)


@pytest.mark.parametrize(("size", "stride"), [(8, 1), (64, 1), (65, 2), (224, 2)])
def test_stem_follows_the_image_size(make, size, stride) -> None:
    with torch.device("meta"):
        assert models.build(make(), num_classes=10, image_size=size).conv1.stride == (stride, stride)


def test_stem_can_be_chosen(make) -> None:
    network = models.build(make("model.stem=imagenet"), num_classes=10, image_size=32)
    assert network.conv1.kernel_size == (7, 7)
    assert isinstance(network.maxpool, nn.MaxPool2d)


def test_another_seed_is_another_start_and_global_random_state_does_not_matter(make) -> None:
    first = models.build(make("seed=0"), num_classes=10, image_size=8)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = models.build(make("seed=0"), num_classes=10, image_size=8)
    assert torch.equal(torch.get_rng_state(), before)
    other = models.build(make("seed=1"), num_classes=10, image_size=8)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_small_stem_is_initialized_like_torchvisions_convolutions(make) -> None:
    """He-normal, fan-out: std = sqrt(2 / (64 · 3 · 3))."""
    stds = [
        models.build(make(f"seed={seed}"), num_classes=10, image_size=8).conv1.weight.std().item() for seed in range(5)
    ]
    assert sum(stds) / 5 == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)


OWN_NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))

def not_a_network(num_classes):
    return num_classes
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch) -> str:
    (tmp_path / "own_nets.py").write_text(OWN_NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_nets"


def test_users_own_network_is_an_ablation_subject(make, own_module) -> None:
    config = make("model=custom", f"model.target={own_module}.Net", "+model.kwargs.width=6", "norm=affine")
    network = models.build(config, num_classes=10, image_size=8)
    assert type(network.bn).__name__ == "ChannelAffine"
    assert network.conv.out_channels == 6


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("own_nets.Nett", "Did you mean model.target=own_nets.Net?"),
        ("own_nets.not_a_network", "not an nn.Module"),
        ("own_nets.Net +model.kwargs.num_classes=3", "model.kwargs.num_classes is set already"),
        ("no_such_package.Net", "importing no_such_package failed"),
    ],
)
def test_a_wrong_path_to_a_network_is_a_sentence(make, own_module, target, says) -> None:
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        models.build(make("model=custom", *f"model.target={target}".split()), num_classes=10, image_size=8)
