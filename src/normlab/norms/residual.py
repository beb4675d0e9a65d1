"""Residual branches of a network, and the initializations that are about them."""

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn

from normlab.common.errors import UserError
from normlab.norms.steps import WEIGHT_LAYERS
from normlab.norms.tracing import BatchNormalization, Tracer, trace

_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}


@dataclass(frozen=True)
class Branch:
    """One residual sum h + f(h), as nodes of a traced network.

    Of the two paths to the sum, f is the one with more convolutions (then the one with more nodes, then the sum's
    first operand). `convolutions` are those that all of f passes, in order of execution: not those of a gate inside
    it, as squeeze-and-excitation has.
    """

    entry: fx.Node  # h, where the paths part
    sum: fx.Node
    end: fx.Node  # the operand that is the output of f
    shortcut: fx.Node  # the other operand; h itself, if the shortcut is the identity
    convolutions: tuple[str, ...]
    shortcut_convolutions: tuple[str, ...]
    norm: str | None  # f's last BatchNorm2d; None, if it has none (any more)
    takers: tuple[fx.Node, ...]  # the nodes of f that have h for an input
    shortcut_takers: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Path:
    """The nodes between h and an operand of the sum, that operand included."""

    end: fx.Node
    nodes: tuple[fx.Node, ...]
    takers: tuple[fx.Node, ...]
    convolutions: tuple[str, ...]
    norms: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int]:
        return len(self.convolutions), len(self.nodes)


def find_branches(traced: fx.GraphModule) -> list[Branch]:
    """Return the residual branches of a traced network, in the order of their sums.

    A residual sum adds two tensors that come of one, h: their nearest common ancestor. A sum without convolutions
    on either path is none.
    """
    nodes = list(traced.graph.nodes)
    number = {node: i for i, node in enumerate(nodes)}
    ancestors: list[int] = []  # bit i of entry n: node i is n or goes into it
    for i, node in enumerate(nodes):
        bits = 1 << i
        for input in node.all_input_nodes:
            bits |= ancestors[number[input]]
        ancestors.append(bits)

    def path(entry: fx.Node, end: fx.Node) -> _Path:
        inside = [
            node
            for i, node in enumerate(nodes)
            if node is not entry and ancestors[number[end]] >> i & 1 and ancestors[i] >> number[entry] & 1
        ]
        passed: dict[fx.Node, set[fx.Node]] = {entry: set()}  # by everything that reaches a node
        for node in inside:
            passed[node] = {node}.union(set.intersection(*(passed[i] for i in node.all_input_nodes if i in passed)))
        trunk = [node for node in inside if node in passed[end]]
        return _Path(
            end,
            tuple(inside),
            tuple(node for node in inside if entry in node.all_input_nodes),
            _calls(traced, trunk, nn.Conv2d),
            _calls(traced, trunk, BatchNormalization),
        )

    branches = []
    for node in nodes:
        operands = [n for n in (*node.args, *node.kwargs.values()) if isinstance(n, fx.Node)]
        if node.op not in ("call_function", "call_method") or node.target not in _SUMS or len(operands) != 2:
            continue
        common = ancestors[number[operands[0]]] & ancestors[number[operands[1]]]
        if not common:
            continue
        entry = nodes[common.bit_length() - 1]
        f, shortcut = sorted((path(entry, end) for end in operands), key=lambda p: p.size, reverse=True)
        if not f.convolutions:
            continue
        branches.append(
            Branch(
                entry=entry,
                sum=node,
                end=f.end,
                shortcut=shortcut.end,
                convolutions=f.convolutions,
                shortcut_convolutions=shortcut.convolutions,
                norm=f.norms[-1] if f.norms else None,
                takers=f.takers,
                shortcut_takers=shortcut.takers,
            )
        )
    return branches


def _calls(network: nn.Module, nodes: list[fx.Node], kind: type[nn.Module]) -> tuple[str, ...]:
    calls = [str(node.target) for node in nodes if node.op == "call_module"]
    return tuple(name for name in calls if isinstance(network.get_submodule(name), kind))


def insert_after(network: fx.GraphModule, node: fx.Node, name: str, module: nn.Module) -> fx.Node:
    """Return a new node that calls a new module on the output of `node`; nothing uses it yet."""
    network.add_submodule(name, module)
    with network.graph.inserting_after(node):
        return network.graph.call_module(name, (node,))


def end_with(network: fx.GraphModule, branch: Branch, name: str, module: nn.Module) -> None:
    """Put a new module between the end of a residual branch and the sum, named after the branch's last convolution."""
    end = insert_after(network, branch.end, f"{branch.convolutions[-1]}_{name}", module)
    branch.sum.replace_input_with(branch.end, end)


def required(branches: list[Branch], name: str, setting: str) -> list[Branch]:
    """Return `branches`, or raise a UserError if there is none in the network called `name`."""
    if not branches:
        raise UserError(
            f"{setting} is about residual branches, and {name} has none.\n"
            "Use a residual network (model=resnet, model=cifar_resnet), or another choice."
        )
    return branches


def zero_gamma(network: nn.Module) -> None:
    """Set the scale of the last BatchNorm2d of each residual branch to 0, in place (Goyal et al. 2017, section 5.1).

    Every residual sum then starts as its shortcut alone.

    Raises:
        UserError: if the network has no residual branch, or one whose path has no BatchNorm2d with a scale.
    """
    traced = trace(network)
    name = type(traced).__name__
    for branch in required(find_branches(traced), name, "init=zero_gamma"):
        norm = traced.get_submodule(branch.norm) if branch.norm else None
        scale = getattr(norm, "weight", None)
        if scale is None:
            raise UserError(
                f"init=zero_gamma sets the scale of each residual branch's last BatchNorm2d to 0, and the branch of"
                f" {name} that ends in {branch.convolutions[-1]} has none.\nUse init=fixup, or another network."
            )
        nn.init.zeros_(scale)


def fixup_start(network: nn.Module, setting: str = "init=fixup") -> None:
    """Initialize by Fixup (Zhang, Dauphin & Ma 2019, section 3) from the weights that `network` has, in place.

    With L residual branches, each of m convolutions: all but a branch's last one times L^(-1/(2m - 2)), the last one
    0, and the classifier (`classifier_of`) 0. Convolutions of a gate
    inside a branch (squeeze-and-excitation) neither count for m nor change: the paper has none [A].

    Raises:
        UserError: if the network has no residual branch.
    """
    traced = network if isinstance(network, fx.GraphModule) else trace(network)
    branches = required(find_branches(traced), type(traced).__name__, setting)
    for branch in branches:
        *inner, last = (traced.get_submodule(name) for name in branch.convolutions)
        for convolution in inner:
            with torch.no_grad():
                convolution.weight.mul_(len(branches) ** (-1 / (2 * len(inner))))  # type: ignore[operator]
        _zero(last)
    _zero(traced.get_submodule(classifier_of(traced)))


class _LayerTracer(Tracer):
    """Traces only modules that hold weights: a user's own norm may do what cannot be traced."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        holds = not isinstance(module, WEIGHT_LAYERS) and any(isinstance(m, WEIGHT_LAYERS) for m in module.modules())
        return not holds or super().is_leaf_module(module, qualified_name)


def classifier_of(network: nn.Module) -> str:
    """Return the name of the linear layer that is executed last; without one, of the convolution."""
    nodes = list(_LayerTracer().trace(network).nodes)
    return (_calls(network, nodes, nn.Linear) or _calls(network, nodes, nn.Conv2d))[-1]


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters(recurse=False):
        nn.init.zeros_(parameter)
