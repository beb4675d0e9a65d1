"""A CUDA device that is not there: its tensors say that they are on cuda:0, and live in the memory of the host.

`with pretended() as gpu:` lets the code inside see one GPU, and needs a CUDA build of PyTorch. What mixes devices
raises an error as on a GPU. What waits for the device is counted in `gpu.waits`, and raises an error inside a capture,
as does a copy from the host's memory. Kernels are the CPU's: what CUDA itself does is not imitated.
"""

import copy
import ctypes
import os
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from normlab.launchers import preflight
from normlab.training import checkpoint, graphs, loop

aten = torch.ops.aten
GPU = torch.device("cuda:0")
NAME = "Pretended GPU"
SOURCE = str(Path(loop.__file__).parents[1])
# These have an output, or a size of one, that the host has to know.
READING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal", "is_nonzero")
COPYING = (aten._to_copy.default, aten.copy_.default)
STRICT = ("index_select", "gather", "scatter_", "_fused_sgd_", "_fused_adam_")  # that take no scalar of the host

Operation = tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]  # ..., and the outputs that are its own


PROTOTYPE = (
    "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    " (function THCPModule_cudaSetSyncDebugMode)"
)


class Pretended(Tensor):
    """A tensor that says it is on the GPU; `host` has its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "Pretended":
        made = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=GPU,
        )
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.host})"

    def tolist(self) -> Any:
        _gpu.waits_for("tolist")
        return self.host.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """PyTorch copies the storage of a view, which is none here."""
        if id(self) not in memo:
            memo[id(self)] = copied = self.detach().clone().requires_grad_(self.requires_grad)
            copied.grad = copy.deepcopy(self.grad, memo)
            if hasattr(self, "_is_param"):  # by which PyTorch tells parameters
                copied._is_param = self._is_param
        found: Tensor = memo[id(self)]
        return found

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> "Pretended":
        return Pretended(inner["host"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carry_out(func, args, kwargs or {})


class PretendedGPU:
    """What happened on the device.

    Attributes:
        waits: how often the host waited for it, by what for and where in normlab's sources (file and function).
        copies: how often pageable memory was copied to it, by where.
        captures: the operations of each capture that was finished.
    """

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[str] = Counter()
        self.captures: list[list[Operation]] = []
        self.under_way: list[Operation] | None = None  # of the capture
        self.mode = 0  # of waits: 1 warns, 2 raises an error

    def waits_for(self, what: str) -> None:
        where = _where()
        if self.under_way is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what} in {where})")
        self.waits[what, where] += 1
        if self.mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.mode == 1:
            caller = next(one for one in reversed(traceback.extract_stack()) if _is_callers(one.filename))
            warnings.warn_explicit(
                "called a synchronizing CUDA operation", UserWarning, caller.filename, caller.lineno or 0
            )

    def set_sync_debug_mode(self, mode: int | str) -> None:
        """Warn first, as PyTorch does once in a process."""
        warnings.warn(PROTOTYPE, stacklevel=2)
        self.mode = mode if isinstance(mode, int) else ("default", "warn", "error").index(mode)

    def launched(self, capture: int = -1) -> int:
        """Return how many operations of a capture launch kernels: all but those that make empty tensors."""
        return sum("empty" not in str(kernel) for kernel, *_ in self.captures[capture])


_gpu = PretendedGPU()


def _is_callers(file: str) -> bool:
    return file != __file__ and not file.startswith(str(Path(torch.__file__).parent))


def _where() -> str:
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(SOURCE):
            return f"{Path(frame.filename).relative_to(SOURCE)} {frame.name}"
    return "elsewhere"


def _on_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _carry_out(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    there = [leaf for leaf in leaves if isinstance(leaf, Pretended)]
    here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Pretended)]
    name = func._schema.name.removeprefix("aten::")
    if func in COPYING:
        _note_copy(func, args, kwargs)
    elif there and here:
        _check_devices(name, args, kwargs, here)
    by_mask = name == "index" and any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1])
    sized = name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) < 3
    if there and (name in READING or by_mask or sized):
        _gpu.waits_for(name)
    own_args, own_kwargs = tree_unflatten([_on_host(leaf) for leaf in leaves], spec)
    own_kwargs.pop("pin_memory", None)
    kernel = _KERNELS.get(func, func)
    outputs = kernel(*own_args, **own_kwargs)
    if _gpu.under_way is not None:
        writes = any(one.alias_info and one.alias_info.is_write for one in func._schema.arguments)
        own = not any(one.alias_info for one in func._schema.returns)
        if own or writes:  # else a view, which needs no repetition
            _gpu.under_way.append((kernel, own_args, own_kwargs, _tensors(outputs) if own else []))
    device = kwargs.get("device")
    if func is aten.copy_.default:
        return args[0]
    if not (_on_gpu(device) if device is not None else there):
        return outputs
    outputs = tree_map(lambda one: Pretended(one) if isinstance(one, Tensor) else one, outputs)
    return return_and_correct_aliasing(func, args, kwargs, outputs) if there and kernel is func else outputs


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]


def _on_host(leaf: Any) -> Any:
    if isinstance(leaf, Pretended):
        return leaf.host
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "cuda" else leaf


def _note_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
    device = kwargs.get("device")
    if func is aten.copy_.default:
        target, source = (isinstance(one, Pretended) for one in args[:2])
    else:
        source = isinstance(args[0], Pretended)
        target = _on_gpu(device) if device is not None else source
    if source and not target and blocking and str(device) != "meta":
        _gpu.waits_for("copy to the host")
    elif target and not source:
        if _gpu.under_way is not None:
            _gpu.waits_for("copy from pageable memory")
        _gpu.copies[_where()] += 1


def _check_devices(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], here: list[Tensor]) -> None:
    if name.startswith(("index", "_index_put")) and name != "index_select" and isinstance(args[0], Pretended):
        _gpu.waits_for("index on the host")
    elif name in STRICT or (kwargs.get("device") is None and any(one.dim() for one in here)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name})")


def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, *settings: Any) -> tuple[Tensor, ...]:
    normalized = aten.native_batch_norm(x, weight, bias, mean, var, *settings)
    return (*normalized, torch.empty(0, dtype=torch.uint8))


def _batch_norm_backward(
    x: Tensor, dy: Tensor, weight: Any, mean: Any, var: Any, saved_mean: Any, saved_invstd: Any, eps: float, _: Tensor
) -> Any:
    saved = saved_mean, saved_invstd
    return aten.native_batch_norm_backward(dy, x, weight, mean, var, *saved, True, eps, [True] * 3)


_KERNELS = {
    aten.cudnn_batch_norm.default: _batch_norm,
    aten.cudnn_batch_norm_backward.default: _batch_norm_backward,
}


class _Placed(TorchDispatchMode):
    """Makes tensors that are created on the GPU; operations of tensors that are there come by themselves."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_flatten((args, kwargs))[0]
        if _on_gpu(kwargs.get("device")) or kwargs.get("pin_memory") or any(isinstance(x, Pretended) for x in leaves):
            return _carry_out(func, args, kwargs)
        return func(*args, **kwargs)


