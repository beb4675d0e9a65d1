"""What a rewrite reaches, refuses and keeps: nothing of batch normalization remains, and a refusal changes nothing."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small import Net, SmallNet, SmallResNet, conv_bn, state
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from torchvision.ops.misc import FrozenBatchNorm2d

from normlab import norms
from normlab.common.errors import UserError
from normlab.norms import BatchStatistics, ChannelAffine, GroupedBatchNorm2d, Variant

AVERAGES = {"eps": 1e-5, "momentum": 0.1}


def remaining(network: nn.Module) -> list[str]:
    """The batch normalizations that are not ours."""
    found = {name: module for name, module in network.named_modules() if isinstance(module, _BatchNorm)}
    return [name for name, module in found.items() if not type(module).__module__.startswith("normlab.")]


# --- Every kind of batch normalization ----------------------------------------------------------------


SHAPES = [
    (nn.BatchNorm1d, (8, 6)),
    (nn.BatchNorm1d, (8, 6, 5)),
    (nn.BatchNorm2d, (8, 6, 3, 4)),
    (nn.BatchNorm3d, (8, 6, 2, 3, 4)),
]


@pytest.mark.parametrize(("kind", "shape"), SHAPES)
def test_bn_in_the_place_of_each_kind_is_pytorchs_in_training_and_evaluation(kind, shape) -> None:
    reference = Net(bn=kind(6), act=nn.Tanh()).double()
    nn.init.normal_(reference.bn.weight)
    nn.init.normal_(reference.bn.bias)
    network = norms.rewrite(copy.deepcopy(reference), "bn")
    assert not remaining(network)
    for step in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * 3 + 1
        gradients = []
        for each in (reference, network):
            output = each(leaf := x.clone().requires_grad_())
            output.pow(3).sum().backward()
            gradients.append((output.detach(), leaf.grad, *(p.grad for p in each.parameters())))
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network.eval()(x), reference.eval()(x), rtol=1e-12, atol=1e-12)


def test_a_sync_batch_norm_takes_maps_as_they_are_and_is_the_formula() -> None:
    network = norms.rewrite(Net(bn=nn.SyncBatchNorm(4)), "bn")
    for shape in ((6, 4, 3, 3), (6, 4)):
        x = torch.randn(shape)
        var, mean = torch.var_mean(x.double(), (0, *range(2, x.dim())), correction=0, keepdim=True)
        torch.testing.assert_close(network(x), ((x - mean) / torch.sqrt(var + 1e-5)).float())


class Head(nn.Module):
    """A network of one's own: BatchNorm2d in the body, BatchNorm1d in the head."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.fc, self.bn1d = nn.Linear(8, 32), nn.BatchNorm1d(32)
        self.classifier = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.classifier(F.relu(self.bn1d(self.fc(x))))


@pytest.mark.parametrize("name", [name for name, kind in norms.NAMED.items() if not kind.needs_convolution])
def test_a_norm_in_the_head_is_rewritten_and_trains(name: str) -> None:
    network = norms.rewrite(Head(), name, **({"groups": 8} if name in ("gn", "evonorm_s0") else {}))
    assert not remaining(network)
    steps = norms.Steps(network)
    for mode in (True, False):
        network.train(mode)
        steps.begin(1, 10)
        x = torch.randn(6, 3, 8, 8)
        if name == "in" and mode:  # of a single value per channel nothing would be left
            with pytest.raises(ValueError, match="more than one value per group"):
                network(x)
            continue
        output = network(x)
        assert output.shape == (6, 10)
        assert output.isfinite().all()
        if mode:
            output.square().sum().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)
            steps.end()


def test_none_in_the_head_is_the_network_without_it() -> None:
    network = Head()
    x = torch.randn(6, 3, 8, 8)
    expected = network.classifier(F.relu(network.fc(F.relu(network.conv(x)).mean((2, 3)))))
    torch.testing.assert_close(norms.rewrite(network, "none")(x), expected, rtol=0, atol=0)


