"""The device of a run: choice, threads, precision, memory, and provenance."""

import contextlib
import ctypes
import gc
import os
import platform
import resource
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from normlab import __version__
from normlab.common import frozen
from normlab.common import git as checkout
from normlab.common.errors import UserError
from normlab.config.schema import RunConfig

# cuBLAS and PyTorch read it once, when they first compute on a GPU, perhaps for a run that need not be deterministic;
# without it cuBLAS refuses deterministic ones.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DEFAULT_THREADS = torch.get_num_threads()  # before an earlier run of this process chose another number
PLANS = 2  # of cuDNN for a convolution that are timed, of those that it takes to be the fastest [A]; PyTorch's is 10
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose(device: str, share: str | None = None) -> torch.device:
    """Return the device of a run; `share` is the one that a launcher offers to a run that leaves it open.

    Raises:
        UserError: for a CUDA device that is not there.
    """
    if device == "auto":
        device = (share or "cuda:0") if torch.cuda.is_available() else "cpu"
    elif device == "cuda":
        device = share if share and share != "cpu" else "cuda:0"
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index >= torch.cuda.device_count():
        raise UserError(
            f"device={device}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices.\n"
            "Use device=cpu or device=auto, or check the driver (nvidia-smi)."
        )
    return chosen


def left_idle() -> str | None:
    """Return a sentence about an accelerator of this machine that device=auto does not use, if there is one.

    `torch.accelerator` comes last: it tells what this PyTorch was built for.
    """
    if torch.cuda.is_available():
        return None
    kinds: dict[str, Callable[[], bool]] = {"mps": torch.backends.mps.is_available, "xpu": torch.xpu.is_available}
    kind = next((kind for kind, is_available in kinds.items() if is_available()), None)
    if kind is None and torch.accelerator.is_available() and (found := torch.accelerator.current_accelerator()):
        kind = found.type
    return f"device=auto: runs train on the CPU; normlab has not been tried on this machine's {kind}." if kind else None


def prepare(config: RunConfig, device: torch.device, threads: int | None, *, packed: bool = False) -> None:
    """Apply the settings of a run that are the process's.

    Args:
        threads: None for all that PyTorch would use.
        packed: whether other runs share the process. cuDNN's plans are then not timed: each thread would do so anew.
    """
    torch.set_num_threads(threads or DEFAULT_THREADS)
    tf32 = config.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.use_deterministic_algorithms(config.deterministic, warn_only=False)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not (config.deterministic or packed)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark_limit = PLANS
        torch.cuda.set_device(device)  # initializes CUDA, which memory statistics need
    else:
        _keep_freed_memory()
    forget_peak_memory(device)


def stream_for(config: RunConfig, share: str | None) -> AbstractContextManager[object]:
    """Return a context in which a run on a GPU has a stream of its own: a graph is not captured on the default one.

    Raises:
        UserError: for a CUDA device that is not there.
    """
    chosen = choose(config.device, share)
    if chosen.type == "cpu" or torch.cuda.current_stream(chosen) != torch.cuda.default_stream(chosen):
        return nullcontext()  # or it has one already, among several
    return new_stream(chosen)


def new_stream(device: torch.device) -> AbstractContextManager[object]:
    """Return a context with a stream of its own on a GPU."""
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]  # of PyTorch


def generator_of(device: torch.device) -> torch.Generator:
    """Return the default generator of a device."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


def release_memory(device: torch.device) -> None:
    """Give back what a GPU's allocator keeps, that of unreachable tensors and graphs as well."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def forget_peak_memory(device: torch.device) -> None:
    """Start the measurement of peak memory anew, so that a process's earlier runs do not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # of another C library
            ctypes.CDLL(None).malloc_trim(0)  # what is kept for the next step is not the next run's
        with contextlib.suppress(OSError):  # hardened containers forbid it
            Path("/proc/self/clear_refs").write_text("5")


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def _keep_freed_memory() -> None:
    """Let glibc's malloc keep what a step frees for the next one.

    By default it maps every large tensor anew and gives it back at once, and each mapped page costs a fault and is
    filled with zeros by the kernel first.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library: it has no such function
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward pass in the run's precision."""
    half = HALF.get(config.precision)
    return torch.autocast(device.type, dtype=half) if half else nullcontext()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the highest memory use in bytes: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def provenance(device: torch.device) -> dict[str, Any]:
    """Return where a result is made: versions, commit, command, machine."""
    packages = ("torchvision", "hydra-core", "numpy")
    return {
        "versions": {
            "python": platform.python_version(),
            "normlab": __version__,
            "torch": str(torch.__version__),
            **{name: version(name) for name in packages},
        },
        "git": checkout.state(),
        "snapshot": snapshot.name if (snapshot := frozen.folder()) else None,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],  # without its folder
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "device": name_of(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"instructions": torch.backends.cpu.get_cpu_capability()} if device.type == "cpu" else {}),
    }


def name_of(device: torch.device) -> str:
    """Return the name of the GPU's or the processor's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
