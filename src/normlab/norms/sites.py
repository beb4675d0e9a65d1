"""Sites: the (convolution, norm, activation) places of a network that a variant rewrites."""

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from normlab.common.errors import UserError
from normlab.common.registry import check_options, options_of, refuse_unknown
from normlab.norms.adapter import Copy, fit
from normlab.norms.layer_statistics import BatchStatistics
from normlab.norms.tracing import (
    BatchNormalization,
    State,
    batch_norms,
    check_module,
    has_hooks,
    hooked,
    is_separate,
    names_of,
    separate,
    shallow_copy,
    take_hooks,
    trace,
)

# The activations that networks for images have; further arguments of a call are taken to be its defaults.
_ACTIVATIONS = (
    nn.ReLU, nn.Hardtanh, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.GELU, nn.ELU, nn.CELU, nn.SELU, nn.PReLU, nn.Mish,
    nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Hardsigmoid,
)  # fmt: skip
_FUNCTIONS = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, torch.relu_: nn.ReLU, F.relu6: nn.ReLU6, F.silu: nn.SiLU, F.gelu: nn.GELU,
    F.hardswish: nn.Hardswish, F.leaky_relu: nn.LeakyReLU, F.elu: nn.ELU, F.mish: nn.Mish, F.softplus: nn.Softplus,
    F.selu: nn.SELU, F.celu: nn.CELU, F.hardtanh: nn.Hardtanh, F.hardsigmoid: nn.Hardsigmoid, F.relu_: nn.ReLU,
    F.tanh: nn.Tanh, F.sigmoid: nn.Sigmoid, torch.tanh: nn.Tanh, torch.sigmoid: nn.Sigmoid, torch.selu: nn.SELU,
}  # fmt: skip
_METHODS = {
    "relu": nn.ReLU, "relu_": nn.ReLU, "tanh": nn.Tanh, "tanh_": nn.Tanh, "sigmoid": nn.Sigmoid, "sigmoid_": nn.Sigmoid,
}  # fmt: skip

# `refused` of a variant that leaves nothing of gamma: the run would be that of init=default under another name.
NO_GAMMA = {
    "init": {
        "zero_gamma": "it has no scale per channel that could start at zero",
        "uniform_gamma": "it has no scale per channel that could be drawn",
    }
}


@dataclass(frozen=True)
class Site:
    """One batch normalization of a network by the names of its parts, as in `Module.get_submodule`."""

    norm: str
    convolution: str | None  # an nn.Conv2d that feeds the norm and nothing else
    activation: str | None  # the module or function that alone takes the norm's output


class Variant:
    """One choice of `norm`: what each part of a site becomes. The base changes nothing.

    A variant is made once per network with the options of its YAML file, and called per site. A subclass declares its
    options, ``eps: float = option(1e-5, gt=0)``, and most override `norm` alone. Each option is an attribute, checked;
    `options` has all of them by name, and `norm_batch`, as a layer takes them.

    Raises:
        UserError: for an option that does not exist, or with a value that it cannot have.
    """

    normalizes = True  # False: init=bn_folded may fold statistics into its convolutions
    needs_convolution = False  # whether a site without one is refused
    rewrites: tuple[type[nn.Conv2d], ...] = ()  # convolutions with weights of their own that it can rewrite
    takes: tuple[str, ...] = ("scales", "shifts")  # what it takes of norms that were trained: "running statistics", too
    refused: ClassVar[dict[str, dict[str, str]]] = {}  # setting -> value -> why a run cannot have it with this variant
    name: str | None = None  # as the user calls it
    replay: tuple[int, int, int] | None = None  # tasks; images of the current one, of the memory, in a batch

    def __init__(self, *, norm_batch: int | None = None, **options: Any) -> None:
        self.norm_batch = norm_batch  # images that share statistics; None: all of the batch
        declared = options_of(type(self))
        refuse_unknown(type(self).__name__, declared, options)
        defaults = {name: option.default for name, option in declared.items()}
        checked = check_options("norm", declared, defaults | options)
        vars(self).update(checked)
        self.options = checked | {"norm_batch": norm_batch}

    def check(self, channels: Sequence[int]) -> None:
        """Refuse, as a UserError, a network whose sites have so many channels."""

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return the layer that replaces the site's BatchNorm2d."""
        return norm

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        """Return the layer that replaces the convolution before it."""
        return convolution

    def norm_and_activation(
        self, norm: nn.BatchNorm2d, activation: nn.Module | None
    ) -> tuple[nn.Module, nn.Module | None]:
        """Return the layers that replace the BatchNorm2d and the activation after it, for variants about both.

        `activation` is None at a site without one, and must then be returned as None.
        """
        return self.norm(norm), activation

    def graph(self, network: fx.GraphModule, sites: list[Site]) -> None:
        """Change what is between the sites, residual branches or the classifier, after all sites are rewritten."""


