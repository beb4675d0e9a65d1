"""Layers of binary networks against loops in NumPy, and Chen et al. 2021's network against forward passes by hand."""

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab import models, runs
from normlab.common.errors import UserError
from normlab.norms import BinaryActivation, BinaryConv2d, Clock, GainedConv2d, RPReLU, Steps, parameter_roles, rewrite
from normlab.training.gradient_transforms import AdaptiveClipping
from normlab.training.run import train_run

EPS = 1e-5
Parameters = dict[str, Tensor]


def clock(binary: bool) -> Clock:
    return Clock("fraction", lambda now, end: {"binary": float(binary)})


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Layers ---------------------------------------------------------------------------------------------


def test_the_gradient_of_a_sign_is_that_of_two_parabolas() -> None:
    values = [-3.0, -1.0, -0.75, -1e-3, 0.0, 0.25, 0.999, 1.0, 2.0]
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    y = BinaryActivation()(x)
    assert y.tolist() == [-1, -1, -1, -1, 0, 1, 1, 1, 1]
    (grad,) = torch.autograd.grad((y * torch.arange(1.0, 10)).sum(), x)
    # x² + 2x on [-1, 0), 2x - x² on [0, 1): slopes 2x + 2 and 2 - 2x.
    slopes = [0.0 if abs(v) >= 1 else 2 * v + 2 if v < 0 else 2 - 2 * v for v in values]
    assert grad.tolist() == pytest.approx([(i + 1) * slope for i, slope in enumerate(slopes)], abs=1e-15)


def test_rprelu_is_prelu_between_two_shifts() -> None:
    layer = RPReLU(2).double()
    assert layer.weight.tolist() == [0.25, 0.25]
    with torch.no_grad():
        for value, parameter in zip(([0.5, -1.0], [0.1, 2.0], [3.0, -4.0]), layer.parameters(), strict=True):
            parameter.copy_(torch.tensor(value))
    x = np.array([[-1.5, -0.5, 1.0], [0.0, 1.0, 3.0]])
    y = layer(torch.tensor(x).view(1, 2, 3, 1)).flatten().tolist()
    first = [(v + 0.5) * (1 if v > -0.5 else 0.1) + 3 for v in x[0]]
    second = [(v - 1) * (1 if v > 1 else 2) - 4 for v in x[1]]
    assert y == pytest.approx([*first, *second])
    assert [role for _, role, _ in parameter_roles(layer)] == ["shift", "scale", "shift"]


def weight_by_hand(v: np.ndarray, gain: np.ndarray | None, binary: bool) -> tuple[np.ndarray, np.ndarray]:
    """w, and u that its sign is of, filter by filter."""
    w, u = np.zeros_like(v), np.zeros_like(v)
    for o, filter in enumerate(v):
        u[o] = filter
        if gain is not None:
            std = math.sqrt(((filter - filter.mean()) ** 2).sum() / filter.size)
            u[o] = (filter - filter.sum() / filter.size) / (std + EPS) / math.sqrt(filter.size)
        size = np.abs(u[o]).sum() / filter.size
        w[o] = (np.where(u[o] > 0, size, 0) - np.where(u[o] < 0, size, 0)) if binary else u[o]
        w[o] *= 1 if gain is None else gain[o]
    return w, u


