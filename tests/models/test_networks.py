"""The papers' networks and torchvision's, against the sizes and numbers that their papers give."""

import numpy as np
import pytest
import torch
from torch import nn

from normlab import models
from normlab.common.errors import UserError
from normlab.models.networks import CifarBlock
from normlab.norms import find_sites
from normlab.runs import run_names
from normlab.runs.identity import run_id
from normlab.training.run import train_run


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def sizes(network: nn.Module, kind: type[nn.Module], images: torch.Tensor) -> list[tuple[int, ...]]:
    """(channels, height) of the output of every module of a kind, in order of execution."""
    seen: list[tuple[int, ...]] = []
    for module in network.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:3])))
    network(images)
    return seen


def meta(network: nn.Module, side: int) -> tuple[nn.Module, torch.Tensor]:
    return network.to("meta"), torch.empty(2, 3, side, side, device="meta")


# --- He et al. 2016 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "millions"), [(20, "0.27"), (56, "0.85"), (110, "1.7")])
def test_cifar_resnets_have_the_parameters_of_the_papers_table_6(make, depth, millions) -> None:
    with torch.device("meta"):
        network = models.build(make("model=cifar_resnet", f"depth={depth}"), num_classes=10, image_size=32)
    assert f"{parameters(network) / 1e6:.{len(millions) - 2}f}" == millions


def test_cifar_resnet_has_three_stages_on_maps_of_32_16_and_8(make) -> None:
    network = models.build(make("model=cifar_resnet"), num_classes=10, image_size=32)
    network, images = meta(network, 32)
    assert sizes(network, nn.Conv2d, images) == [(16, 32)] * 7 + [(32, 16)] * 6 + [(64, 8)] * 6


def test_a_shortcut_without_parameters_takes_every_second_pixel_and_adds_zeros() -> None:
    block = CifarBlock(2, 5).eval()
    nn.init.zeros_(block.bn2.weight)  # the residual branch gives 0
    x = np.random.default_rng(0).normal(size=(3, 2, 6, 6)).astype(np.float32)
    expected = np.zeros((3, 5, 3, 3), np.float32)
    expected[:, :2] = np.maximum(x[:, :, ::2, ::2], 0)
    np.testing.assert_array_equal(block(torch.from_numpy(x)).detach().numpy(), expected)


def test_a_block_is_the_sum_of_its_branches() -> None:
    """In NumPy: with 1x1 images a 3x3 convolution is its central matrix, a fresh norm in evaluation the identity."""
    block = CifarBlock(4, 4).double().eval()
    x = np.random.default_rng(0).normal(size=(5, 4))
    first, second = (c.weight[:, :, 1, 1].detach().numpy() for c in (block.conv1, block.conv2))
    norm = 1 / np.sqrt(1 + 1e-5)
    expected = np.maximum(x + np.maximum(x @ first.T * norm, 0) @ second.T * norm, 0)
    found = block(torch.from_numpy(x)[:, :, None, None]).detach().numpy()[:, :, 0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# --- Gitman & Ginsburg 2017 ---------------------------------------------------------------------------


@pytest.fixture
def gitman(make) -> nn.Module:
    return models.build(make("model=gitman_cifar", "norm=bn"), num_classes=10, image_size=28)


def test_gitmans_network_has_the_sizes_of_its_configuration_files(gitman) -> None:
    """docs/papers.md, section 2: pools to 14 and 7, which takes Caffe's rounding up; 5x5 before the average."""
    network, images = meta(gitman, 28)
    maps = sizes(network, nn.Conv2d, images)
    assert maps == [(128, 28)] * 3 + [(256, 14)] * 3 + [(320, 5), (320, 5), (10, 5)]
    assert sizes(network, nn.MaxPool2d, images) == [(128, 14), (256, 7)]
    assert network(images).shape == (2, 10)


def test_gitmans_network_has_a_share_of_its_filters(make) -> None:
    narrow = models.build(make("model=gitman_cifar", "norm=bn", "model.width=0.25"), num_classes=10, image_size=28)
    network, images = meta(narrow, 28)
    maps = sizes(network, nn.Conv2d, images)
    assert maps == [(32, 28)] * 3 + [(64, 14)] * 3 + [(80, 5), (80, 5), (10, 5)]


def test_gitmans_network_is_normalized_after_the_third_and_the_sixth_convolution_only(gitman) -> None:
    kinds = [type(module).__name__.replace("GroupedB", "B") for module in gitman.features]
    plain, normalized = ["Conv2d", "ReLU"], ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]
    assert kinds == (plain * 2 + normalized) * 2 + plain * 3
    convolutions = [module for module in gitman.features if isinstance(module, nn.Conv2d)]
    assert [c.bias is None for c in convolutions] == [number in (3, 6) for number in range(1, 10)]