def copy_affine(norm: nn.BatchNorm2d, layer: nn.Module) -> nn.Module:
    """Return `layer` with its weight and bias, if it has them, at the network's own start of gamma and beta.

    Networks start them elsewhere than at 1 and 0 in places, e.g. at zero in the last norm of a branch.
    """
    if norm.affine:
        layer.to(norm.weight.device, norm.weight.dtype)  # float64 not by way of float32
        layer.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=False)
    return layer


def copy_statistics(norm: BatchNormalization, layer: BatchStatistics) -> nn.Module:
    """Return `layer` with moving averages that follow from those of a trained norm; of others they stay as they are.

    For a layer that sees the x that the norm saw.
    """
    mean, var = norm.running_mean, norm.running_var
    if mean is not None and var is not None and not mean.is_meta and (mean.any() or (var != 1).any()):
        batches = 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked)
        layer.start_averages(mean, var, batches)
    return layer


@dataclass(frozen=True)
class _Place:
    """A site as nodes of the traced graph."""

    norm: fx.Node
    convolution: fx.Node | None
    activation: fx.Node | None

    @property
    def site(self) -> Site:
        return Site(*(None if node is None else str(node.target) for node in vars(self).values()))  # type: ignore[arg-type]


def find_sites(network: nn.Module) -> list[Site]:
    """Return every batch normalization of `network` in order of execution, with its neighbors.

    Of a layer that is norm and activation in one (timm's BatchNormAct2d) the norm is called ``<name>.norm``, as after a
    rewrite.

    Raises:
        UserError: see `rewrite_sites`.
    """
    check_module(network)
    separated = network if is_separate(network) else separate(copy.deepcopy(network))
    return [place.site for place in _places(separated, trace(separated))]


def _places(network: nn.Module, traced: fx.GraphModule) -> list[_Place]:
    """The sites of a traced network, which are all of its batch normalizations."""
    modules, name = dict(traced.named_modules()), type(network).__name__
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")

    def is_call(node: fx.Node, kind: type[nn.Module]) -> bool:
        return node.op == "call_module" and isinstance(modules[str(node.target)], kind)

    places: dict[str, _Place] = {}
    for node in traced.graph.nodes:
        if not is_call(node, BatchNormalization):
            continue
        if calls[str(node.target)] > 1:
            raise UserError(
                f"{node.target} of {name} is called at two places, which no norm can tell apart.\n"
                "Give each place a norm of its own."
            )
        before, after = node.all_input_nodes[0], list(node.users)
        activates = len(after) == 1 and activation_of(traced, after[0]) is not None
        own = is_call(before, nn.Conv2d) and len(before.users) == 1 and calls[str(before.target)] == 1
        places[str(node.target)] = _Place(node, before if own else None, after[0] if activates else None)
    existing = batch_norms(network)
    missed = [norm for norm in existing if norm not in places]
    if missed:
        more = f" (and {len(missed) - 1} more)" if len(missed) > 1 else ""
        raise UserError(
            f"{missed[0]} of {name}, a {type(existing[missed[0]]).__name__}{more}, is not called where torch.fx sees"
            " it: unused, in another branch, or inside a layer.\n"
            "Call it in the network's forward pass, or remove it."
        )
    if not places:
        others = {type(m).__name__ for m in network.modules() if "Norm" in type(m).__name__}
        have = f" (it has {', '.join(sorted(others))}, which stay)" if others else ""
        raise UserError(
            f"{name} has no batch normalization layer, so there is nothing for norm=... to rewrite{have}.\n"
            "Build it with nn.BatchNorm2d where a normalizer belongs."
        )
    return list(places.values())