def gradients_by_hand(
    v: np.ndarray, gain: np.ndarray | None, binary: bool, dw: np.ndarray
) -> tuple[np.ndarray, list[float]]:
    """dL/dv and dL/dgain, derived: through clip(u, -1, 1) at binary ones, then through the standardization."""
    w, u = weight_by_hand(v, gain, binary)
    dv, dgain = np.zeros_like(v), []
    for o in range(len(v)):
        du = dw[o] * (1 if gain is None else gain[o])
        if binary:
            du = np.where(np.abs(u[o]) <= 1, du, 0)
        if gain is None:
            dv[o] = du
            continue
        dgain.append(float((dw[o] * w[o]).sum() / gain[o]))
        fan, centered = v[o].size, v[o] - v[o].mean()
        std = math.sqrt((centered**2).mean())
        # u = c / ((s + eps) sqrt(fan)), c = v - mean, ds = sum(c dc) / (fan s)
        through_c = du / ((std + EPS) * math.sqrt(fan))
        through_s = -(du * centered).sum() / ((std + EPS) ** 2 * math.sqrt(fan)) * centered / (fan * std)
        dc = through_c + through_s
        dv[o] = dc - dc.mean()
    return dv, dgain


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("kwargs", [{"padding": 1}, {"stride": 2, "padding": 1}, {"groups": 2}])
def test_a_binary_convolution_is_the_one_worked_out(gained, binary, kwargs) -> None:
    torch.manual_seed(1)
    layer: nn.Module = BinaryConv2d.of(nn.Conv2d(4, 6, 3, bias=False, **kwargs), clock=clock(binary))
    if gained:
        layer = GainedConv2d.of(layer, eps=EPS, clock=layer.clock)
    layer = layer.double()
    with torch.no_grad():
        layer.weight.mul_(16)  # beyond -1 and 1 as well, where the sign has no gradient
        if gained:
            layer.gain.copy_(numbers(6, 1, 1, 1, seed=2))
    v = layer.weight.detach().numpy()
    gain = layer.gain.detach().numpy().ravel() if gained else None
    x = numbers(2, 4, 5, 5).requires_grad_()
    y = layer(x)
    w = torch.from_numpy(weight_by_hand(v, gain, binary)[0]).requires_grad_()
    expected = F.conv2d(x, w, None, **kwargs)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    dy = numbers(*y.shape, seed=3)
    dx, dw = torch.autograd.grad(expected, (x, w), dy)
    ours = torch.autograd.grad(y, (x, *layer.parameters()), dy)
    dv, dgain = gradients_by_hand(v, gain, binary, dw.numpy())
    torch.testing.assert_close(ours[0], dx)
    np.testing.assert_allclose(ours[1].numpy(), dv, rtol=1e-9, atol=1e-12)
    assert not gained or ours[2].flatten().tolist() == pytest.approx(dgain)
    if not gained and binary:
        assert (np.abs(v) > 1).any()


def test_filters_of_one_value_have_finite_gradients() -> None:
    layer = GainedConv2d.of(nn.Conv2d(3, 2, 3), eps=EPS, clock=clock(True))
    nn.init.zeros_(layer.weight)
    layer(torch.randn(1, 3, 5, 5)).square().sum().backward()
    assert torch.isfinite(layer.weight.grad).all()


# --- The network ----------------------------------------------------------------------------------------


def build(make, norm: str, *settings: str) -> nn.Module:
    return models.build(make("model=binary_resnet", f"norm={norm}", *settings), num_classes=10, image_size=16)


def trained(make, norm: str, *settings: str) -> nn.Module:
    """Parameters away from their start, where zeros would hide errors."""
    network = build(make, norm, *settings).double()
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.add_(numbers(*parameter.shape, seed=i), alpha=0.02)
    return network


def by_hand(p: Parameters, x: Tensor, binary: bool, norm: Callable[[Tensor, str], Tensor], free: bool) -> Tensor:
    """The logits, after the authors' description: twice the same network, with batch normalization and without."""

    def weight(name: str, binary: bool = binary) -> Tensor:
        gain = p[f"{name}.gain"].flatten().numpy() if free else None
        return torch.from_numpy(weight_by_hand(p[f"{name}.weight"].numpy(), gain, binary)[0])

    x = norm(F.conv2d(x, weight("conv1", False), padding=1), "bn1")
    # As their code counts: a stage's first branch adds nothing, the next ones 0.04 each; at its end it starts again.
    variances = [1, 1, 1.04, 1.08, 1.12, 1, 1.04, 1.08, 1.12, 1, 1.04, 1.08, 1.12, 1, 1.04, 1.08]
    for i in range(16):
        name, stride = f"layer{i // 4 + 1}.{i % 4}", 2 if i in (4, 8, 12) else 1
        entry = x / math.sqrt(variances[i]) if free else x
        h = entry + p[f"{name}.shift.bias"][:, None, None]
        h = norm(F.conv2d(torch.sign(h), weight(f"{name}.conv"), stride=stride, padding=1), f"{name}.bn")
        if stride == 2:
            pooled = F.avg_pool2d(entry, 2)
            x = norm(F.conv2d(pooled, weight(f"{name}.downsample.1")), f"{name}.downsample.2")
        z = x + (0.2 if free else 1) * h + p[f"{name}.rprelu.before"][:, None, None]
        z = torch.where(z > 0, z, p[f"{name}.rprelu.weight"][:, None, None] * z)
        x = z + p[f"{name}.rprelu.bias"][:, None, None]
    return x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]


