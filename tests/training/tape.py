"""A graph for the CPU, by which tests see whether a step can be captured and whether its replays do what it does."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape:
    """A graph of operations that are repeated one by one: as strict as CUDA's, and no faster than Python.

    Like a CUDA graph it holds on to every tensor.
    """

    def __init__(self, pool: object = None) -> None:
        self.operations: list[_Operation] = []

    def capture(self, work: Callable[[], None]) -> None:
        with _Recorder(self.operations):
            work()

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.operations:
            for output, value in zip(outputs, _tensors(func(*args, **kwargs)), strict=False):
                output.copy_(value)


_Operation = tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]  # ..., and the outputs that are its own


class _Recorder(TorchDispatchMode):
    # These read a value on the host, or have an output whose size depends on values; inference mode leaves some whole
    # that are others elsewhere.
    REFUSED = (
        *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"),
        *("nonzero", "masked_select", "_unique2", "unique_consecutive"),
    )

    def __init__(self, operations: list[_Operation]) -> None:
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in self.REFUSED or (name == "index" and any(one.dtype == torch.bool for one in _tensors(args[1]))):
            raise RuntimeError(f"it reads a value on the host ({name})")
        outputs = func(*args, **(kwargs or {}))
        writes = any(one.alias_info and one.alias_info.is_write for one in func._schema.arguments)
        own = not any(one.alias_info for one in func._schema.returns)
        if own or writes:  # else a view, which needs no repetition
            self.operations.append((func, args, kwargs or {}, _tensors(outputs) if own else []))
        return outputs


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
