"""Where the weights start: keyed draws, moments, and the starts that look at data."""

import copy
import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from small import SmallNet
from torch import nn

from normlab import models
from normlab.common.errors import UserError
from normlab.models import initialization as starts
from normlab.models.build import base

SMALL = ("model=custom", "model.target=small.SmallResNet", "model.name=small_resnet")
ARMS = ["bn", "affine", "none", "gn", "wn"]


def images(count: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 + 0.5


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: m.weight for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


@pytest.mark.parametrize(
    ("method", "variance"),
    [
        ("he_fan_in", lambda fan_in, fan_out: 2 / fan_in),
        ("glorot", lambda fan_in, fan_out: 2 / (fan_in + fan_out)),
    ],
)
def test_variances_are_those_of_the_formula(make, method, variance) -> None:
    network = models.build(make(*SMALL, f"init={method}"), num_classes=10, image_size=8)
    for name, weight in weights(network).items():
        fan_in, area = weight[0].numel(), math.prod(weight.shape[2:])
        expected = variance(fan_in, weight.shape[0] * area)
        assert weight.var().item() == pytest.approx(expected, rel=6 / math.sqrt(weight.numel())), name
    assert all(m.bias.abs().max() == 0 for m in network.modules() if isinstance(m, nn.Linear))


def test_orthogonal_rows_have_the_gain_of_what_follows(make) -> None:
    network = models.build(make(*SMALL, "init=orthogonal"), num_classes=10, image_size=8)
    for name, weight in weights(network).items():
        rows = weight.flatten(1).double()
        gain = 1.0 if name == "fc" else 2.0
        small = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
        torch.testing.assert_close(small, gain * torch.eye(len(small)).double(), rtol=0, atol=1e-5)


def test_orthogonal_layers_without_activations_keep_lengths(make) -> None:
    network = models.build(make("model=deep_linear", "norm=none", "init=orthogonal"), num_classes=10, image_size=1)
    x = torch.randn(7, 10, 1, 1)
    torch.testing.assert_close(network(x).norm(dim=1), x.flatten(1).norm(dim=1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["default", "he_fan_in", "glorot", "orthogonal", "fixup", "zero_gamma"])
def test_all_arms_of_a_seed_start_from_the_same_weights(make, method) -> None:
    found = [
        weights(models.build(make(*SMALL, f"init={method}", f"norm={arm}"), num_classes=10, image_size=8))
        for arm in ARMS
        if (method, arm) != ("zero_gamma", "none")  # which is refused
    ]
    for other in found[1:]:
        for name, weight in found[0].items():
            assert torch.equal(weight, other[name]), name


def test_draws_depend_on_seed_and_name_alone(make) -> None:
    deep = models.build(make("init=he_fan_in", "depth=34"), num_classes=10, image_size=8)
    shallow = models.build(make("init=he_fan_in", "depth=18"), num_classes=10, image_size=8)
    other = models.build(make("init=he_fan_in", "depth=18", "seed=1"), num_classes=10, image_size=8)
    assert torch.equal(deep.layer1[0].conv1.weight, shallow.layer1[0].conv1.weight)
    assert not torch.equal(other.layer1[0].conv1.weight, shallow.layer1[0].conv1.weight)


def test_zero_gamma_makes_every_residual_branch_start_at_zero(make) -> None:
    network = models.build(make("init=zero_gamma", "depth=18"), num_classes=10, image_size=8)
    zeros = [name for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d) and m.weight.abs().max() == 0]
    assert zeros == [f"layer{stage}.{block}.bn2" for stage in (1, 2, 3, 4) for block in (0, 1)]


def test_fixup_scales_the_branches_of_any_arm(make) -> None:
    plain = models.build(make("depth=18", "norm=none"), num_classes=10, image_size=8)
    network = models.build(make("depth=18", "norm=none", "init=fixup"), num_classes=10, image_size=8)
    torch.testing.assert_close(network.layer2[1].conv1.weight, plain.layer2[1].conv1.weight * 8**-0.5)
    assert network.layer2[1].conv2.weight.abs().max() == 0
    assert torch.equal(network.layer2[0].downsample[0].weight, plain.layer2[0].downsample[0].weight)
    assert network.fc.weight.abs().max() == 0


@pytest.mark.parametrize("start", ["zero_gamma", "uniform_gamma"])
@pytest.mark.parametrize(
    "arm", ["none", "bnminus", "bnp", "mimicnorm", "nf", "noisy_none", "wn_trelu", "fixup", "skipinit"]
)
def test_a_norm_without_scales_refuses_a_start_that_is_about_them(make, arm, start) -> None:
    with pytest.raises(UserError, match=f"norm={arm} cannot have init={start}: it has no scale"):
        models.build(make(*SMALL, f"norm={arm}", f"init={start}"), num_classes=10, image_size=8)


def test_uniform_gamma_draws_the_scales_of_norms_alone(make) -> None:
    drawn, plain = (
        models.build(make("depth=18", f"init={init}"), num_classes=10, image_size=8)
        for init in ("uniform_gamma", "default")
    )
    scales = torch.cat([m.weight for m in drawn.modules() if isinstance(m, nn.BatchNorm2d)]).detach()
    assert scipy.stats.kstest(scales.numpy(), "uniform").pvalue > 0.01
    assert torch.equal(drawn.conv1.weight, plain.conv1.weight)
    assert not any(m.bias.any() for m in drawn.modules() if isinstance(m, nn.BatchNorm2d))
    other = models.build(make("depth=18", "init=uniform_gamma", "norm=gn"), num_classes=10, image_size=8)
    assert torch.equal(other.layer2[0].bn1.weight, drawn.layer2[0].bn1.weight)


@pytest.mark.parametrize("method", ["zero_gamma", "fixup"])
def test_a_start_about_branches_refuses_a_network_without_any(make, method) -> None:
    with pytest.raises(UserError, match="residual"):
        models.build(make("model=vgg", f"init={method}"), num_classes=10, image_size=32)


@pytest.mark.parametrize("arm", ["none", "affine", "bn", "mimicnorm"])
def test_lsuv_gives_every_layer_unit_variance(make, arm) -> None:
    config = make(*SMALL, "init=lsuv", f"norm={arm}")
    network = models.build(config, num_classes=10, image_size=8)
    models.start(config, network, images(), num_classes=10, image_size=8)
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, i, o, name=name: found.update({name: o.std(correction=0).item()}))
    network.train()(images())
    assert len(found) == 7
    assert found == pytest.approx(dict.fromkeys(found, 1.0), rel=1e-4)


