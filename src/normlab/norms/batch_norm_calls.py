"""Finds batch normalization that is called as a function, or by a layer that a rewrite does not reach."""

import dis
import functools
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from normlab.common.errors import UserError

WEIGHT_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_OURS = "normlab.norms"
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def of_variant(module: nn.Module) -> bool:
    """Return whether a layer is one of normlab's, or one that a rewrite has put there."""
    return type(module).__module__.startswith(_OURS) or hasattr(module, "placed_by")


def is_own(something: Any) -> bool:
    """Return whether a class or a function is neither PyTorch's nor normlab's."""
    module = getattr(something, "__module__", None) or ""
    return not module.startswith(("torch.", _OURS, "builtins"))


def is_batch_norm(function: object) -> bool:
    """Return whether a function is batch normalization, by its name or by what its code calls."""
    return "batch_norm" in getattr(function, "__name__", str(function)) or _calls(function, set())


def calls_batch_norm(module: nn.Module) -> bool:
    """Return whether a method of a module, or a function that it holds, is or calls batch normalization.

    Convolutions and linear layers are left out: weights are standardized by batch normalization of a batch of one.
    """
    if isinstance(module, WEIGHT_LAYERS):
        return False
    methods = [
        value for kind in type(module).__mro__ if is_own(kind) for key, value in vars(kind).items() if key != "__init__"
    ]
    seen: set[int] = set()
    return any(_calls(value, seen) for value in [*methods, *vars(module).values()])


def _calls(function: Any, seen: set[int]) -> bool:
    if id(function) in seen:
        return False
    seen.add(id(function))
    if isinstance(function, functools.partial):
        return _calls(function.func, seen)
    if isinstance(function, torch.jit.ScriptFunction):
        return "batch_norm" in str(function.graph)
    if isinstance(function, staticmethod | classmethod) or inspect.ismethod(function):
        return _calls(function.__func__, seen)
    if not inspect.isroutine(function):
        return False
    if not is_own(function):
        return "batch_norm" in getattr(function, "__name__", "")
    return inspect.isfunction(function) and any(_calls(each, seen) for each in _used(function))


def _used(function: FunctionType) -> Iterator[Any]:
    """Yield what a function refers to by global names, by attributes of modules, and by its closure."""
    yield from _references(function.__code__, function.__globals__)
    yield getattr(function, "__wrapped__", None)
    yield from function.__defaults__ or ()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that has no value yet
            continue


def _references(code: CodeType, names: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the values of global and imported names, and of dotted ones, as torch.nn.functional.batch_norm."""
    value: Any = None
    imported: Any = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = names.get(str(step.argval))
        elif step.opname == "IMPORT_NAME":
            imported = sys.modules.get(str(step.argval))
        elif step.opname == "IMPORT_FROM":
            value = getattr(imported, str(step.argval), None)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, ModuleType):
            value = getattr(value, str(step.argval), None)
        else:
            value = None
        yield value
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _references(constant, names)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses batch normalization of several images that no layer of a variant computes."""

    def __init__(self, network: nn.Module, running: list[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.network, self.running = network, running

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "batch_norm" in str(func) and "backward" not in str(func):
            ours = any(map(of_variant, self.running))
            # Instance normalization and the standardization of weights are batch normalization of one "image".
            if not ours and isinstance(args[0], Tensor) and args[0].shape[0] > 1:
                raise UserError(self._sentence())
        return func(*args, **(kwargs or {}))

    def _sentence(self) -> str:
        names = {module: name for name, module in self.network.named_modules()}
        inner = self.running[-1]
        where = next((names[module] for module in reversed(self.running) if names.get(module)), "")
        place = f"{where} of {type(self.network).__name__}" if where else type(self.network).__name__
        what = f"a {type(inner).__name__} that is no part of the network" if inner not in names else "it as a function"
        stack = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(_NOT_THE_USERS)]
        line = f" ({Path(stack[-1].filename).name}, line {stack[-1].lineno}: `{stack[-1].line}`)" if stack else ""
        return (
            f"Batch normalization remains in {place}, which calls {what}{line}.\n"
            "No rewrite reaches it: use nn.BatchNorm2d, as an attribute of a module, there."
        )


@contextmanager
def batch_norm_refused(network: nn.Module) -> Iterator[None]:
    """Refuse, as a UserError, batch normalization outside a variant's layers in forward passes of a rewritten network.

    It is seen wherever it runs, also in code that no trace enters, if it is over two images at least.
    """
    running: list[nn.Module] = []

    def begin(module: nn.Module, _: Any) -> None:
        running.append(module)

    def end(module: nn.Module, _: Any, __: Any) -> None:
        while running and running.pop() is not module:  # those that raised
            pass

    handles = [
        global_hooks.register_module_forward_pre_hook(begin),
        global_hooks.register_module_forward_hook(end),
    ]
    try:
        with _Watch(network, running):
            yield
    finally:
        for handle in handles:
            handle.remove()
