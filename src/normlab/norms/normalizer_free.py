"""Training residual networks without normalization: Fixup, and normalizer-free (NF) networks."""

from collections.abc import Container
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normlab.common.registry import option, register
from normlab.norms.mimic import LearnedScale
from normlab.norms.plain import NoNorm
from normlab.norms.residual import Branch, end_with, find_branches, fixup_start, insert_after, required
from normlab.norms.sites import NO_GAMMA, Site, Variant, activation_of
from normlab.norms.steps import WEIGHT_LAYERS, Role
from normlab.norms.weights import ReparametrizedConv2d


class ScalarBias(nn.Module):
    """y = x + b for x of any shape and one learned b (1,), which starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, input: Tensor) -> Tensor:
        """Return x + b."""
        # Under autocast the input is half precision: promotion computes in float32, the next layer wants half.
        return (input + self.bias).to(input.dtype)


class ScalarAffine(ScalarBias):
    """y = a · x + b for x of any shape, learned a (1,), which starts at 1, and b (1,), which starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input: Tensor) -> Tensor:
        """Return a · x + b."""
        return torch.addcmul(self.bias, input, self.weight).to(input.dtype)  # one pass, not two


class ScalarScale(nn.Module):
    """y = alpha · s · x for x of any shape, constant alpha and one learned s (1,), which starts at 0."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input: Tensor) -> Tensor:
        """Return alpha · s · x."""
        return (input * (self.alpha * self.weight)).to(input.dtype)

    def extra_repr(self) -> str:
        """Return alpha for `repr`."""
        return f"alpha={self.alpha}"


class ConstantScale(nn.Module):
    """y = factor · x, nothing learned."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        """Return factor · x."""
        return input * self.factor

    def extra_repr(self) -> str:
        """Return the factor for `repr`."""
        return f"{self.factor:.6g}"


@register(
    "fixup", family="weights, starts and gradients", order=25,
    formula="h + (a · f(h) + b); scalar biases before convolutions but the first, activations and the classifier; in "
    "L branches of m layers the last starts at 0, the others times L^(-1/(2m-2)); scalars and biases learn at lr / 10 "
    "and decay",
    source="Zhang, Dauphin & Ma 2019, 1901.09321, as its code", over="nothing", parameters="scalars; a, b per branch",
    conv="yes, and residual branches",
    use="deep residual networks without norms; wants a large learning rate, as its scalars learn slowly",
    cost="scalar passes",
)  # fmt: skip
class Fixup(Variant):
    """Fixup (Zhang, Dauphin & Ma 2019, section 3): no normalization, but a start that keeps its updates small.

    Weights start as `fixup_start` says. With learned scalars a (from 1) and b (from 0), one each wherever they stand:

        y = W * (x + b)             every convolution and linear layer; those that take the same x share b
        y = activation(x + b)       in the place of a norm before an activation
        y = h + (a · f(h) + b)      every residual branch f; this b is the one before the sum's activation

    As in the authors' code, the first layer has no b before it (`stem_shift`: the paper has one before every layer); a
    shortcut that is not the identity gets h + b with the b of its branch, whether it has weights or not; and all
    scalars and biases learn at lr / `scalar_lr_divisor` and decay as weights do (`decay_scalars`).

    Invariant: at the start every residual sum equals its shortcut, and the network's output is 0.
    """

    needs_convolution = True
    takes = ()
    refused: ClassVar[dict[str, dict[str, str]]] = {
        "init": NO_GAMMA["init"]
        | dict.fromkeys(("fixup", "lsuv"), "it has a start of its own, which this one would change"),
        "model.weights": {"*": "it starts weights in a way of its own, among them zeros, in the place of those"},
    }

    stem_shift: bool = option(False)
    scalar_lr_divisor: float = option(10.0, gt=0)
    decay_scalars: bool = option(True)

    def norm_and_activation(
        self, norm: nn.BatchNorm2d, activation: nn.Module | None
    ) -> tuple[nn.Module, nn.Module | None]:
        """Return a `ScalarBias` before an activation."""
        return nn.Identity() if activation is None else ScalarBias(), activation

    def graph(self, network: fx.GraphModule, sites: list[Site]) -> None:
        """Give branches and layers with weights their scalars, and weights their start."""
        fixup_start(network, "norm=fixup")
        for branch in find_branches(network):
            end_with(network, branch, "affine", ScalarAffine())
        self._shift_inputs(network)
        for module in network.modules():
            if isinstance(module, (ScalarBias, *WEIGHT_LAYERS)):
                names = ("bias",) if isinstance(module, WEIGHT_LAYERS) else ("weight", "bias")
                module.lr_divisors = dict.fromkeys(names, self.scalar_lr_divisor)  # type: ignore[assignment]
                module.decays = frozenset(names) if self.decay_scalars else frozenset()  # type: ignore[assignment]

    def _shift_inputs(self, network: fx.GraphModule) -> None:
        """Put a `ScalarBias` before layers with weights, and before shortcuts that are not the identity."""
        shifted: dict[fx.Node, fx.Node] = {}

        def shift(node: fx.Node, x: fx.Node, name: str) -> None:
            if x not in shifted:
                shifted[x] = insert_after(network, x, f"{name}_shift", ScalarBias())
            node.replace_input_with(x, shifted[x])

        inside: set[fx.Node] = set()  # layers that get the shift of their branch where it begins
        for branch in find_branches(network):
            if branch.shortcut is not branch.entry and _has_weights(network, branch.takers[0]):
                for node in (*branch.takers, *branch.shortcut_takers):
                    shift(node, branch.entry, str(branch.takers[0].target))
                inside.update(node for node in network.graph.nodes if node.target in branch.shortcut_convolutions)
        for node in list(network.graph.nodes):
            if _has_weights(network, node) and node not in inside:
                x = node.all_input_nodes[0]
                if x not in shifted.values() and (self.stem_shift or x.op != "placeholder"):
                    shift(node, x, str(node.target))


def _has_weights(network: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(network.get_submodule(str(node.target)), WEIGHT_LAYERS)


_ZERO_ONCE = {"fixup": "branches that start at zero twice, by their weights and by their scale, never leave it"}


@register(
    "skipinit", family="weights, starts and gradients", order=33,
    formula="no norms; h + s · f(h), s from 0 (`norm.start`)", source="De & Smith 2020, 2002.10444", over="nothing",
    parameters="s per branch", conv="yes, and residual branches",
    use="residual networks without norms, by one scalar per branch; wants a large learning rate",
    cost="a scalar pass per branch",
)  # fmt: skip
class SkipInit(NoNorm):
    """SkipInit (De & Smith 2020, 2002.10444): no normalization, and residual branches f that start at zero.

        h' = h + s · f(h)        one learned scalar s per branch, from `start`

    The paper starts s at 0, or at a small value, 1 / sqrt(number of branches) or less.
    With `conv_bias` convolutions have a bias, which starts at 0, in the place of the norm's shift.
    Invariant: at the start (of 0) every residual sum equals its shortcut.
    """

    needs_convolution = True
    refused: ClassVar[dict[str, dict[str, str]]] = {
        "init": NO_GAMMA["init"]
        | _ZERO_ONCE
        | {"bn_folded": "its branches start at zero, and not with the function of the BN network"}
    }

    start: float = option(0.0, ge=0)

    def graph(self, network: fx.GraphModule, sites: list[Site]) -> None:
        """Multiply the output of each branch."""
        for branch in required(find_branches(network), type(network).__name__, "norm=skipinit"):
            end_with(network, branch, "scale", LearnedScale(self.start))


class ScaledStandardConv2d(ReparametrizedConv2d):
    """Convolution with scaled weight standardization (Brock, De & Smith 2021a, section 4.1).

    Per filter of v (O, I, kh, kw), with mean mu and biased variance s² over its fan = I·kh·kw weights:

        w = gain · (v - mu) / sqrt(fan · s² + eps)

    gain (O,) starts at 1, the bias at 0 if the convolution has none.
    Invariant: w has mean 0 and, but for eps, norm |gain| per filter, so that white noise keeps its variance.
    """

    roles: ClassVar[dict[str, Role]] = {"gain": "scale"}

    eps: float

    def add_parameters(self) -> None:
        """Make gain and bias."""
        self.gain = self.per_filter(1.0)
        if self.bias is None:
            self.bias = self.per_filter(0.0)

    def effective_weight(self) -> Tensor:
        """Return w."""
        v = super().effective_weight()
        fan = v[0].numel()
        rows = v.reshape(1, self.out_channels, fan)  # PyTorch's kernel, filters for channels: one pass each way
        gain = self.gain.to(v.dtype) * fan**-0.5
        return F.batch_norm(rows, None, None, gain, None, True, 0.0, self.eps / fan).view_as(v)


@register(
    "nf", family="weights, starts and gradients", order=24,
    aliases=("adaptivegradientclipping", "nfnet", "nfresnet", "normalizerfree",
             "scaledweightstandardization", "weightstandardization"),
    formula="w = gain · (v - mean v) / sqrt(fan-in · var v + eps); activations scaled to unit variance; h + 0.2 · s · "
    "f(h / beta), s from 0; sets `optimizer.agc=0.01`",
    source="Brock et al. 2021, 2101.08692 and 2102.06171; for networks with the ReLU after the sum [A]",
    over="a filter's weights", parameters="v, gain, bias; s per branch", conv="yes",
    use="residual networks without norms at large learning rates, which its clipping allows",
    cost="work on weights, constant scalings; clipping",
)  # fmt: skip
class NormalizerFree(Variant):
    """Normalizer-free networks (Brock, De & Smith 2021a; Brock, De, Smith & Simonyan 2021b).

    Convolutions have scaled weight standardization, activations the gain that keeps the variance of a standard
    normal, and residual branches f are, with a learned s that starts at 0,

        h' = h + alpha · s · f(h / beta),   beta² = the expected variance of h at s = 1

    which is 1 at the start and grows by alpha² per branch. Where the shortcut has a convolution, that takes h / beta
    as well, and the variance starts again from 1.

    Their networks have the activation in the branch, torchvision's after the sum. Our adaptation [A]: it has the gain
    where the shortcut has a convolution, for a sum of centered signals is centered. Where the shortcut is the identity
    it has none, so that h, which is an activation's output, passes. Networks without residual branches get the
    rest.

    Invariant: at the start every residual sum equals its shortcut.
    """

    needs_convolution = True
    takes = ()
    refused: ClassVar[dict[str, dict[str, str]]] = {"init": NO_GAMMA["init"] | _ZERO_ONCE}

    alpha: float = option(0.2, gt=0)
    eps: float = option(1e-4, gt=0)

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return the identity."""
        return nn.Identity()

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        """Return a `ScaledStandardConv2d`."""
        return ScaledStandardConv2d.of(convolution, eps=self.eps)

    def graph(self, network: fx.GraphModule, sites: list[Site]) -> None:
        """Scale activations and branches."""
        calls = {node.target: node for node in network.graph.nodes if node.op == "call_module"}
        centered = [calls[site.norm] for site in sites]
        centered += [branch.sum for branch in find_branches(network) if branch.shortcut_convolutions]
        for node in centered:
            _gain(network, node)
        branches = find_branches(network)  # again, as gains are among their nodes now
        downscale(network, branches, self.alpha)
        for branch in branches:
            end_with(network, branch, "scale", ScalarScale(self.alpha))