class Event:
    """An event of work that is done as soon as it is launched."""

    def record(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _gpu.waits_for("event")


class Stream:
    """A stream, that of all work of a thread."""

    def __init__(self, device: object = None, **_: object) -> None:
        self.device = GPU

    def synchronize(self) -> None:
        _gpu.waits_for("stream")

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def wait_stream(self, other: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass


class Generator:
    """The default generator of the GPU: the host's."""

    device = GPU

    def __init__(self) -> None:
        self.state = SimpleNamespace(value=None)

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def initial_seed(self) -> int:
        return torch.default_generator.initial_seed()

    def get_state(self) -> Tensor:
        return torch.default_generator.get_state()

    def set_state(self, state: Tensor) -> None:
        torch.default_generator.set_state(state)

    def clone_state(self) -> Any:
        return SimpleNamespace(value=torch.default_generator.get_state())

    def graphsafe_get_state(self) -> Any:
        return self.state

    def graphsafe_set_state(self, state: Any) -> None:
        self.state.value = torch.default_generator.get_state()
        torch.default_generator.set_state(state.value)
        self.state = state


class Graph:
    """A graph of the GPU: a capture of `graphs.Graph`, whose replays repeat its operations one by one."""

    def __init__(self, pool: object = None) -> None:
        self.operations: list[Operation] = []

    def capture(self, work: Callable[[], None]) -> None:
        _gpu.under_way = []
        try:
            work()
            self.operations = _gpu.under_way
            _gpu.captures.append(self.operations)
        finally:
            _gpu.under_way = None

    @torch.no_grad()
    def replay(self) -> None:
        for kernel, args, kwargs, outputs in self.operations:
            for output, value in zip(outputs, _tensors(kernel(*args, **kwargs)), strict=False):
                output.copy_(value)


@contextmanager
def _without_primary_context() -> Iterator[None]:
    """Let PyTorch's hooks say that no GPU has a context: the threads of the backward pass would ask the driver.

    The answer is the fifth function of the hooks' table, behind two destructors, isBuilt and isAvailable.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    get = library._ZN2at6detail12getCUDAHooksEv
    get.restype = ctypes.c_void_p
    hooks = ctypes.cast(get(), ctypes.POINTER(ctypes.c_void_p))
    before = hooks[0]
    assert before is not None
    table = (ctypes.c_void_p * 258)()
    ctypes.memmove(table, before - 16, 8 * 258)
    answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda this, index: False)
    table[2 + 4] = ctypes.cast(answer, ctypes.c_void_p).value
    hooks[0] = ctypes.addressof(table) + 16
    try:
        yield
    finally:
        hooks[0] = before


@contextmanager
def pretended() -> Iterator[PretendedGPU]:
    """Let the code inside see one GPU, in a process of its own (tests/training/test_pretended.py)."""
    assert "NORMLAB_PRETENDED_GPU" in os.environ, "a test of a pretended GPU belongs in tests/training/pretended_*.py"
    global _gpu
    _gpu = PretendedGPU()
    local, default = threading.local(), Stream()
    tensor, evaluate, write = torch.tensor, loop.evaluate.__wrapped__, checkpoint._write  # type: ignore[attr-defined]

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        before = getattr(local, "stream", default)
        local.stream = chosen
        try:
            yield
        finally:
            local.stream = before

    def made(*args: Any, device: Any = None, **options: Any) -> Tensor:
        value = tensor(*args, **options)
        return value if device is None else value.to(device)

    def on_host(value: Any) -> Any:
        return tree_map(lambda leaf: leaf.host.clone() if isinstance(leaf, Pretended) else leaf, value)

    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda *_: NAME,
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda *_: _gpu.waits_for("device"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (60 << 30, 80 << 30),
        "max_memory_allocated": lambda *_: 1,
        "memory_reserved": lambda *_: 1,
        "graph_pool_handle": lambda: (0, 1),
        "reset_peak_memory_stats": lambda *_: None,
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "current_stream": lambda *_: getattr(local, "stream", default),
        "default_stream": lambda *_: default,
        "default_generators": (Generator(),),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "get_sync_debug_mode": lambda: _gpu.mode,
        "set_sync_debug_mode": lambda mode: _gpu.set_sync_debug_mode(mode),
        "is_current_stream_capturing": lambda: _gpu.under_way is not None,
    }
    torch._C._ensureCUDADeviceGuardSet()  # where there is no GPU, one that does nothing
    with ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "tensor", made))
        stack.enter_context(mock.patch.object(preflight, "gpu_count", return_value=1))
        stack.enter_context(mock.patch.object(preflight, "gpu_memory_bytes", return_value=80 << 30))
        stack.enter_context(mock.patch.dict(graphs.GRAPHS, {"cuda": Graph}))
        # Wrapped tensors cannot be those of inference mode, and no file can hold them.
        stack.enter_context(mock.patch.object(loop, "evaluate", torch.no_grad()(evaluate)))
        stack.enter_context(
            mock.patch.object(checkpoint, "_write", lambda path, content: write(path, on_host(content)))
        )
        stack.enter_context(_without_primary_context())
        stack.enter_context(placed())
        yield _gpu


def placed() -> TorchDispatchMode:
    """Return a context in which a thread's new tensors can be on the GPU, for threads that begin inside `pretended`."""
    return _Placed()