def test_the_groups_of_a_head_are_those_of_its_images() -> None:
    """Image n of 6 belongs to group n mod 3, so that images 0 and 3 share statistics."""
    network = norms.rewrite(Net(bn=nn.BatchNorm1d(4)), "bn", norm_batch=2).double()
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    pair = x[[0, 3]]
    expected = (pair - pair.mean((0, 2), keepdim=True)) / (pair.var((0, 2), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(network(x)[[0, 3]], expected, rtol=1e-12, atol=1e-12)


# --- What is kept -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("half", "early"), [(torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("name", norms.NAMED)
def test_a_network_of_half_precision_computes_its_norms_in_float32(name: str, half: torch.dtype, early: bool) -> None:
    """Against the same network in float32 from the same rounded weights: as close as rounding of its maps allows."""
    base = SmallResNet(10).to(half)
    reference = norms.rewrite(copy.deepcopy(base).float(), name)
    network = norms.rewrite(base, name) if early else norms.rewrite(base.float(), name).to(half)
    assert {p.dtype for p in network.parameters()} == {half}
    averages = [b for module in network.modules() if isinstance(module, BatchStatistics) for b in module.buffers()]
    assert all(average.dtype == torch.float32 for average in averages if average.is_floating_point())
    steps = [norms.Steps(each) for each in (network, reference)]
    for each in steps:
        each.begin(3, 10)
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)).to(half)
    outputs = []
    for each, like in ((network, x), (reference, x.float())):
        torch.manual_seed(0)  # of noise
        outputs.append(each(like))
    outputs[0].float().square().mean().backward()
    assert outputs[0].dtype == half
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    if "noisy" not in name:
        error = (outputs[0].float() - outputs[1]).abs().max() / outputs[1].abs().max().clamp_min(1e-3)
        assert error < 100 * torch.finfo(half).eps
    steps[0].end()
    assert network.eval()(x).dtype == half


def test_a_clock_counts_every_step_in_half_precision() -> None:
    """bfloat16 has no number between 256 and 258."""
    network = norms.rewrite(SmallNet(10), "renorm", ramp_unit="steps", ramp_start=0, dmax_end=300, rmax_end=300)
    network.bfloat16()
    norms.Steps(network).begin(257, 1000)
    assert {float(m.now) for m in network.modules() if isinstance(m, norms.Clock)} == {257.0}


@pytest.mark.parametrize("name", norms.NAMED)
def test_what_is_frozen_stays_frozen(name: str) -> None:
    base = SmallResNet(10)
    base.requires_grad_(False)
    base.fc.requires_grad_(True)
    network = norms.rewrite(base, name)
    # What a variant adds between the layers belongs to none of them, and nor does the norm of the logits.
    added = {"fixup": "_shift. _affine.", "nf": "_scale.", "skipinit": "_scale.", "mimicnorm": "logit_norm. _scale."}
    trained = [
        key
        for key, p in network.named_parameters()
        if p.requires_grad and not any(a in key for a in added.get(name, "").split())
    ]
    assert trained == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("name", ["affine", "bn", "gn", "frn", "evonorm_b0", "renorm", "lp1", "noisy_bn"])
def test_a_frozen_scale_does_not_freeze_the_shift(name: str) -> None:
    base = Net(conv=nn.Conv2d(3, 32, 3), bn=nn.BatchNorm2d(32), act=nn.ReLU())
    base.bn.weight.requires_grad_(False)
    frozen = {key.rpartition(".")[2] for key, p in norms.rewrite(base, name).named_parameters() if not p.requires_grad}
    assert frozen == {"weight"}


@pytest.mark.parametrize("name", ["affine", "bn", "gn", "renorm"])
def test_a_norm_without_scale_and_shift_gets_constants(name: str) -> None:
    network = norms.rewrite(Net(bn=nn.BatchNorm2d(32, affine=False)), name)
    assert not any(p.requires_grad for p in network.parameters())
    x = torch.randn(4, 32, 5, 5)
    assert network(x).std().item() == pytest.approx(1, abs=0.1)