@pytest.mark.parametrize("binarize_at", [0, 1])
@pytest.mark.parametrize("norm", ["bn", "bnn_free", "none"])
def test_the_network_is_the_authors(make, norm, binarize_at) -> None:
    network = trained(make, norm, f"model.binarize_at={binarize_at}")
    p = {name: parameter.detach() for name, parameter in network.named_parameters()}
    images = numbers(3, 3, 8, 8)

    def normalized(x: Tensor, name: str) -> Tensor:
        if norm != "bn":
            return x
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        gamma, beta = (p[f"{name}.{which}"][:, None, None] for which in ("weight", "bias"))
        return gamma * (x - mean) / torch.sqrt(var + 1e-5) + beta

    expected = by_hand(p, images, not binarize_at, normalized, norm == "bnn_free")
    torch.testing.assert_close(network(images).detach(), expected, rtol=1e-8, atol=1e-8)


def test_branches_of_white_noise_have_the_variance_that_is_expected(make) -> None:
    """With real weights: an input of signs has second moment 1, and filters of norm 1 keep it."""
    torch.manual_seed(0)
    network = build(make, "bnn_free")
    seen: dict[str, float] = {}

    def noise(module: GainedConv2d, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (torch.randn(inputs[0].shape).sign() if module.clock else inputs[0],)

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen[names[module]] = output[:, :, 1:-1, 1:-1].var().item()  # away from the padding's zeros

    names = {module: name for name, module in network.named_modules() if isinstance(module, GainedConv2d)}
    for module in names:
        if module.padding == (1, 1):
            module.register_forward_pre_hook(noise)
            module.register_forward_hook(note)
    network(torch.randn(8, 3, 48, 48))
    assert len(seen) == 17
    assert list(seen.values()) == pytest.approx([1.0] * 17, rel=0.12)


def test_weights_that_are_binary_from_the_start_begin_small_and_positive(make) -> None:
    network = build(make, "bn", "model.binarize_at=0")
    weight = network.layer3[1].conv.weight
    assert 0 <= weight.min() < 1e-5
    assert 0.99e-3 < weight.max() <= 1e-3


def test_it_has_torchvisions_convolutions_and_norms_and_vectors_of_its_own(make) -> None:
    torchvisions = models.build(make("model=resnet"), num_classes=10, image_size=32)
    own = {"bn": 0, "none": -9600, "bnn_free": -9600 + 4800}  # 4,800 channels with gamma and beta; a gain each
    vectors = sum(before + 3 * channels for before, channels in [(64, 64)] * 4)
    for channels in (128, 256, 512):
        vectors += channels // 2 + 3 * channels + 3 * 4 * channels  # the threshold, and RPReLU's three
    for norm, others in own.items():
        found = sum(p.numel() for p in build(make, norm).parameters())
        assert found == 11_173_962 + others + vectors, norm
    assert sum(p.numel() for p in torchvisions.parameters()) == 11_173_962


@pytest.mark.parametrize("size", [8, 9, 15, 28, 32, 64])
def test_it_takes_images_of_any_small_size(make, size) -> None:
    for norm in ("bn", "bnn_free"):
        with torch.device("meta"):
            network = models.build(make("model=binary_resnet", f"norm={norm}"), num_classes=7, image_size=size)
        assert network.to("meta")(torch.empty(2, 3, size, size, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("norm", ["affine", "bn_frozen", "evonorm_b0", "frn", "gn", "powernorm", "renorm"])
def test_other_norms_stand_in_the_place_of_batch_normalization(make, norm) -> None:
    network = build(make, norm)
    loss = network(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))).square().mean()
    loss.backward()
    assert torch.isfinite(network.conv1.weight.grad).all()
    assert isinstance(network.get_submodule("layer1.0.conv"), BinaryConv2d)


@pytest.mark.parametrize("norm", ["fixup", "mabn", "mimicnorm", "nf", "normprop", "wn", "wn_mean", "wn_trelu"])
def test_norms_that_rewrite_convolutions_are_refused(make, norm) -> None:
    with pytest.raises(UserError, match=f"norm={norm} .* layer1.0.conv of BinaryResNet is a BinaryConv2d"):
        build(make, norm)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("depth=34",), r"depth=34 is not a depth of the binary ResNet"),
        (("model.binarize_at=1.5",), r"binarize_at"),
        (("model.weights=DEFAULT",), "is no file, and model=binary_resnet has no library"),
        (("init=bn_folded",), "init=bn_folded folds norms into convolutions, and model=binary_resnet has binary ones"),
        (("norm=bnn_free", "init=zero_gamma"), "cannot have init=zero_gamma"),
        (("norm=bnn_free", "init=fixup"), "cannot have init=fixup"),
    ],
)
def test_what_it_cannot_have_is_refused(make, settings, message) -> None:
    with pytest.raises(UserError, match=message):
        models.build(make("model=binary_resnet", *settings), num_classes=10, image_size=16)


