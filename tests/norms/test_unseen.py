"""Batch normalization that is not the attribute of a module, or more than PyTorch's: nothing of it remains unseen."""

import copy
import functools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import Net, SmallResNet, conv_bn, state
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from normlab import norms
from normlab.common.errors import UserError
from normlab.norms import Variant, batch_norm_refused


def held(hold: Callable[[nn.Module], Any], call: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """A network that calls its norm by another reference than its attribute."""
    network = Net(lambda net, x: call(net.reference, net.conv(x)), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    network.reference = hold(network.bn)
    return network


def held_in_evaluation() -> nn.Module:
    network = Net(lambda net, x: net.bn(x) if net.training else net.held[0](x), bn=nn.BatchNorm2d(3))
    network.held = [network.bn]
    return network


aliased = F.batch_norm


def by_alias(x: Tensor) -> Tensor:
    return aliased(x, None, None, training=True)


def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def call(*args: Any) -> Tensor:
        return function(*args)

    return call


class Hidden(nn.Module):
    """Branches on values, so that it is one layer to a trace, and calls `function`."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if x.shape[0] > 1 else x


class Aliasing(Hidden):
    def forward(self, x: Tensor) -> Tensor:
        return by_alias(x) if x.shape[0] > 1 else x


class Importing(Hidden):
    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.functional import batch_norm as renamed

        return renamed(x, None, None, training=True) if x.shape[0] > 1 else x


class Dotted(Hidden):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.batch_norm(x, None, None, training=True) if x.shape[0] > 1 else x


class Decorated(Aliasing):
    forward = decorated(Aliasing.forward)


class Static(Hidden):
    @staticmethod
    def normalize(x: Tensor) -> Tensor:
        return aliased(x, None, None, training=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x) if x.shape[0] > 1 else x


@fx.wrap
def wrapped_helper(x: Tensor) -> Tensor:
    return by_alias(x)


class Frozen(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


class OwnMomentum(nn.BatchNorm2d):
    momentum = property(lambda self: 0.5, lambda self, value: None)


def own_train(norm: nn.Module) -> nn.Module:
    norm.train = lambda mode=True: norm
    return norm


def hooked_weight(norm: nn.BatchNorm2d) -> nn.Module:
    norm.weight.register_hook(lambda gradient: gradient * 2)
    return norm


UNSEEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "in a list": (lambda: held(lambda bn: [bn], lambda norms, x: norms[0](x)), "a layer is called there that is no"),
    "in a closure": (lambda: held(lambda bn: lambda x: bn(x), lambda norm, x: norm(x)), "a layer is called there"),
    "bound": (lambda: held(lambda bn: bn.__call__, lambda norm, x: norm(x)), "a layer is called there"),
    "its forward": (lambda: Net(lambda net, x: net.bn.forward(x), bn=nn.BatchNorm2d(3)), "Call it as a module"),
    "made in the forward pass": (
        lambda: Net(lambda net, x: nn.BatchNorm2d(3)(net.bn(x)), bn=nn.BatchNorm2d(3)),
        "a layer is called there",
    ),
    "in a list in evaluation": (
        held_in_evaluation,
        "a layer is called there that is no attribute",
    ),
    "alias": (lambda: conv_bn(own=Aliasing(None)), "own of Net calls batch_norm as a function"),
    "imported inside": (lambda: conv_bn(own=Importing(None)), "own of Net calls batch_norm"),
    "dotted": (lambda: conv_bn(own=Dotted(None)), "own of Net calls batch_norm"),
    "decorated": (lambda: conv_bn(own=Decorated(None)), "own of Net calls batch_norm"),
    "static": (lambda: conv_bn(own=Static(None)), "own of Net calls batch_norm"),
    "attribute": (lambda: conv_bn(own=Hidden(F.batch_norm)), "own of Net calls batch_norm"),
    "partial": (
        lambda: conv_bn(own=Hidden(functools.partial(F.batch_norm, running_mean=None, running_var=None))),
        "own of Net calls batch_norm",
    ),
    "wrapped helper": (lambda: Net(lambda net, x: wrapped_helper(net.bn(x)), bn=nn.BatchNorm2d(3)), "Net calls"),
    "function in evaluation": (
        lambda: Net(lambda net, x: net.bn(x) if net.training else by_alias(net.bn(x)), bn=nn.BatchNorm2d(3)),
        "Net calls batch_norm as a function",
    ),
    "reads the scale": (
        lambda: Net(lambda net, x: net.bn(x) * net.bn.weight.abs().sum(), bn=nn.BatchNorm2d(3)),
        "The forward pass of Net reads more of a norm than its output, and norm=none has put another layer there",
    ),
    "frozen statistics": (lambda: Net(bn=Frozen(3)), "which is batch normalization and more: train of its own"),
    "momentum": (lambda: Net(bn=OwnMomentum(3)), "which is batch normalization and more: momentum of its own"),
    "an instance's own": (lambda: Net(bn=own_train(nn.BatchNorm2d(3))), "and more: train of its own"),
    "pruned": (lambda: Net(bn=prune.l1_unstructured(nn.BatchNorm2d(3), "weight", 1)), "computes its weight or bias"),
    "hook on gamma": (lambda: Net(bn=hooked_weight(nn.BatchNorm2d(3))), "has a hook on a parameter"),
}


def test_a_network_that_reads_its_norms_is_refused_where_activations_change() -> None:
    network = Net(
        lambda net, x: net.bn(net.conv(x)) * net.bn.weight.sum(), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4)
    )
    with pytest.raises(UserError, match="reads more of a norm than its output, and norm=nf"):
        norms.rewrite(network, "nf")


@pytest.mark.parametrize("case", UNSEEN)
def test_batch_normalization_that_a_trace_does_not_show_is_refused(case: str) -> None:
    make, sentence = UNSEEN[case]
    network = make()
    before = state(network)
    with pytest.raises(UserError) as error:
        norms.rewrite(network, "none")
    assert sentence in str(error.value)
    assert state(network) == before


@pytest.mark.parametrize("name", ["evonorm_s0", "frn", "wn_trelu"])
def test_hooks_on_an_activation_that_is_replaced_are_refused(name: str) -> None:
    network = SmallResNet(10)
    network.relu.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match=f"relu of SmallResNet has hooks, and norm={name}"):
        norms.rewrite(network, name)


def test_a_hook_of_an_activation_that_stays_is_called_once_by_each_forward_pass() -> None:
    network, calls = SmallResNet(10), []
    network.relu.register_forward_hook(lambda *_: calls.append(1))
    norms.rewrite(network, "nf")(torch.zeros(2, 3, 8, 8))
    assert len(calls) == 1


@pytest.mark.parametrize("name", norms.NAMED)
def test_a_norm_without_a_bias_trains_none(name: str) -> None:
    network = SmallResNet(10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias = None
    network = norms.rewrite(network, name)
    network(torch.randn(4, 3, 8, 8)).sum().backward()
    if name in ("bn", "gn", "renorm", "affine"):
        assert [key for key, p in network.named_parameters() if key.endswith("bias") and p.requires_grad] == ["fc.bias"]


class ByAnyName(nn.Module):
    """Calls functions that no reading of the code finds, in a layer that no trace enters."""

    def __init__(self, training: bool, function: str, *shape: int) -> None:
        super().__init__()
        self.mode, self.function, self.shape = training, f"{function}_norm", shape

    def forward(self, x: Tensor) -> Tensor:
        if self.training is not self.mode or x.shape[0] < 2:
            return x
        function = getattr(F, self.function)
        if self.shape:  # the standardization of weights
            return x + function(torch.ones(self.shape), None, None, training=True).sum()
        return function(x, None, None, training=True) if self.function == "batch_norm" else function(x)


@pytest.mark.parametrize("training", [True, False])
def test_batch_normalization_that_only_a_forward_pass_shows_is_refused_there(training: bool) -> None:
    network = norms.rewrite(Net(bn=nn.BatchNorm2d(3), own=ByAnyName(training, "batch")), "none")
    with batch_norm_refused(network.train(not training)):
        network(torch.randn(4, 3, 2, 2))
    sentence = r"remains in own of Net, which calls it as a function \(test_unseen"
    with pytest.raises(UserError, match=sentence), batch_norm_refused(network.train(training)):
        network(torch.randn(4, 3, 2, 2))


@pytest.mark.parametrize("name", norms.NAMED)
def test_no_layer_of_ours_is_refused(name: str) -> None:
    network = norms.rewrite(SmallResNet(10), name)
    for mode in (True, False):
        with batch_norm_refused(network.train(mode)):
            network(torch.randn(4, 3, 8, 8))


def branching(net: nn.Module, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = layer(x)
        if isinstance(layer, nn.BatchNorm2d):
            x = x.relu()
    return x


def without_gradient(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = net.stem(x)
    return net.act(net.bn(net.conv(x)))


def random_depth(net: nn.Module, x: Tensor) -> Tensor:
    return net.act(net.bn(net.conv(x))) if random.random() >= 0 else x


def conv_bn_act(call: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    layers = {"stem": nn.Conv2d(3, 3, 1), "conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4), "act": nn.ReLU()}
    return Net(call, **layers)


def in_full_precision(net: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return net.act(net.bn(net.conv(x)))


def counting() -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        net.calls.add_(1)
        return net.act(net.bn(net.conv(x))) / net.calls

    network = conv_bn_act(call)
    network.register_buffer("calls", torch.zeros(()))
    return network


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.5)) if self.training else x


CHANGED_BY_A_GRAPH: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "kind of layer": (
        lambda: Net(branching, layers=nn.ModuleList([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)])),
        "none",
        "does other things after norm=none has replaced its norms",
    ),
    "no_grad": (lambda: conv_bn_act(without_gradient), "frn", "computes without gradients"),
    "random": (lambda: conv_bn_act(random_depth), "frn", "draws random numbers"),
    "autocast": (lambda: conv_bn_act(in_full_precision), "frn", r"sets a precision \(torch.autocast\)"),
    "buffer": (counting, "frn", "changes its buffers"),
}


@pytest.mark.parametrize("case", CHANGED_BY_A_GRAPH)
def test_a_network_that_a_rewrite_would_change_elsewhere_is_refused(case: str) -> None:
    make, variant, sentence = CHANGED_BY_A_GRAPH[case]
    with pytest.raises(UserError, match=sentence):
        norms.rewrite(make(), variant)
    if variant == "frn":  # whose graph has neither; a variant that leaves activations serves them
        norms.rewrite(make(), "none")


class Remembering(nn.Module):
    """Has what is no batch normalization but looks like it, and keeps what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.own = nn.BatchNorm2d(3, eps=1e-3), Named()
        self.batch_norm, self.kept = False, {"all": [[], deque()]}
        self.register_buffer("mean", torch.zeros(3, 1, 1).expand(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for values in self.kept["all"]:
            values.append(x)
        n, c, h, w = 4, 3, 4, 4
        return F.batch_norm(self.own(self.bn(x - self.mean)).reshape(1, n * c, h, w), None, None, training=True)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = False

    def freeze_batch_norm(self) -> None:
        self.batch_norm = True

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] < 2 or self.batch_norm else F.relu(x)


class Spelled(nn.BatchNorm2d):
    eps, momentum = 1e-3, 0.01


def test_names_and_constants_are_no_batch_normalization_and_nothing_is_left_behind() -> None:
    network = Remembering()
    norms.rewrite(network, "gn", groups=3)
    assert not any(network.kept["all"])
    copy.deepcopy(network)(torch.zeros(4, 3, 4, 4))
    norms.rewrite(Net(bn=Spelled(3)), "none")
    state = random.getstate()
    norms.rewrite(conv_bn_act(random_depth), "none")
    assert random.getstate() == state


def test_a_layer_that_differs_between_modes_is_one_in_a_graph() -> None:
    network = norms.rewrite(Net(conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4), act=nn.ReLU(), drop=DropPath()), "frn")
    zeros = [(network(torch.ones(64, 3, 2, 2)).flatten(1) == 0).all(1).sum() for _ in range(2)]
    assert zeros[0] != zeros[1] or zeros[0] > 0
    assert torch.equal(*(network.eval()(torch.ones(2, 3, 2, 2)) for _ in range(2)))


def test_a_copy_of_a_rewritten_network_is_known_as_one() -> None:
    for name in ("mimicnorm", "gn", "frn"):
        with pytest.raises(UserError, match=f"has been rewritten already, by norm={name}"):
            norms.rewrite(copy.deepcopy(norms.rewrite(SmallResNet(10), name)), "none")


class OfOnesOwn(Variant):
    """Normalizes by the batch, as anybody's normalizer may."""

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        return nn.Sequential(Aliasing(None), Net(lambda net, x: net.held[0](x), held=nn.ModuleList([norm])))


def test_a_layer_of_a_variant_of_ones_own_may_normalize_by_the_batch() -> None:
    network = norms.rewrite(SmallResNet(10), OfOnesOwn())
    with batch_norm_refused(network):
        network(torch.randn(4, 3, 8, 8))


@pytest.mark.parametrize("own", [ByAnyName(True, "instance"), ByAnyName(True, "batch", 1, 3, 4), nn.InstanceNorm2d(3)])
def test_what_is_not_over_the_batch_is_not_refused(own: nn.Module) -> None:
    network = norms.rewrite(Net(bn=nn.BatchNorm2d(3), own=own), "none")
    with batch_norm_refused(network):
        network(torch.randn(4, 3, 2, 2))


def test_a_layer_that_is_no_part_of_the_network_is_named() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.BatchNorm2d(3)]

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x) if x.shape[0] > 1 else x

    network = norms.rewrite(Net(bn=nn.BatchNorm2d(3), own=Opaque()), "none")
    sentence = "remains in own of Net, which calls a BatchNorm2d that is no part"
    with pytest.raises(UserError, match=sentence), batch_norm_refused(network):
        network(torch.randn(4, 3, 2, 2))
    with batch_norm_refused(network):  # which watches no other network afterwards
        norms.rewrite(SmallResNet(10), "bn")(torch.randn(4, 3, 8, 8))
