"""Sites: the (convolution, norm, activation) places of a network that a variant rewrites."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from normlab.common.errors import UserError, first_line
from normlab.common.registry import check_options, options_of, refuse_unknown

# The activations that networks for images have; further arguments of a call are taken to be its defaults.
_ACTIVATIONS = (
    nn.ReLU, nn.Hardtanh, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.GELU, nn.ELU, nn.CELU, nn.SELU, nn.PReLU, nn.Mish,
    nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Hardsigmoid,
)  # fmt: skip
_FUNCTIONS = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, torch.relu_: nn.ReLU, F.relu6: nn.ReLU6, F.silu: nn.SiLU, F.gelu: nn.GELU,
    F.hardswish: nn.Hardswish, F.leaky_relu: nn.LeakyReLU, F.elu: nn.ELU, F.mish: nn.Mish, F.softplus: nn.Softplus,
    torch.tanh: nn.Tanh, torch.sigmoid: nn.Sigmoid,
}  # fmt: skip
_METHODS = {"relu": nn.ReLU, "relu_": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}

# `refused` of a variant that leaves nothing of gamma: the run would be that of init=default under another name.
NO_GAMMA = {"init": {"zero_gamma": "it has no scale per channel that could start at zero"}}


@dataclass(frozen=True)
class Site:
    """One BatchNorm2d of a network by the names of its parts, as in `Module.get_submodule`."""

    norm: str
    convolution: str | None  # feeds the norm and nothing else
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
    refused: ClassVar[dict[str, dict[str, str]]] = {}  # setting -> value -> why a run cannot have it with this variant
    name: str | None = None  # as the user calls it

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
        layer.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=False)
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


class Tracer(fx.Tracer):
    """Traces a network down to the layers that sites are made of."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Return True also for our own layers, and torchvision's that a trace would freeze in one mode."""
        own = type(module).__module__.startswith("normlab.norms")
        return own or type(module).__name__ == "StochasticDepth" or super().is_leaf_module(module, qualified_name)


def trace(network: nn.Module) -> fx.GraphModule:
    """Return `network` as a graph over the same modules.

    Raises:
        UserError: if its forward pass cannot be traced.
    """
    try:
        return fx.GraphModule(network, Tracer().trace(network), type(network).__name__)
    except Exception as error:
        raise UserError(
            f"{type(network).__name__} cannot be traced by torch.fx, so its normalization layers cannot be found:\n"
            f"{first_line(error) or type(error).__name__}.\n"
            "Its forward pass must not branch on the values of tensors."
        ) from error


def find_sites(network: nn.Module) -> list[Site]:
    """Return every BatchNorm2d of `network` in order of execution, with its neighbors.

    Raises:
        UserError: if the network's forward pass cannot be traced, or it holds no BatchNorm2d.
    """
    return [place.site for place in _places(trace(network))]


def _places(traced: fx.GraphModule) -> list[_Place]:
    modules = dict(traced.named_modules())

    def calls(node: fx.Node, kind: type[nn.Module]) -> bool:
        return node.op == "call_module" and isinstance(modules[str(node.target)], kind)

    places: dict[str, _Place] = {}
    for node in traced.graph.nodes:
        if not calls(node, nn.BatchNorm2d):
            continue
        if str(node.target) in places:
            raise UserError(
                f"{node.target} of {type(traced).__name__} is called at two places, which no norm can tell apart.\n"
                "Give each place a BatchNorm2d of its own."
            )
        before, after = node.all_input_nodes[0], list(node.users)
        activates = len(after) == 1 and activation_of(traced, after[0]) is not None
        places[str(node.target)] = _Place(
            node,
            convolution=before if calls(before, nn.Conv2d) and len(before.users) == 1 else None,
            activation=after[0] if activates else None,
        )
    if not places:
        name = type(traced).__name__
        raise UserError(
            f"{name} has no BatchNorm2d layer, so there is nothing for norm=... to rewrite.\n"
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

    Raises:
        UserError: if there is no site, or one that the variant cannot serve.
    """
    traced = trace(network)
    places = _places(traced)
    name = f"norm={variant.name or type(variant).__name__}"
    variant.check([traced.get_submodule(str(place.norm.target)).num_features for place in places])  # type: ignore[misc]
    graph_changed = type(variant).graph is not Variant.graph
    for place in places:
        site = place.site
        norm = traced.get_submodule(site.norm)
        assert isinstance(norm, nn.BatchNorm2d)
        activation = None if place.activation is None else activation_of(traced, place.activation)
        if site.convolution:
            convolution = traced.get_submodule(site.convolution)
            assert isinstance(convolution, nn.Conv2d)
            _replace(network, traced, site.convolution, variant.convolution(convolution), norm)
        elif variant.needs_convolution:
            raise UserError(
                f"{name} rewrites the convolution before each norm, and {site.norm} of {type(network).__name__}"
                " has none of its own before it.\nUse a network with norms after convolutions, or another norm."
            )
        new_norm, new_activation = variant.norm_and_activation(norm, activation)
        _replace(network, traced, site.norm, new_norm, norm)
        if not site.convolution and hasattr(activation, "inplace"):
            # It would overwrite the norm's own input now, which others may use.
            activation.inplace = False  # type: ignore[union-attr]
        if new_activation is not activation:
            assert place.activation is not None
            assert new_activation is not None
            _insert_activation(traced, place, _placed_as(norm, new_activation))
            graph_changed = True
    if not graph_changed:
        return network
    _check_equal_in_modes(network)
    variant.graph(traced, [place.site for place in places])
    traced.graph.lint()
    traced.recompile()
    traced.delete_all_unused_submodules()
    assert isinstance(norm, nn.BatchNorm2d)
    return _placed_as(norm, traced)  # also the layers that the variant put between the sites


def _replace(network: nn.Module, traced: fx.GraphModule, name: str, module: nn.Module, norm: nn.BatchNorm2d) -> None:
    network.set_submodule(name, _placed_as(norm, module))
    traced.set_submodule(name, module)


def _placed_as(norm: nn.BatchNorm2d, module: nn.Module) -> nn.Module:
    """Return `module` on the device, with the dtype and in the mode of the norm that it is for."""
    tensor = next((t for t in (norm.weight, norm.running_mean) if t is not None), None)
    return (module if tensor is None else module.to(tensor.device, tensor.dtype)).train(norm.training)


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


def _check_equal_in_modes(network: nn.Module) -> None:
    """Refuse a network whose graph is another one in training than in evaluation."""
    training, graphs = network.training, []
    for mode in (True, False):
        network.train(mode)
        graphs.append(Tracer().trace(network).python_code("self").src)
    network.train(training)
    if graphs[0] != graphs[1]:
        raise UserError(
            f"{type(network).__name__} does different things in training and evaluation, outside of its modules,"
            " so that this norm, which rewrites activations, cannot serve it.\n"
            "Use modules (nn.Dropout, not F.dropout) there, or a norm that leaves activations as they are."
        )
