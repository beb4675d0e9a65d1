"""A network as a graph of the layers that sites are made of, or a sentence that says why it cannot be one."""

import inspect
import random
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

from normlab.common.errors import UserError, first_line
from normlab.norms.batch_norm_calls import calls_batch_norm, is_batch_norm, of_variant

BatchNormalization = _BatchNorm  # BatchNorm1d, 2d, 3d, SyncBatchNorm and what is derived from them

_WRAPPERS = {
    "OptimizedModule": "compile what the rewrite returns",
    "DataParallel": "wrap what the rewrite returns; it wraps `.module`",
    "DistributedDataParallel": "wrap what the rewrite returns; it wraps `.module`",
    "FullyShardedDataParallel": "wrap what the rewrite returns",
}
# What of a class makes it another batch normalization than PyTorch's.
_BEHAVIOR = {
    "forward", "__call__", "train", "eval", "momentum", "eps", "affine", "track_running_stats", "training", "weight",
    "bias", "running_mean", "running_var", "num_batches_tracked",
}  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_BATCH_NORM = inspect.getfile(_BatchNorm)
_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)


class State:
    """The modules of a network, their attributes and hooks, and the values of its tensors, to be restored."""

    def __init__(self, network: nn.Module, *, parameters: bool) -> None:
        self._modules = [(vars(module), dict(vars(module))) for module in network.modules()]
        values = chain.from_iterable(saved.values() for _, saved in self._modules)
        containers = (value for value in values if isinstance(value, dict | set | list | deque))
        self._contents = [(each, each.copy()) for value in containers for each in _containers(value)]
        tensors = chain(network.buffers(), network.parameters() if parameters else ())
        self._tensors = [(tensor, tensor.requires_grad, tensor.detach().clone()) for tensor in tensors]

    def changed(self) -> bool:
        """Return whether a tensor of the network has other values now."""
        return any(not _equal(tensor, value) for tensor, _, value in self._tensors)

    @torch.no_grad()
    def restore(self) -> None:
        """Make the network what it was."""
        for attributes, saved in self._modules:
            attributes.clear()
            attributes.update(saved)
        for container, content in self._contents:
            container.clear()
            (container.update if isinstance(container, dict | set) else container.extend)(content)
        for tensor, requires_grad, value in self._tensors:
            tensor.requires_grad_(requires_grad)
            if not _equal(tensor, value):  # an expanded one has no memory for each value
                tensor.copy_(value)


def _equal(tensor: Tensor, value: Tensor) -> bool:
    """Return whether two tensors have the same values, nan included."""
    return tensor.is_meta or torch.equal(tensor, value) or torch.equal(tensor.nan_to_num(1.5), value.nan_to_num(1.5))


def _containers(value: Any) -> Iterator[Any]:
    """Yield a dict, set, list or deque, and those that are in it."""
    if isinstance(value, dict | set | list | deque):
        yield value
        for each in value.values() if isinstance(value, dict) else value:
            yield from _containers(each)


@contextmanager
def _to_be_traced(network: nn.Module, training: bool) -> Iterator[State]:
    """Put a network into a mode without hooks inside, and take back what its forward pass does to itself.

    Each norm is another object inside, so that a call by another reference than the one that a rewrite replaces is none
    of a layer of the network.
    """
    state = State(network, parameters=False)
    for module in network.modules():
        module.training = training
        for kind in _HOOKS:
            vars(module)[kind].clear()
    for norm, places in names_of(network).items():
        if isinstance(norm, BatchNormalization):
            other = shallow_copy(norm)
            for place in places:
                network.set_submodule(place, other)
    try:
        yield state
    finally:
        state.restore()


@contextmanager
def _random_numbers_kept() -> Iterator[Callable[[], bool]]:
    """Give back what a forward pass draws from Python's and PyTorch's generators; yield whether it has drawn any."""
    before = random.getstate(), torch.get_rng_state()
    try:
        yield lambda: random.getstate() != before[0] or not torch.equal(torch.get_rng_state(), before[1])
    finally:
        random.setstate(before[0])
        torch.set_rng_state(before[1])


@contextmanager
def _autocasts_noted() -> Iterator[list[Any]]:
    """Yield a list of the contexts of torch.autocast that are entered, which a graph does not enter."""
    enter, entered = torch.autocast.__enter__, list[Any]()

    def noted(context: Any) -> Any:
        entered.append(context)
        return enter(context)  # type: ignore[no-untyped-call]

    torch.autocast.__enter__ = noted  # type: ignore[method-assign]
    try:
        yield entered
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