def test_gitmans_network_starts_as_caffes_xavier(gitman) -> None:
    """U(-a, a) with a = sqrt(3 / fan-in): the largest weight is next to a, and the variance is 1 / fan-in."""
    for module in gitman.features:
        if isinstance(module, nn.Conv2d):
            fan_in = module.in_channels * module.kernel_size[0] ** 2
            assert module.weight.abs().max().item() == pytest.approx((3 / fan_in) ** 0.5, rel=0.01)
            assert module.weight.var().item() == pytest.approx(1 / fan_in, rel=0.05)
            assert module.bias is None or not module.bias.any()


# --- Santurkar et al. 2018 ----------------------------------------------------------------------------


def test_a_deep_linear_network_is_a_product_of_matrices(make) -> None:
    network = models.build(make("model=deep_linear", "norm=none"), num_classes=10, image_size=1).double()
    product = np.eye(10)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.kernel_size == (1, 1), name
            product = module.weight.detach().numpy()[:, :, 0, 0] @ product
    x = np.random.default_rng(0).normal(size=(7, 10))
    found = network(torch.from_numpy(x)[:, :, None, None]).detach().numpy()
    np.testing.assert_allclose(found, x @ product.T, rtol=1e-10)


def test_a_deep_linear_network_has_as_many_square_layers_as_asked_for(make) -> None:
    config = make("model=deep_linear", "depth=4", "norm=bn")
    network = models.build(config, num_classes=6, image_size=1)
    assert parameters(network) == 4 * (6 * 6 + 2 * 6)
    weights = torch.cat([m.weight.flatten() for m in network.modules() if isinstance(m, nn.Conv2d)])
    assert weights.abs().max() <= (6 / (6 + 6)) ** 0.5  # Glorot & Bengio 2010, equation 16
    assert weights.abs().max() > 0.95 * (6 / (6 + 6)) ** 0.5


# --- torchvision --------------------------------------------------------------------------------------


def test_small_vgg_has_its_convolutions_and_one_linear_layer(make) -> None:
    """14,714,688 weights and biases of VGG-16's convolutions (Simonyan & Zisserman 2015, configuration D),
    4,224 channels with scale and shift, 512 · 10 + 10."""
    network = models.build(make("model=vgg", "norm=bn"), num_classes=10, image_size=32)
    assert parameters(network) == 14_714_688 + 2 * 4_224 + 5_130
    network, images = meta(network, 32)
    assert network(images).shape == (2, 10)


def test_small_vgg_starts_as_torchvisions(make) -> None:
    network = models.build(make("model=vgg", "depth=11", "norm=bn"), num_classes=1000, image_size=64)
    for module in network.features:
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx((2 / (9 * module.out_channels)) ** 0.5, rel=0.05)
            assert not module.bias.any()
        if isinstance(module, nn.BatchNorm2d):
            assert {*module.running_mean.tolist(), *module.bias.tolist()} == {0}
            assert {*module.running_var.tolist(), *module.weight.tolist()} == {1}
    assert network.classifier.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert not network.classifier.bias.any()


