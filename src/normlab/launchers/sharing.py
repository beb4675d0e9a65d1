"""How runs share the GPUs of this machine: how many at a time, and NVIDIA's MPS for the processes of a GPU.

Nothing of this has been run on a GPU yet; what is marked [A] is assumed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from normlab.common.cpu import cores
from normlab.common.errors import UserError, as_typed
from normlab.config.schema import FolderDataset, RegressionDataset
from normlab.launchers import preflight
from normlab.launchers.sweep import Job

PROCESSES, PACK = 4, 4  # that are chosen for a GPU, and runs for a process, at most [A]
PACKED_FROM = 8  # runs for each GPU [A]
SMALL = 64  # pixels: larger images keep a GPU busy by themselves [A]
RUN_BYTES = 1 << 30  # of a run without its images: CUDA's own, libraries, weights, an update's state [A]
# Of a ResNet-18 with norm=bn, for each pixel of a batch: 4.5 KiB are kept for the backward pass, and more is in use
# meanwhile [A]. A deeper network has proportionally more.
PIXEL_BYTES = 16 << 10
ROOM = 0.8  # of a GPU's memory that is planned with [A]

CONTROL = "nvidia-cuda-mps-control"
ANSWER_SECONDS = 30.0
# A process that uses a GPU: 0 if it can.
_TRIAL = """
import ctypes
cuda, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
raise SystemExit(bool(cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)))
"""


def keeps_to_itself(job: Job) -> bool:
    """Return whether a run keeps a device busy by itself, or would keep others of its process waiting."""
    dataset = job.config.dataset
    streamed = isinstance(dataset, FolderDataset) and dataset.storage != "memory"
    return streamed or job.config.engine == "compile"


def choose(jobs: Sequence[Job], gpus: int, slots: int | None, per_gpu: int | None, pack: int | None) -> tuple[int, int]:
    """Return the processes of a GPU and the runs that each trains at a time: as given, else by this rule.

    Several processes share a GPU if all runs have small images: up to 4, one for two cores, as many as fit into its
    memory. Each trains up to 4 runs at a time if steps are captured (an eager run leaves no time for another one of its
    process) and there are 8 or more runs for each GPU. In all else it is one process and one run, and with `slots`.
    """
    need = max(map(_need, jobs), default=0.0)
    if not gpus or slots or not 0 < need < float("inf"):
        return per_gpu or 1, pack or 1
    each, fit = -(-len(jobs) // gpus), int(ROOM * preflight.gpu_memory_bytes() / need)
    per_gpu = per_gpu or max(1, min(PROCESSES, each, cores() // 2 // gpus, fit // (pack or 1)))
    captured = each >= PACKED_FROM and all(job.config.engine in ("auto", "graph") for job in jobs)
    return per_gpu, pack or (max(1, min(PACK, fit // per_gpu)) if captured else 1)


def _need(job: Job) -> float:
    """Return the bytes that a run is expected to need on a GPU; infinite for one that is to have it for itself."""
    config = job.config
    side = 1 if isinstance(config.dataset, RegressionDataset) else config.dataset.crop_size or job.data.image_size
    if side is None or side > SMALL or keeps_to_itself(job):
        return float("inf")
    return RUN_BYTES + config.batch * side**2 * PIXEL_BYTES * (config.depth or 18) / 18


@contextmanager
def mps(wanted: bool, shared: bool, say: Callable[[str], object]) -> Iterator[None]:
    """Let the processes that share a GPU compute on it at the same time, by NVIDIA's MPS, as long as this lasts.

    Its daemon is started where it is installed and none runs, with folders of its own, and ended again. It is used only
    if a process can use a GPU under it. Where CUDA_MPS_PIPE_DIRECTORY is set already, that is left as it is.

    Args:
        wanted: hydra.launcher.mps.
        shared: whether processes share a GPU.
        say: called with a sentence for the user.

    Raises:
        UserError: if `wanted` is neither true nor false.
    """
    if not isinstance(wanted, bool):
        raise UserError(f"hydra.launcher.mps={as_typed(wanted)} is out of range: expected true or false.")
    control, named = shutil.which(CONTROL), "CUDA_MPS_PIPE_DIRECTORY" in os.environ
    if not (wanted and shared and control) or named or _succeeds([control], "get_server_list"):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="normlab-mps-", ignore_cleanup_errors=True) as folder:
        own = {f"CUDA_MPS_{kind}_DIRECTORY": str(Path(folder, kind.lower())) for kind in ("PIPE", "LOG")}
        for path in own.values():
            Path(path).mkdir()
        os.environ.update(own)
        try:
            if _succeeds([control, "-d"]) and _succeeds([sys.executable, "-c", _TRIAL]):
                say("Processes share a GPU by NVIDIA's MPS, started for this sweep. Without: hydra.launcher.mps=false.")
            else:
                _end(control, own)
                say("NVIDIA's MPS is installed and does not work here: the processes of a GPU take turns.")
            yield
        finally:
            _end(control, own)


def _end(control: str, own: dict[str, str]) -> None:
    if own.keys() <= os.environ.keys():
        _succeeds([control], "quit")
        for name in own:
            del os.environ[name]


def _succeeds(command: Sequence[str], asked: str = "") -> bool:
    """Return whether a command succeeds, a daemon once it is in the background; Ctrl-C is not for it."""
    # Not the GPUs of CUDA_VISIBLE_DEVICES: the daemon would number them anew, and they are chosen by its clients.
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        subprocess.run(
            command,
            input=asked,
            text=True,
            stdout=subprocess.DEVNULL,  # no pipes: a daemon would keep them open
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=ANSWER_SECONDS,
            start_new_session=True,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return True