class Tracer(fx.Tracer):
    """Traces a network down to the layers that sites are made of.

    A module that cannot be traced is taken as one layer if no batch normalization is inside, unless `strict`.
    """

    def __init__(self, *, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict
        self.without_gradient: list[str] = []  # of what a graph would compute with one

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Make a node, and note whether it is inside of torch.no_grad()."""
        node = super().create_node(*args, **kwargs)
        if not torch.is_grad_enabled():
            self.without_gradient.append(str(node.target))
        return node

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a network for the defaults of the arguments that have one, as it may branch on them."""
        arguments = inspect.signature(type(root).forward).parameters.values()
        defaults = {a.name: a.default for a in arguments if isinstance(a.default, bool | int | float | str | None)}
        return super().trace(root, defaults | (concrete_args or {}))

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Return True also for norms, a variant's layers, and those that a trace would freeze in one mode."""
        return (
            of_variant(module)
            or isinstance(module, BatchNormalization)
            or _is_of_mode(module)
            or super().is_leaf_module(module, qualified_name)
        )

    def call_module(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace into a module, or call it as one."""
        before, stack = len(self.graph.nodes), self.module_stack.copy()
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            if self.strict or any(isinstance(inner, BatchNormalization) for inner in module.modules()):
                raise
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            self.module_stack.clear()
            self.module_stack.update(stack)
            return self.create_proxy("call_module", self.path_of_module(module), args, kwargs)


def trace(network: nn.Module, *, strict: bool = False, training: bool = True) -> fx.GraphModule:
    """Return `network` as a graph over the same modules.

    Args:
        network: stays as it is, in mode and hooks, too.
        strict: whether every module has to be traced, also those without batch normalization inside.
        training: whether to trace it in training mode, in which networks call what they call in evaluation, and e.g.
            auxiliary classifiers.

    Raises:
        UserError: if it is no network that can be rewritten, or its forward pass cannot be traced, or has a batch
            normalization that no rewrite could reach.
    """
    check_module(network)
    name = type(network).__name__
    tracer = Tracer(strict=strict)
    with (
        _to_be_traced(network, training) as state,
        _random_numbers_kept() as drawn,
        _autocasts_noted() as autocasts,
        torch.enable_grad(),
    ):
        try:
            graph = tracer.trace(network)
        except Exception as error:
            raise UserError(
                f"{name} cannot be traced by torch.fx, so its normalization layers cannot be found:\n"
                + _reason(error, strict)
            ) from error
        _check_functions(network, graph)
        what = ["computes without gradients (torch.no_grad)"] * bool(tracer.without_gradient)
        what += ["sets a precision (torch.autocast)"] * bool(autocasts)
        what += ["draws random numbers"] * drawn() + ["changes its buffers"] * state.changed()
        if strict and what:
            raise UserError(
                f"{name} {' and '.join(what)} outside of its modules, and this norm, which rewrites activations, makes"
                " the network a graph, which does not.\n"
                "Use modules there (nn.Dropout, frozen parameters), or a norm that leaves activations as they are."
            )
        traced = fx.GraphModule(network, graph, name)
    for inner, module in list(traced.named_modules()):
        if isinstance(module, BatchNormalization):
            traced.set_submodule(inner, network.get_submodule(inner))
    modes = {name: module.training for name, module in network.named_modules()}
    for inner, module in traced.named_modules():  # it has containers of its own
        module.training = modes.get(inner, network.training)
    return traced


def _reason(error: Exception, strict: bool) -> str:
    """Where in the user's code a trace ended, why, and what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f for f in reversed(frames) if not f.filename.startswith((_TORCH, _OURS))), None)
    where = f"{Path(place.filename).name}, line {place.lineno}: `{place.line}`: " if place and place.line else ""
    if any(frame.name == "forward" and frame.filename == _BATCH_NORM for frame in frames):
        return f"{where}a norm is called by its method forward there.\nCall it as a module: self.norm(x)."
    if isinstance(error, NameError) and "not installed as a submodule" in str(error):
        return (
            f"{where}a layer is called there that is no attribute of a module of the network (but in a plain list, in"
            " a closure, made in the forward pass ...).\n"
            "Make it one in __init__ (nn.ModuleList for a list), and call it by that attribute."
        )
    text = first_line(error) or type(error).__name__
    if not isinstance(error, fx.proxy.TraceError):
        text = f"{type(error).__name__}: {text}" if first_line(error) else text
    own = "" if strict else ", or move it into a module without norms inside, which needs no trace"
    if isinstance(error, fx.proxy.TraceError) and place and (place.line or "").startswith("assert"):
        advice = "An assertion about a tensor or its shape cannot be traced: use torch._assert, or leave it out."
    elif isinstance(error, fx.proxy.TraceError):
        advice = f"Its forward pass must not branch on the values or the shape of tensors: decide in __init__{own}."
    elif "proxy" in text.lower() or "symbolic" in text.lower():
        advice = f"A tensor, or its size, is used as a Python number or list there: use tensor operations{own}."
    else:
        advice = "The forward pass itself raises this error: try the network on a batch of images first."
    return f"{where}{text}.\n{advice}"


def _is_of_mode(module: nn.Module) -> bool:
    """Return whether a layer does another thing in training than in evaluation, as DropPath and StochasticDepth."""
    code = getattr(type(module).forward, "__code__", None)
    return not any(module.children()) and code is not None and "training" in code.co_names


def check_module(network: nn.Module) -> None:
    """Refuse, as a UserError, what is no network, is wrapped, or has layers without a shape."""
    if not isinstance(network, nn.Module):
        kind = f"the class {network.__name__}" if isinstance(network, type) else f"a {type(network).__name__}"
        raise UserError(f"Only an nn.Module can be rewritten, and this is {kind}.\nGive the network itself.")
    for name, module in network.named_modules():
        what = f"{name} of {type(network).__name__}" if name else "The network"
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                f"{what} is a {kind} of TorchScript, whose layers cannot be replaced.\n"
                "Rewrite the nn.Module that it was made of, and script the result."
            )
        if kind in _WRAPPERS and type(module).__module__.startswith("torch."):
            raise UserError(f"{what} is a {kind}, a wrapper.\nRewrite the network before: {_WRAPPERS[kind]}.")
        if getattr(module, "has_uninitialized_params", bool)():
            raise UserError(
                f"{what} is a {kind}, which has no shape before its first forward pass.\n"
                "Run one batch of images through the network before it is rewritten."
            )
    if isinstance(network, BatchNormalization):
        raise UserError(
            f"The network itself is a {type(network).__name__}, so there is no place to put another norm.\n"
            "Put it into an nn.Sequential."
        )


def batch_norms(network: nn.Module) -> dict[str, BatchNormalization]:
    """Return the batch normalizations of a network by name.

    Raises:
        UserError: for one that cannot be replaced by another layer without a change to what else it does.
    """
    found = {name: module for name, module in network.named_modules() if isinstance(module, BatchNormalization)}
    owners: dict[nn.Parameter, str] = {}
    for name, module in network.named_modules():
        reason = _own_normalization(module)
        for parameter in module.parameters(recurse=False):
            other = owners.setdefault(parameter, name)
            if other != name and {name, other} & found.keys():
                reason = f"shares a parameter with {other or 'the network itself'}, which a rewrite would end"
        if reason:
            raise UserError(
                f"{name} of {type(network).__name__} is a {type(module).__name__}, which {reason}.\n"
                "Use nn.BatchNorm2d (or 1d, 3d, SyncBatchNorm) itself there, and layers of their own for the rest."
            )
    return found


def _own_normalization(module: nn.Module) -> str | None:
    """Why a module is a batch normalization that cannot be replaced; None for any other module."""
    kind = type(module)
    if isinstance(module, BatchNormalization):
        return _own_behavior(module)
    if isinstance(module, _InstanceNorm) or kind.__module__.startswith("normlab.norms"):
        return None
    averages = {"running_mean", "running_var"} & {name for name, _ in module.named_buffers(recurse=False)}
    named = not any(module.children()) and "batchnorm" in kind.__name__.lower().replace("_", "")
    return "is a batch normalization not of PyTorch's kind" if averages or named else None


def _own_behavior(norm: BatchNormalization) -> str | None:
    """Why a batch normalization does more than PyTorch's or normlab's."""
    if is_parametrized(norm):
        return "has a parametrization"
    if not {"weight", "bias"} <= vars(norm)["_parameters"].keys():
        return "computes its weight or bias from other parameters, as pruning and weight_norm do"
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    if any(getattr(parameter, kind) for parameter in norm.parameters() for kind in hooks):
        return "has a hook on a parameter, which a rewrite would end"
    own = {name for name, value in vars(norm).items() if callable(value) and hasattr(type(norm), name)}
    for kind in type(norm).__mro__:
        if not kind.__module__.startswith(("torch.nn.modules.", "normlab.norms", "builtins")):
            own |= {name for name, value in vars(kind).items() if callable(value) or hasattr(type(value), "__get__")}
    own &= _BEHAVIOR
    return f"is batch normalization and more: {', '.join(sorted(own))} of its own" if own else None


def _check_functions(network: nn.Module, graph: fx.Graph) -> None:
    """Refuse calls of batch normalization as a function of the network's input; of weights they are something else."""
    from_input: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "placeholder" and not from_input.intersection(node.all_input_nodes):
            continue
        from_input.add(node)
        if node.op == "call_function" and is_batch_norm(node.target) and not _of_one_image(node):
            stack = list(node.meta.get("nn_module_stack", {}).values())
            path = stack[-1][0] if stack else ""
            _refuse_function(network, path, getattr(node.target, "__name__", str(node.target)))
    leaves = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for name in sorted(leaves):
        leaf = network.get_submodule(name)
        for inner, module in () if of_variant(leaf) else leaf.named_modules(prefix=name):
            if calls_batch_norm(module):
                _refuse_function(network, inner, "batch_norm")


def _of_one_image(node: fx.Node) -> bool:
    """Return whether the input is viewed as one image, by which batch normalization is instance normalization."""
    given = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(given, fx.Node) or given.op != "call_method" or given.target not in ("view", "reshape"):
        return False
    first = given.args[1] if len(given.args) > 1 else None
    if isinstance(first, tuple | list):
        first = first[0] if first else None
    return isinstance(first, int) and first == 1


def _refuse_function(network: nn.Module, path: str, function: str) -> None:
    where = f"{path} of {type(network).__name__}" if path else type(network).__name__
    raise UserError(
        f"{where} calls {function} as a function, which no rewrite can replace.\nUse nn.BatchNorm2d, a module, there."
    )


def hooked(network: nn.Module, inside: fx.GraphModule) -> str | None:
    """Return the name of a module with hooks that a graph, which calls only layers, would not call; or None."""
    called = set(inside.modules())
    for name, module in network.named_modules():
        if module not in called and has_hooks(module):
            return name or type(network).__name__
    return None


def has_hooks(module: nn.Module) -> bool:
    """Return whether something is to be called before or after a module's forward or backward pass."""
    return any(vars(module)[kind] for kind in _HOOKS)


def take_hooks(layer: nn.Module, old: nn.Module) -> nn.Module:
    """Return `layer` with the hooks of the module that it replaces; handles that remove them go on working."""
    vars(layer).update({name: value for name, value in vars(old).items() if "hook" in name and value})
    return layer


def separate(network: nn.Module) -> nn.Module:
    """Put a norm and its activation in the place of each layer that is both, as timm's BatchNormAct2d; in place.

    ``bn1`` becomes ``bn1.norm``, ``bn1.drop`` and ``bn1.act`` with the same parameters, those that do something.
    """
    for joint, places in names_of(network).items():
        if not _is_joint(joint):
            continue
        parts: OrderedDict[str, nn.Module] = OrderedDict(norm=_plain(joint))
        for name in ("drop", "act"):
            part = getattr(joint, name, None)
            if part is not None and not isinstance(part, nn.Identity):
                parts[name] = part
        whole = nn.Sequential(parts) if len(parts) > 1 else parts["norm"]
        whole.training = joint.training
        for place in places:
            network.set_submodule(place, take_hooks(whole, joint))
    return network


def is_separate(network: nn.Module) -> bool:
    """Return whether `separate` has nothing to do."""
    return not any(map(_is_joint, network.modules()))


def shallow_copy(layer: BatchNormalization) -> BatchNormalization:
    """Return another object with the same attributes, which copy.copy refuses for parametrized layers."""
    other = object.__new__(type(layer))
    vars(other).update(vars(layer))
    return other


def _is_joint(module: nn.Module) -> bool:
    return isinstance(module, BatchNormalization) and type(module).forward.__module__ == "timm.layers.norm_act"


def _plain(joint: nn.Module) -> nn.Module:
    assert isinstance(joint, BatchNormalization)
    kind = nn.SyncBatchNorm if isinstance(joint, nn.SyncBatchNorm) else nn.BatchNorm2d
    options = (joint.num_features, joint.eps, joint.momentum, joint.affine, joint.track_running_stats)
    norm = kind(*options, device="meta")
    for name, tensor in chain(joint.named_parameters(recurse=False), joint.named_buffers(recurse=False)):
        setattr(norm, name, tensor)
    norm.training = joint.training
    return norm


def names_of(network: nn.Module) -> dict[nn.Module, list[str]]:
    """Return all names of each module of a network, which may have it at several places."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names