@pytest.mark.parametrize("settings", [("model.head=imagenet", 32), ("model.head=null", 65)])
def test_large_vgg_has_three_linear_layers(make, settings) -> None:
    head, side = settings
    with torch.device("meta"):
        network = models.build(make("model=vgg", "depth=11", head), num_classes=1000, image_size=side)
    assert parameters(network) == 132_868_840  # num_params of torchvision's VGG11_BN_Weights
    assert network(torch.empty(2, 3, side, side, device="meta")).shape == (2, 1000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("vgg11_bn", "inception_v3", "googlenet", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf", "densenet121"),
        *("shufflenet_v2_x1_0", "mnasnet1_0"),
    ],
)
def test_every_norm_of_torchvisions_networks_is_a_site(make, name) -> None:
    config = make("model=torchvision", f"model.name={name}", "norm=affine")
    with torch.device("cpu" if name == "regnet_y_400mf" else "meta"):  # whose sizes are computed with tensors
        plain = models.networks.make(config, num_classes=7, image_size=96)
        norms = {key for key, module in plain.named_modules() if isinstance(module, nn.BatchNorm2d)}
        assert {site.norm for site in find_sites(plain)} == norms
        network = models.build(config, num_classes=7, image_size=96)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert {key for key, module in network.named_modules() if type(module).__name__ == "ChannelAffine"} == norms
    network, images = meta(network, 96)
    assert network(images).shape == (2, 7)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("model.name=ResNext50_32x4",), "Did you mean model.name=resnext50_32x4d?"),
        (("model.name=fcn_resnet50",), "no classification network of torchvision"),
        (("model.name=vit_b_16",), "has no batch normalization layer"),
        (("model.name=mobilenet_v2", "+model.kwargs.width=2"), "unexpected keyword argument 'width'"),
        (("model.name=googlenet", "+model.kwargs.aux_logits=true"), "model.kwargs.aux_logits is set already"),
        (("model.name=resnet18", "+model.kwargs.weights=DEFAULT"), "model.kwargs.weights is set already"),
        (
            ("model.name=resnet18", "+model.kwargs.replace_stride_with_dilation=[false,true,true]"),
            "resnet18 cannot be made with model.kwargs",
        ),
    ],
)
def test_a_network_that_torchvision_cannot_make_is_a_sentence(make, settings, says) -> None:
    with pytest.raises(UserError) as error, torch.device("meta"):
        models.build(make("model=torchvision", *settings), num_classes=10, image_size=224)
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) <= 5


def test_arguments_reach_torchvisions_builder(make) -> None:
    config = make("model=torchvision", "model.name=mobilenet_v2", "+model.kwargs.width_mult=0.5")
    assert models.networks.make(config, num_classes=10, image_size=32).features[0][0].out_channels == 16


# --- All ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["resnet", "cifar_resnet", "gitman_cifar", "deep_linear", "vgg"])
def test_a_seed_is_a_start_that_arms_share(make, model) -> None:
    def weights(*settings: str) -> dict[str, torch.Tensor]:
        network = models.build(make(f"model={model}", *settings), num_classes=10, image_size=32)
        layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        biases = {f"{name}.bias": m.bias for name, m in layers.items() if isinstance(m, nn.Linear)}
        return biases | {f"{name}.weight": m.weight for name, m in layers.items()}

    reference = weights("seed=1", "norm=bn")
    for arm in ("affine", "none"):
        torch.testing.assert_close(weights("seed=1", f"norm={arm}"), reference, rtol=0, atol=0)
    other = weights("seed=2", "norm=bn")
    assert not any(torch.equal(weight, other[name]) for name, weight in reference.items() if name.endswith("weight"))


@pytest.mark.parametrize("model", ["vgg", "gitman_cifar", "inception_v3"])
def test_images_that_are_too_small_are_a_sentence(make, model) -> None:
    with pytest.raises(UserError) as error:
        train_run(make(f"model={model}", "dataset=digits", "device=cpu", "threads=1"))
    assert f"A batch of 128 images of 8x8 pixels does not fit {model} with norm=bn" in str(error.value)
    assert "Use larger images" in str(error.value)


