"""Networks as a run gets them."""

import pytest
import torch
from small import SmallNet
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

    @classmethod
    def narrow(cls, num_classes, width=2):
        return cls(num_classes, width)

    class Inner:
        @staticmethod
        def make(num_classes, width=3):
            return Net(num_classes, width)

def not_a_network(num_classes):
    return num_classes
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch) -> str:
    (tmp_path / "own_nets.py").write_text(OWN_NETWORK)
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "nets.py").write_text(OWN_NETWORK)
    (tmp_path / "own_package" / "broken.py").write_text("import own_package.not_there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_nets"


def test_users_own_network_is_an_ablation_subject(make, own_module) -> None:
    config = make("model=custom", f"model.target={own_module}.Net", "+model.kwargs.width=6", "norm=affine")
    network = models.build(config, num_classes=10, image_size=8)
    assert type(network.bn).__name__ == "ChannelAffine"
    assert network.conv.out_channels == 6


@pytest.mark.parametrize(
    ("target", "width"),
    [
        ("own_nets.Net.narrow", 2),
        ("own_nets.Net.Inner.make", 3),
        ("own_package.nets.Net", 4),
        ("own_package.nets.Net.narrow", 2),
    ],
)
def test_a_target_may_be_inside_of_a_class_or_a_package(make, own_module, target, width) -> None:
    config = make("model=custom", f"model.target={target}")
    assert models.build(config, num_classes=10, image_size=8).conv.out_channels == width
    assert set(config.own_code()["model.target"]["modules"]) == {target.partition(".Net")[0]}


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("own_nets.Net.narow", "own_nets.Net has no narow.\nDid you mean model.target=own_nets.Net.narrow?"),
        ("own_package.netz.Net", "own_package has no netz"),
        ("own_package.broken.Net", "importing own_package.broken failed: ModuleNotFoundError"),
        ("own_nets.Nett", "Did you mean model.target=own_nets.Net?"),
        ("own_nets.not_a_network", "not an nn.Module"),
        ("own_nets.Net +model.kwargs.num_classes=3", "model.kwargs.num_classes is set already"),
        ("no_such_package.Net", "importing no_such_package failed"),
    ],
)
def test_a_wrong_path_to_a_network_is_a_sentence(make, own_module, target, says) -> None:
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        models.build(make("model=custom", *f"model.target={target}".split()), num_classes=10, image_size=8)


class Lazy(nn.Module):
    """A network of one's own whose layers get their shapes from the first image, with a BatchNorm1d in the head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LazyConv2d(8, 3, bias=False), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten())
        self.head = nn.Sequential(nn.LazyLinear(32), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Linear(32, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


class AllFrozen(Lazy):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images).detach()

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 8, 8), nn.BatchNorm2d(8)), nn.Flatten()
        self.requires_grad_(False)


class Maps(nn.Module):
    """A convolution is the classifier; its maps of `side` pixels are the logits, or flattened to them."""

    def __init__(self, num_classes: int, side: int = 1, flatten: bool = True) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)
        self.classifier = nn.Conv2d(64, num_classes // side, (6, 7 - side))
        self.end = nn.Flatten() if flatten else nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.end(self.classifier(torch.relu(self.bn(self.conv(images)))))


def custom(make, name: str, *settings: str) -> nn.Module:
    config = make("model=custom", f"model.target={__name__}.{name}", *settings)
    return models.build(config, num_classes=10, image_size=8)


def test_lazy_layers_get_their_shapes_before_the_rewrite_and_the_seed_their_start(make) -> None:
    first, again, other = (custom(make, "Lazy", f"seed={seed}", "norm=none") for seed in (0, 0, 1))
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in first.modules())
    weights = [network.get_parameter("head.0.weight") for network in (first, again, other)]
    assert weights[0].shape == (32, 8 * 6 * 6)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert all(module.training for module in first.modules())


def test_a_network_without_a_trainable_parameter_is_a_sentence(make) -> None:
    with pytest.raises(UserError, match="custom with norm=none has no trainable parameter"):
        custom(make, "AllFrozen", "norm=none")


def doubled(num_classes: int) -> nn.Module:
    return SmallNet(num_classes).double()


def test_a_network_that_is_not_in_float32_is_a_sentence(make) -> None:
    with pytest.raises(UserError, match="of custom is float64, and images are float32"):
        custom(make, "doubled")


@pytest.mark.parametrize("flatten", [True, False])
def test_mimicnorm_normalizes_the_logits_of_a_convolution(make, flatten: bool) -> None:
    network = custom(make, "Maps", "norm=mimicnorm", f"+model.kwargs.flatten={flatten}")
    logits = network(torch.randn(32, 3, 8, 8)).flatten(1)
    assert logits.shape == (32, 10)
    torch.testing.assert_close(logits.mean(0), torch.zeros(10), rtol=0, atol=1e-5)


def test_mimicnorm_refuses_logits_that_are_positions(make) -> None:
    network = custom(make, "Maps", "norm=mimicnorm", "+model.kwargs.side=2")
    with pytest.raises(UserError, match="takes the 5 outputs of the last layer for logits, and the network has 10"):
        network(torch.randn(32, 3, 8, 8))