def _gain(network: fx.GraphModule, node: fx.Node) -> None:
    """Put its gain after the activation that alone uses the output of `node`, if there is one."""
    user, *others = node.users
    activation = activation_of(network, user)
    if activation is None or others:
        return
    users = list(user.users)
    gained = insert_after(network, user, f"{node.name}_gain", ConstantScale(activation_gain(activation)))
    for after in users:
        after.replace_input_with(user, gained)


def downscale(
    network: fx.GraphModule, branches: list[Branch], alpha: float, *, uncounted: Container[fx.Node] = ()
) -> None:
    """Divide the input of branches, and of shortcuts with convolutions, by its expected standard deviation.

    Convolutions, activations and pooling keep the variance of their input; a sum adds alpha² times the branch's, unless
    it is one of `uncounted`.
    """
    sums = {branch.sum: branch for branch in branches}
    takers: dict[fx.Node, list[fx.Node]] = {branch.entry: [] for branch in branches}
    for branch in branches:
        takers[branch.entry] += branch.takers + (branch.shortcut_takers if branch.shortcut_convolutions else ())
    variance: dict[fx.Node, float] = {}
    for node in list(network.graph.nodes):
        if node in sums:
            added = 0.0 if node in uncounted else alpha**2 * variance[sums[node].end]
            variance[node] = variance[sums[node].shortcut] + added
        else:
            variance[node] = next((variance[input] for input in node.all_input_nodes), 1.0)
        if node in takers and variance[node] != 1:
            scaled = insert_after(network, node, f"{node.name}_downscale", ConstantScale(variance[node] ** -0.5))
            variance[scaled] = 1.0
            for taker in takers[node]:
                taker.replace_input_with(node, scaled)


def activation_gain(activation: nn.Module) -> float:
    """Return 1 / std of activation(z) for z ~ N(0, 1), by Simpson's rule; ReLU: sqrt(2 / (1 - 1/pi))."""
    z = torch.linspace(-12, 12, 2**13 + 1, dtype=torch.float64)  # a knot at 0, where ReLU has its kink
    weight = torch.exp(-z.square() / 2)
    weight[1:-1:2] *= 4
    weight[2:-1:2] *= 2
    weight /= weight.sum()
    y = activation.forward(z.clone())  # without hooks; it may work in place
    mean = (weight * y).sum()
    return float((weight * (y - mean).square()).sum().rsqrt())