def test_modes_devices_and_dtypes_are_each_layers_own() -> None:
    """A frozen norm evaluates while the rest trains; norms in float32 do not convert a bfloat16 convolution."""
    for name in ("bn", "wn", "fixup"):
        network = SmallResNet(10)
        network.blocks[1].bn2.eval()
        before = {key: module.training for key, module in network.named_modules() if key}
        network = norms.rewrite(network, name)
        assert {key: module.training for key, module in network.named_modules() if key in before} == {
            key: mode for key, mode in before.items() if key in dict(network.named_modules())
        }
    mixed = SmallNet(10).bfloat16()
    mixed.body[1].float()
    mixed = norms.rewrite(mixed, "wn")
    assert mixed.body[0].weight.dtype == torch.bfloat16


def test_hooks_stay_and_can_be_removed() -> None:
    network, seen = SmallNet(10), []
    handle = network.body[1].register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    convolution = network.body[0].register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    norms.rewrite(network, "wn_mean")(torch.randn(2, 3, 8, 8))
    assert [kind.__name__ for kind in seen] == ["WeightNormConv2d", "MeanOnlyBatchNorm2d"]
    handle.remove()
    convolution.remove()
    network(torch.randn(2, 3, 8, 8))
    assert len(seen) == 2


def test_a_norm_with_two_names_is_replaced_under_both() -> None:
    network = Net(lambda net, x: net.bn(x), bn=nn.BatchNorm2d(4))
    network.alias = network.bn
    norms.rewrite(network, "affine")
    assert isinstance(network.bn, ChannelAffine)
    assert network.alias is network.bn


def test_what_works_in_place_does_not_overwrite_what_others_use() -> None:
    for relu in (F.relu_, lambda x: F.relu(x, inplace=True), nn.ReLU(inplace=True), lambda x: x.mul_(0.5)):
        network = Net(lambda net, x: (y := x * 1, net.relu(net.bn(y)) + y)[1], bn=nn.BatchNorm2d(3))
        network.relu = relu
        x = torch.randn(2, 3, 4, 4)
        expected = relu(x.clone()) + x
        torch.testing.assert_close(norms.rewrite(network, "none")(x), expected, rtol=0, atol=0)


def test_a_module_without_norms_that_cannot_be_traced_is_one_layer() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[-1] > 3 else x

    network = Net(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), branch=Branching(), last=nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 8, 8)
    expected = network.conv(x) * 2
    for name in ("none", "frn"):
        rewritten = norms.rewrite(copy.deepcopy(network), name)
        assert not remaining(rewritten)
        assert rewritten(x).shape == expected.shape
    torch.testing.assert_close(norms.rewrite(network, "none")(x), expected)


def test_a_trace_leaves_nothing_behind_in_the_network() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.last = nn.BatchNorm2d(3), None
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            self.last = self.bn(x)
            return self.last

    network = norms.rewrite(Remembering(), "affine")
    assert network.last is None
    assert network.calls == 0


# --- What is refused ----------------------------------------------------------------------------------


class NormAndMore(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.running_mean[:, None, None]


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True) if x.shape[0] > 1 else x


@fx.wrap
def wrapped(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def asserting(net: Net, x: Tensor) -> Tensor:
    assert x.shape[1] == 3
    return net.bn(x)


def shared(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x)) + net.other(net.conv(x))


def tied() -> nn.Module:
    network = Net(bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 3, 1), other=nn.BatchNorm2d(3))
    network.other.weight = network.bn.weight
    return network


def with_a_hook() -> nn.Module:
    network = SmallResNet(10)
    network.blocks.register_forward_hook(lambda *_: None)
    return network


class Late(Variant):
    """Fails at the last site, after changes of values, parameters and modules."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        with torch.no_grad():
            convolution.weight.mul_(2)
        convolution.weight.requires_grad_(False)
        convolution.bias = nn.Parameter(torch.zeros(convolution.out_channels))
        return norms.MimicConv2d.of(convolution)

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        self.calls += 1
        if self.calls == 2:
            raise UserError("late")
        return nn.Identity()


class Branch(nn.Module):
    """A norm that only another branch calls."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.unused(x) if torch.is_inference_mode_enabled() else self.bn(x)