def activation_of(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the activation that a node applies, made anew if it is called as a function, or None."""
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        return module if isinstance(module, _ACTIVATIONS) else None
    if node.op == "call_function":
        kind = _FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    else:
        kind = _METHODS.get(str(node.target)) if node.op == "call_method" else None
    return kind() if kind else None


def rewrite_sites(network: nn.Module, variant: Variant) -> nn.Module:
    """Rewrite every site of `network`, after construction; its modules are changed in place.

    Returns the same network, or a graph over its modules where a variant changes activations or the graph.
    (torchvision's constructors initialize `weight` of every BatchNorm2d, which would crash on layers
    without one and overwrite a variant's own start.)

    A network that is refused, or in which the variant raises any other error, stays exactly as it was.

    Raises:
        UserError: if there is no site, one that the variant cannot serve, or a batch normalization that is no site.
    """
    check_module(network)
    before = State(network, parameters=True)
    try:
        earlier = next((module.placed_by for module in network.modules() if hasattr(module, "placed_by")), None)
        name = f"norm={variant.name or type(variant).__name__}"
        if earlier:
            raise UserError(
                f"{type(network).__name__} has been rewritten already, by {earlier}.\n"
                f"Give {name} the network as it was constructed."
            )
        return _Rewriting(network, variant, name).rewrite()
    except BaseException:
        before.restore()
        raise


class _Rewriting:
    """The rewriting of one network by one variant."""

    def __init__(self, network: nn.Module, variant: Variant, name: str) -> None:
        self.network, self.variant = separate(network), variant
        self.name, self.of = name, f"of {type(network).__name__}"  # as errors call them
        self.changes_graph = type(variant).graph is not Variant.graph
        self.traced = trace(network, strict=self.changes_graph)
        self.places = _places(network, self.traced)
        self.names = names_of(network)

    def rewrite(self) -> nn.Module:
        for place in self.places if self.variant.needs_convolution else ():
            self._check_convolution(place)
        norms = [self.traced.get_submodule(place.site.norm) for place in self.places]
        self.variant.check([norm.num_features for norm in norms])  # type: ignore[misc]
        for place in self.places:
            self._rewrite(place)
        if not self.changes_graph:
            self._check_result()
            return self.network
        hooks = hooked(self.network, self.traced)
        if hooks:
            raise UserError(
                f"{hooks} {self.of} has hooks, and {self.name} makes the network a graph, which calls none"
                " but those of layers.\nRegister them after the rewrite, or use another norm."
            )
        self._check_equal_in_modes()
        before = set(self.traced.modules())
        self.variant.graph(self.traced, [place.site for place in self.places])
        self.traced.graph.lint()
        self.traced.recompile()
        self.traced.delete_all_unused_submodules()
        for module in set(self.traced.modules()) - before:  # the layers that the variant put between the sites
            self._placed_as(norms[-1], module).train(self.network.training)
        return self.traced

    def _check_result(self) -> None:
        """Refuse a network whose forward pass, now that its norms are others, does not call them, or reads the old.

        It was traced in training; what else it does in evaluation (and a trace cannot follow, perhaps) is seen now.
        """
        if _calls(self._again(strict=False)) != _calls(self.traced):
            raise UserError(
                f"The forward pass {self.of} does other things after {self.name} has replaced its norms.\n"
                "It must not depend on what kind of layers they are."
            )
        try:
            self._again(strict=False, training=False)
        except UserError as error:
            if error.__cause__ is None or isinstance(error.__cause__, NameError | UserError):
                raise

    def _check_equal_in_modes(self) -> None:
        """Refuse a network whose graph is another one in training than in evaluation."""
        if self._again(strict=True).code != self._again(strict=True, training=False).code:
            raise UserError(
                f"{type(self.network).__name__} does different things in training and evaluation, outside of its"
                " modules, so that this norm, which rewrites activations, cannot serve it.\n"
                "Use modules (nn.Dropout, not F.dropout) there, or a norm that leaves activations as they are."
            )

    def _again(self, *, strict: bool, training: bool = True) -> fx.GraphModule:
        """Trace the network after its norms were replaced."""
        try:
            return trace(self.network, strict=strict, training=training)
        except UserError as error:
            if isinstance(error.__cause__, AttributeError):
                raise self._reads_more(str(error).splitlines()[1]) from error
            raise

    def _reads_more(self, where: str) -> UserError:
        return UserError(
            f"The forward pass {self.of} reads more of a norm than its output, and {self.name} has put another"
            f" layer there:\n{where}\n"
            "Call norms as modules, and read nothing of them, or use another norm."
        )

    def _check_convolution(self, place: _Place) -> None:
        """Refuse a site without a convolution that another layer can replace."""
        if place.convolution is not None:
            self._check_plain(str(place.convolution.target))
            return
        before = place.norm.all_input_nodes[0]
        what = ""
        if before.op == "call_module":
            what = f", but {before.target}, a {type(self.network.get_submodule(str(before.target))).__name__}"
        raise UserError(
            f"{self.name} rewrites the convolution before each norm, and {place.norm.target} {self.of}"
            f" has none of its own before it{what}.\nUse a network with norms after an nn.Conv2d each, or another norm."
        )

    def _check_plain(self, name: str) -> None:
        """Refuse a convolution that does not convolve with its parameter `weight` as nn.Conv2d does."""
        layer = self.network.get_submodule(name)
        if isinstance(layer, self.variant.rewrites):
            return
        own_forward = type(layer).forward is not nn.Conv2d.forward or "forward" in vars(layer)
        if own_forward or is_parametrized(layer) or not isinstance(layer.weight, nn.Parameter):
            raise UserError(
                f"{self.name} rewrites the convolution before each norm, and {name} {self.of} is a"
                f" {type(layer).__name__}\nwhose forward pass or weight is computed in a way of its own.\n"
                "Use nn.Conv2d without a parametrization there, or another norm."
            )

    def _rewrite(self, place: _Place) -> None:
        norm = self.traced.get_submodule(place.site.norm)
        assert isinstance(norm, BatchNormalization)
        activation = None if place.activation is None else activation_of(self.traced, place.activation)
        if place.site.convolution:
            self._rewrite_convolution(place.site.convolution)
        given = _complete(norm)
        layer, new_activation = self.variant.norm_and_activation(given, activation)  # type: ignore[arg-type]
        if "running statistics" in self.variant.takes:
            for each in layer.modules():
                if isinstance(each, BatchStatistics):
                    copy_statistics(given, each)
        if not place.site.convolution:  # what works in place behind an identity would overwrite what others may use
            if place.activation and place.activation.op == "call_module" and hasattr(activation, "inplace"):
                activation.inplace = False  # type: ignore[union-attr]
            elif isinstance(layer, nn.Identity):
                layer = Copy()
        if layer is not given:
            self._check_averages(place, norm, layer)
            _keep_frozen(norm, layer)
            self._put(norm, fit(layer, norm))
        if new_activation is not activation:
            assert new_activation is not None
            if activation is not None and has_hooks(activation):
                raise UserError(
                    f"{place.site.activation} {self.of} has hooks, and {self.name} puts another activation there.\n"
                    "Register them after the rewrite, or use another norm."
                )
            _insert_activation(self.traced, place, self._placed_as(norm, fit(new_activation, norm)))
            self.changes_graph = True

    def _rewrite_convolution(self, name: str) -> None:
        convolution = self.traced.get_submodule(name)
        assert isinstance(convolution, nn.Conv2d)
        own = set(convolution.parameters())
        layer = self.variant.convolution(convolution)
        if not convolution.weight.requires_grad:
            _freeze(parameter for parameter in layer.parameters() if parameter not in own)
        if layer is not convolution:
            self._check_plain(name)
            self._put(convolution, layer)

    def _check_averages(self, place: _Place, norm: BatchNormalization, layer: nn.Module) -> None:
        if not norm.track_running_stats and any(isinstance(module, BatchStatistics) for module in layer.modules()):
            raise UserError(
                f"{place.norm.target} {self.of} has track_running_stats=False, and {self.name} keeps running"
                " statistics.\nBuild it with them, and evaluate by each batch's own: eval_stats=batch."
            )

    def _put(self, old: nn.Module, new: nn.Module) -> None:
        """Put a layer in the place of another, under all names that this has."""
        self._placed_as(old, take_hooks(new, old))
        for name in self.names[old]:
            self.network.set_submodule(name, new)
        self.traced.set_submodule(self.names[old][0], new)

    def _placed_as(self, old: nn.Module, module: nn.Module) -> nn.Module:
        """Return `module`, marked, on the device, with the dtype and in the mode of the layer that it is for."""
        tensor = next(chain(old.parameters(), old.buffers(), self.network.parameters()), None)
        module.placed_by = self.name  # type: ignore[assignment]
        return (module if tensor is None else module.to(tensor.device, tensor.dtype)).train(old.training)


def _calls(traced: fx.GraphModule) -> list[tuple[str, str]]:
    """Return what a network does, in order, without the parameters and constants that it refers to."""
    return [(node.op, str(node.target)) for node in traced.graph.nodes if node.op != "get_attr"]


def _complete(norm: BatchNormalization) -> BatchNormalization:
    """Return a norm that has a beta, of zeros, if it has a gamma (bias=False)."""
    if norm.weight is None or norm.bias is not None:
        return norm
    norm = shallow_copy(norm)
    vars(norm)["_parameters"] = vars(norm)["_parameters"] | {"bias": nn.Parameter(torch.zeros_like(norm.weight))}
    return norm


def _keep_frozen(norm: BatchNormalization, layer: nn.Module) -> None:
    """Freeze gamma and beta where the norm's are frozen, or are the constants 1 and 0; all, if all of it was frozen."""
    own = dict(norm.named_parameters())
    if own and not any(parameter.requires_grad for parameter in own.values()):
        _freeze(layer.parameters())
    frozen = [name for name in ("weight", "bias") if name not in own or not own[name].requires_grad]
    _freeze(p for name, p in layer.named_parameters() if name.rpartition(".")[2] in frozen)


def _freeze(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)


def _insert_activation(traced: fx.GraphModule, place: _Place, activation: nn.Module) -> None:
    """Give a site an activation of its own: networks share theirs among sites, or call a function."""
    old = place.activation
    assert old is not None
    name = f"{place.norm.target}_activation"
    traced.add_submodule(name, activation)
    with traced.graph.inserting_after(old):
        new = traced.graph.call_module(name, (place.norm,))
    old.replace_all_uses_with(new)
    traced.graph.erase_node(old)