def test_vgg_of_a_quarter_of_its_width_has_a_quarter_of_the_filters_at_every_place(make) -> None:
    def filters(*settings: str) -> list[int]:
        config = make("model=vgg", "depth=13", *settings)
        network = models.build(config, num_classes=10, image_size=32)
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        return [layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)]

    assert filters("model.width=0.25") == [size // 4 for size in filters()] == [16, 16, 32, 32, 64, 64, *[128] * 4]


def test_the_large_head_of_vgg_takes_all_filters(make) -> None:
    with pytest.raises(UserError, match=r"model.width=0.5 needs model.head=small"):
        models.build(make("model=vgg", "model.width=0.5", "model.head=imagenet"), num_classes=10, image_size=32)


@pytest.mark.parametrize(
    "network",
    [("depth=18", "model.stem=small"), ("depth=50", "model.stem=imagenet"), ("model=binary_resnet",)],
    ids=" ".join,
)
def test_a_resnet_of_a_quarter_of_its_width_has_a_quarter_of_the_channels_at_every_place(make, network) -> None:
    def channels(*settings: str) -> list[tuple[int, ...]]:
        config = make(*network, *settings)
        with torch.device("meta"):
            built = models.build(config, num_classes=7, image_size=32)
        layers = (layer for layer in built.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.Linear))
        return [tuple(layer.weight.shape) for layer in layers]

    def quarter(shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(size // 4 if size >= 64 else size for size in shape)  # not 3 colors, 7 classes, sides of filters

    narrow = channels("model.width=0.25")
    assert narrow == [quarter(shape) for shape in channels()]
    assert channels("model.width=1.0") == channels()


@pytest.mark.parametrize("width", [0.125, 0.3, 0.75])
def test_a_narrow_resnet_starts_as_torchvisions(make, width) -> None:
    network = models.build(make(f"model.width={width}", "model.stem=imagenet"), num_classes=10, image_size=32)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):  # He et al. 2015, normal, by the fan-out
            expected = (2 / (layer.out_channels * layer.kernel_size[0] ** 2)) ** 0.5
            assert layer.weight.std().item() == pytest.approx(expected, rel=5 / (2 * layer.weight.numel()) ** 0.5)
        elif isinstance(layer, nn.BatchNorm2d):
            assert torch.equal(layer.weight, torch.ones_like(layer.weight))
            assert not layer.bias.any()
            assert torch.equal(layer.running_var, torch.ones_like(layer.bias))
            assert not layer.running_mean.any()
    bound = network.fc.in_features**-0.5  # nn.Linear's uniform start
    assert 0.9 * bound < network.fc.weight.abs().max() <= bound
    assert network.fc.bias.abs().max() <= bound
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("width", ["0.12", "1.5", "0", "true"])
def test_widths_out_of_range_are_refused(make, width) -> None:
    with pytest.raises(UserError, match=rf"model.width={width}"):
        make(f"model.width={width}")


def test_whole_trained_weights_do_not_fit_a_narrow_network(make) -> None:
    with pytest.raises(UserError, match=r"model.width=0.5 makes a narrower one.\nUse model.width=1"):
        make("model.width=0.5", "model.weights=DEFAULT")


def test_the_width_is_part_of_an_identity_and_of_a_label_only_where_it_is_not_one(make) -> None:
    whole, narrow = (make(f"model.width={width}").as_dict() for width in (1.0, 0.25))
    before = {**whole, "model": {key: value for key, value in whole["model"].items() if key != "width"}}
    assert run_id(before) == run_id(whole) != run_id(narrow)
    assert run_names([before, narrow]) == ["bn width=1 seed=0", "bn width=0.25 seed=0"]


def test_dropout_stands_before_the_classifier_and_changes_no_weight(make) -> None:
    plain, dropping = (models.build(make(f"model.dropout={p}"), num_classes=10, image_size=8) for p in (0.0, 0.5))
    images = torch.randn(4, 3, 8, 8)
    for (name, weight), (other_name, other) in zip(plain.named_parameters(), dropping.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(weight, other)
    seen: list[torch.Tensor] = []
    dropping.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    plain.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    dropping(images)
    plain(images)
    kept = seen[0] != 0
    assert 0.3 < kept.float().mean() / (seen[1] != 0).float().mean() < 0.7
    torch.testing.assert_close(seen[0][kept], 2 * seen[1][kept])
    torch.testing.assert_close(dropping.eval()(images), plain.eval()(images))