class NormInside(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, input: Tensor) -> Tensor:
        return self.bn(super().forward(input))


class OwnConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.shape[-1] > 1 else input


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str | Variant, str]] = {
    "subclass": (lambda: Net(bn=NormAndMore(3)), "none", "bn of Net is a NormAndMore, which is batch normalization"),
    "by hand": (lambda: conv_bn(own=ByHand()), "none", "own of Net is a ByHand, which is a batch normalization not of"),
    "frozen": (lambda: conv_bn(own=FrozenBatchNorm2d(4)), "gn", "own of Net is a FrozenBatchNorm2d"),
    "function": (
        lambda: Net(lambda net, x: F.batch_norm(net.bn(x), None, None, training=True), bn=nn.BatchNorm2d(3)),
        "none",
        "Net calls batch_norm as a function",
    ),
    "torch's function": (
        lambda: Net(
            lambda net, x: torch.native_batch_norm(net.bn(x), None, None, None, None, True, 0.1, 1e-5)[0],
            bn=nn.BatchNorm2d(3),
        ),
        "none",
        "Net calls native_batch_norm as a function",
    ),
    "wrapped function": (lambda: Net(lambda net, x: wrapped(net.bn(x)), bn=nn.BatchNorm2d(3)), "none", "Net calls"),
    "inside a layer": (lambda: conv_bn(opaque=Opaque()), "none", "opaque of Net calls batch_norm as a function"),
    "unused": (Branch, "none", "unused of Branch, a BatchNorm2d, is not called where torch.fx sees it"),
    "twice": (
        lambda: Net(lambda net, x: net.bn(net.bn(x)), bn=nn.BatchNorm2d(3)),
        "none",
        "bn of Net is called at two places",
    ),
    "tied": (tied, "affine", "other of Net is a BatchNorm2d, which shares a parameter with bn"),
    "shared convolution": (
        lambda: Net(shared, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4), other=nn.BatchNorm2d(4)),
        "wn",
        "norm=wn rewrites the convolution before each norm, and bn of Net has none of its own before it, but conv",
    ),
    "linear layer": (Head, "wn", "bn1d of Head has none of its own before it, but fc, a Linear"),
    "parametrized convolution": (
        lambda: Net(conv=parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), bn=nn.BatchNorm2d(4)),
        "mimicnorm",
        "conv of Net is a ParametrizedConv2d",
    ),
    "own convolution": (
        lambda: Net(conv=OwnConv2d(3, 4, 1), bn=nn.BatchNorm2d(4)), "wn", "conv of Net is a OwnConv2d"
    ),
    "parametrized norm": (
        lambda: Net(bn=parametrizations.weight_norm(nn.BatchNorm2d(3), dim=None)), "gn", "which has a parametrization"
    ),
    "no averages": (
        lambda: Net(bn=nn.BatchNorm2d(3, track_running_stats=False)), "lp1", "bn of Net has track_running_stats=False"
    ),
    "no norm": (lambda: Net(own=nn.InstanceNorm2d(3)), "none", "nothing for norm=... to rewrite (it has Inst"),
    "norm itself": (lambda: nn.BatchNorm2d(3), "none", "The network itself is a BatchNorm2d"),
    "rewritten": (
        lambda: norms.rewrite(SmallNet(10), "bn"), "gn", "SmallNet has been rewritten already, by norm=bn.\nGive"
    ),
    "a part rewritten": (lambda: conv_bn(part=norms.rewrite(SmallNet(4), "gn", groups=4)), "none", "by norm=gn"),
    "groups": (lambda: SmallNet(10), "gn", "norm.groups=32 does not divide the 8 channels"),
    "assertion": (lambda: Net(asserting, bn=nn.BatchNorm2d(3)), "none", "An assertion about a tensor or its shape"),
    "number": (
        lambda: Net(lambda net, x: net.bn(x) * int(x.shape[1]), bn=nn.BatchNorm2d(3)), "none", "as a Python number"
    ),
    "bug": (lambda: Net(lambda net, x: net.bn(x) + net.nothing, bn=nn.BatchNorm2d(3)), "none", "has no attribute"),
    "hook on a block": (with_a_hook, "frn", "blocks of SmallResNet has hooks, and norm=frn makes the network a graph"),
    "late": (lambda: SmallNet(10), Late(), "late"),
    "no residual branch": (lambda: conv_bn(), "fixup", "norm=fixup is about residual branches, and Net has none"),
    "another activation": (lambda: conv_bn(act=nn.SiLU()), "normprop", "norm=normprop replaces ReLU"),
    "lazy": (lambda: Net(bn=nn.LazyBatchNorm2d()), "none", "bn of Net is a LazyBatchNorm2d, which has no shape before"),
    "data parallel": (lambda: nn.DataParallel(SmallNet(10)), "none", "The network is a DataParallel, a wrapper"),
    "compiled": (lambda: torch.compile(SmallNet(10)), "none", "The network is a OptimizedModule, a wrapper"),
    "script": (lambda: torch.jit.script(conv_bn().bn), "none", "The network is a RecursiveScriptModule of TorchScript"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:.*torch.jit")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "compiled" else ()) for case in REFUSALS]
)
def test_what_is_refused_is_a_sentence_and_stays_as_it_was(case: str) -> None:
    make, variant, sentence = REFUSALS[case]
    network = make()
    before = state(network)
    with pytest.raises(UserError) as error:
        norms.rewrite(network, variant)
    assert sentence in str(error.value)
    assert len(str(error.value).splitlines()) <= 5
    assert state(network) == before