def test_images_of_imagenets_size_are_refused(make) -> None:
    with pytest.raises(UserError, match="model=binary_resnet is for images of up to 64 pixels, and these have 224"):
        models.build(make("model=binary_resnet"), num_classes=10, image_size=224)


@pytest.mark.parametrize("norm", ["bn", "bnn_free"])
def test_weights_become_binary_at_their_share_of_the_run_and_so_does_a_copy(make, norm) -> None:
    network = build(make, norm, "model.binarize_at=0.3")
    layer = network.get_submodule("layer2.0.downsample.1")
    seen = []
    for step in range(10):
        Steps(network).begin(step, 10)
        seen.append(len(layer.effective_weight()[0].detach().abs().unique()) == 1)
    assert seen == [False] * 3 + [True] * 7
    other = build(make, norm, "model.binarize_at=0.3", "seed=1")
    other.load_state_dict(network.state_dict())
    images = torch.randn(4, 3, 8, 8)
    for copied in (other, pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
        assert torch.equal(copied(images), network(images))
        Steps(copied).begin(0, 10)  # each has a clock of its own
    assert len(layer.effective_weight()[0].detach().abs().unique()) == 1


def test_a_second_run_can_start_from_the_weights_of_a_first(make) -> None:
    """Their two stages as two runs, with batch normalization: a file of weights fits."""
    small = ("dataset.train_size=20", "dataset.test_size=10", "batch=10", "epochs=1", "device=cpu", "save_weights=true")
    first = make("model=binary_resnet", *small, "model.binarize_at=1")
    train_run(first)
    file = runs.Run(first.as_dict()).folder / "weights.pt"
    second = make("model=binary_resnet", *small, "model.binarize_at=0", f"model.weights={file}")
    network = models.build(second, num_classes=10, image_size=8)
    weights = torch.load(file, weights_only=True)
    layer = network.get_submodule("layer1.0.conv")
    assert torch.equal(layer.weight, weights["layer1.0.conv.weight"])
    assert torch.equal(layer.effective_weight().sign(), layer.weight.sign())
    assert len(layer.effective_weight()[0].detach().abs().unique()) == 1
    assert train_run(second)["state"] == "done"


# --- The variant in other networks, and clipping --------------------------------------------------------


def test_a_network_that_is_not_binary_gets_standardized_weights_and_scaled_branches() -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    plain = ResNet(BasicBlock, [2, 1, 1, 1], num_classes=5).double()
    network = rewrite(copy.deepcopy(plain), "bnn_free")
    p = {name: parameter.detach() for name, parameter in network.named_parameters()}

    def conv(name: str, x: Tensor, stride: int, padding: int) -> Tensor:
        gain = p[f"{name}.gain"].flatten().numpy()
        return F.conv2d(
            x, torch.from_numpy(weight_by_hand(p[f"{name}.weight"].numpy(), gain, False)[0]), None, stride, padding
        )

    images = numbers(2, 3, 32, 32)
    x = F.max_pool2d(F.relu(conv("conv1", images, 2, 3)), 3, 2, 1)
    for name, variance, stride in (
        ("layer1.0", 1, 1), ("layer1.1", 1, 1), ("layer2.0", 1.04, 2), ("layer3.0", 1, 2), ("layer4.0", 1, 2),
    ):  # fmt: skip
        entry = x / math.sqrt(variance)
        h = conv(f"{name}.conv2", F.relu(conv(f"{name}.conv1", entry, stride, 1)), 1, 1)
        x = F.relu((conv(f"{name}.downsample.0", entry, 2, 0) if stride == 2 else x) + 0.2 * h)
    expected = x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]
    torch.testing.assert_close(network(images).detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["bn", "bnn_free"])
def test_clipping_takes_each_filter_gain_and_vector_and_leaves_the_classifier(make, norm) -> None:
    network = build(make, norm)
    clip = AdaptiveClipping(network, 0.02, vectors=True)
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    clip()
    for name, parameter in network.named_parameters():
        if name.startswith("fc."):
            assert (parameter.grad == 10).all()
            continue
        units = [parameter] if parameter.dim() == 1 else list(parameter)  # a gain (O, 1, 1, 1) is O units
        grads = [parameter.grad] if parameter.dim() == 1 else list(parameter.grad)
        for unit, grad in zip(units[:3], grads[:3], strict=True):
            expected = 0.02 * max(1e-3, float(unit.detach().square().sum().sqrt()))
            assert float(grad.square().sum().sqrt()) == pytest.approx(expected, rel=1e-4), name