@pytest.mark.parametrize(
    ("arm", "model"),
    [
        ("none", SMALL),
        ("affine", SMALL),
        pytest.param("affine", ("model=torchvision", "model.name=vgg11_bn"), marks=pytest.mark.slow),
    ],
)
def test_a_folded_start_is_the_function_of_the_batch_norm_network(make, arm, model) -> None:
    """In float64, on the calibration images; that is the whole point of init=bn_folded."""
    config = make(*model, "init=bn_folded", f"norm={arm}")
    size = 32 if "model=torchvision" in model else 8
    calibration = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(3)).double()
    reference = base(config, 10, size).double()
    network = models.build(config, num_classes=10, image_size=size).double()
    starts.fold(network, reference, calibration)
    for module in [*reference.modules(), *network.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = reference.train()(calibration)
    torch.testing.assert_close(network.train()(calibration), expected, rtol=1e-9, atol=1e-9)
    assert expected.std() > 0.01


def test_a_folded_start_does_not_need_the_plain_start_to_be_close(make) -> None:
    """A scale and shift of its own in the BatchNorms, as init=zero_gamma or a user's network may have, folds too."""
    config = make(*SMALL, "norm=none", "init=bn_folded")
    reference = base(config, 10, 8).double()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    network = models.build(config, num_classes=10, image_size=8).double()
    starts.fold(network, reference, images().double())
    torch.testing.assert_close(network(images().double()), reference(images().double()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arm", ["bn", "gn", "wn", "renorm", "evonorm_s0", "fixup"])
def test_a_folded_start_leaves_an_arm_that_normalizes(make, arm) -> None:
    config = make(*SMALL, "init=bn_folded", f"norm={arm}")
    network = models.build(config, num_classes=10, image_size=8)
    before = copy.deepcopy(network.state_dict())
    models.start(config, network, images(), num_classes=10, image_size=8)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_folded_start_without_a_place_to_fold_into_is_a_sentence(make) -> None:
    config = make("model=torchvision", "model.name=densenet121", "norm=none", "init=bn_folded")
    network = models.build(config, num_classes=10, image_size=32)
    with pytest.raises(UserError, match="nothing to fold"):
        models.start(config, network, torch.randn(2, 3, 32, 32), num_classes=10, image_size=32)


@pytest.mark.parametrize(("model", "own"), [("vgg", True), ("resnet", False)])
@pytest.mark.parametrize("conv_bias", [True, False])
def test_none_adds_biases_where_it_is_told_to_and_takes_none_away(make, model, own, conv_bias) -> None:
    """torchvision's VGG has biases before its norms as well."""
    settings = (f"model={model}", "norm=none", f"norm.conv_bias={str(conv_bias).lower()}")
    network = models.build(make(*settings), num_classes=10, image_size=32)
    biases = {module.bias is not None for module in network.modules() if isinstance(module, nn.Conv2d)}
    assert biases == {conv_bias or own}


@pytest.mark.slow
def test_a_start_from_data_does_not_depend_on_random_depth(make) -> None:
    config = make("model=torchvision", "model.name=efficientnet_b0", "norm=affine", "init=bn_folded")
    calibration = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for seed in (0, 1):
        network = models.build(config, num_classes=10, image_size=32)
        torch.manual_seed(seed)
        models.start(config, network, calibration, num_classes=10, image_size=32)
        found.append(network.eval()(calibration))
    assert torch.equal(*found)


class FunctionalDropout(SmallNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


def test_a_start_from_data_repeats_what_is_random_outside_of_modules(make) -> None:
    target = f"model.target={__name__}.FunctionalDropout"
    found = []
    for number in (0, 1):
        config = make("model=custom", target, "init=lsuv", "norm=none")
        network = models.build(config, num_classes=10, image_size=8)
        torch.manual_seed(number)
        state = torch.get_rng_state()
        models.start(config, network, images(), num_classes=10, image_size=8)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(network.head.weight)
    assert torch.equal(*found)


class FlatNorm(SmallNet):
    """Has a batch normalization after its maps, too, which is no site."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, num_classes))


def test_a_start_from_data_behind_an_input_norm_leaves_other_norms_be(make) -> None:
    config = make("model=custom", f"model.target={__name__}.FlatNorm", "init=lsuv", "input_norm=bn")
    network = models.build(config, num_classes=10, image_size=8)
    models.start(config, network, images(), num_classes=10, image_size=8)
    assert network.training
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("method", ["lsuv", "bn_folded"])
def test_a_start_from_data_works_behind_an_input_norm(make, method) -> None:
    config = make(*SMALL, f"init={method}", "norm=none", "input_norm=bn")
    network = models.build(config, num_classes=10, image_size=8)
    models.start(config, network, images(), num_classes=10, image_size=8)
    logits = network.train()(images())
    if method == "lsuv":
        assert logits.std(correction=0).item() == pytest.approx(1.0, rel=1e-3)
    else:
        reference = base(config, 10, 8)
        with torch.no_grad():
            torch.testing.assert_close(logits, reference(network.input_norm(images())), rtol=1e-3, atol=1e-3)