def test_what_is_no_module_is_named() -> None:
    with pytest.raises(UserError, match="this is the class SmallNet"):
        norms.rewrite(SmallNet, "none")
    with pytest.raises(UserError, match="this is a dict"):
        norms.rewrite({}, "none")


def test_batch_normalization_of_weights_and_other_norms_stay() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = F.batch_norm(self.weight.flatten(1)[None], None, None, training=True).view_as(self.weight)
            return F.conv2d(x, weight, self.bias)

    network = Net(conv=Standardized(3, 4, 1), norm=nn.InstanceNorm2d(4), bn=nn.BatchNorm2d(4), inside=NormInside())
    network.inside.weight = nn.Parameter(torch.ones(4, 4, 1, 1))
    norms.rewrite(network, "affine")
    assert isinstance(network.norm, nn.InstanceNorm2d)
    assert isinstance(network.inside.bn, ChannelAffine)


def test_an_optional_argument_is_traced_with_its_default() -> None:
    class Features(SmallResNet):
        def forward(self, x: Tensor, features: bool = False, scale: float | None = None) -> Tensor:
            x = super().forward(x)
            return (x if scale is None else x * scale) if not features else x

    images = torch.randn(4, 3, 8, 8)
    for name in ("none", "frn", "fixup"):
        torch.manual_seed(0)
        expected = norms.rewrite(SmallResNet(10), name)(images)
        torch.manual_seed(0)
        torch.testing.assert_close(norms.rewrite(Features(10), name)(images), expected)


def test_an_error_of_a_trace_names_the_line() -> None:
    with pytest.raises(UserError) as error:
        norms.find_sites(Net(asserting, bn=nn.BatchNorm2d(3)))
    assert "test_rewriting.py, line " in str(error.value)
    assert "`assert x.shape[1] == 3`" in str(error.value)


def test_a_layer_of_ours_in_a_network_of_ones_own_is_a_norm_like_others() -> None:
    network = norms.rewrite(Net(conv=nn.Conv2d(3, 4, 1), bn=GroupedBatchNorm2d(4)), "none")
    assert isinstance(network.bn, nn.Identity)
