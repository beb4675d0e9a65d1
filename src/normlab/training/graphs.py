"""Graphs: work on a device that is launched from Python at first, then captured, checked, and replayed.

A replay costs Python one call. A graph is trusted once one replay has come to what the work itself comes to.
"""

import contextlib
import gc
import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from normlab.common.errors import first_line
from normlab.config.schema import RunConfig
from normlab.training.device import generator_of, release_memory

WARM_UP = 3  # times before the capture: libraries choose their kernels, optimizers make their state
# Of a replay's changes, beside the rounding of their results: the largest difference to those of the work itself, as a
# fraction of them, and as a multiple of the difference between two times of the work itself. [A]
TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 3e-2, "fp16": 3e-2}
NOISE, ROUNDING = 4.0, 1e-6
NO_MEMORY = "the device has no memory for a graph"
LOSS = "loss"  # the name of the tensor that keeps it
_NOT_OF_A_STEP: Any = {
    **dict.fromkeys(("study", "experiment", "budget", "tuned", "output_dir", "data_dir", "logger", "quiet"), True),
    **dict.fromkeys(("seed", "epochs", "schedule", "probe", "save_weights", "keep_checkpoint"), True),
    "optimizer": {"lr"},
}


class Graph(Protocol):
    """Work that is captured once and then replayed."""

    def capture(self, work: Callable[[], None]) -> None:
        """Record the operations of `work` and their tensors. Whether they are carried out meanwhile is left open.

        Raises:
            RuntimeError: if `work` reads a value on the host, or does anything else that cannot be captured. The
                process can go on as before.
        """

    def replay(self) -> None:
        """Repeat the operations on the values that their tensors have now.

        Decisions and numbers of Python stay as they were at the capture; random numbers come from the default
        generator.
        """


class CudaGraph:
    """A CUDA graph on the current stream, which must not be the default one.

    Args:
        pool: of `new_pool`, for the memory of graphs that are replayed one after the other and leave nothing there.
    """

    def __init__(self, pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def capture(self, work: Callable[[], None]) -> None:
        """See `Graph`. Unlike `torch.cuda.graph` it neither waits for the device nor empties the allocator's cache."""
        device, pool = torch.cuda.current_device(), self._pool
        generator = torch.cuda.default_generators[device]
        usable = generator.clone_state()
        try:
            with _no_garbage_collection():
                # Other threads of this process may use CUDA meanwhile. The generator's tensors are made here, for all.
                with torch.inference_mode(False):
                    self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    self._graph.capture_end()
        except RuntimeError as error:
            # The end of a capture that failed raises an error of its own, and leaves generator and allocator in it.
            with contextlib.suppress(RuntimeError):  # it had ended there already
                torch._C._cuda_endAllocateToPool(device, pool)  # noqa: SLF001  # there is no public way
            if not _can_draw():  # up to PyTorch 2.12
                generator.graphsafe_set_state(usable)
            if isinstance(error.__context__, RuntimeError):
                raise error.__context__ from error
            raise

    def replay(self) -> None:
        """Launch the graph."""
        self._graph.replay()


GRAPHS: dict[str, Callable[[Any], Graph]] = {"cuda": CudaGraph}  # by type of device; a test adds one for the CPU


def new_pool(device: torch.device) -> Any:
    """Return the handle of a pool of memory for graphs; None where they need none."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def _can_draw() -> bool:
    """Return whether the GPU's generator draws outside of a capture."""
    try:
        torch.empty(1, device="cuda").uniform_()
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect no garbage inside: freeing a GPU's memory during a capture would end it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Replayed:
    """Work that is done many times, from some time on by the replays of a graph.

    Args:
        device: that all of its tensors are on.
        work: reads nothing on the host; all that differs from time to time is in tensors.
        changes: returns the tensors that it changes, by name, as they are when it has been done a few times.
        kind: works of one kind are checked once in this process.
        precision: of the run.
        pool: of `new_pool`.
        refuse: called with the reason when the work cannot be captured; it goes on from Python if this returns.
    """

    checked: set[Hashable] = set()  # noqa: RUF012  # of this process

    def __init__(
        self,
        device: torch.device,
        work: Callable[[], None],
        changes: Callable[[], Mapping[str, Tensor]],
        *,
        kind: Hashable,
        precision: str,
        pool: Any,
        refuse: Callable[[str], None],
    ) -> None:
        self.device, self.work, self.changes, self.refuse = device, work, changes, refuse
        self.kind, self.tolerance, self.pool = kind, TOLERANCE[precision], pool
        self.graph: Graph | None = None
        self._set_aside: list[Graph] = []
        self.times = 0  # that it was done from Python
        self.refused = device.type not in GRAPHS

    @property
    def captures_next(self) -> bool:
        """Return whether the next call is the one that captures."""
        return self.graph is None and not self.refused and self.times >= WARM_UP

    def __call__(self) -> None:
        """Do the work once."""
        if self.graph:
            self.graph.replay()
        elif self.captures_next:
            self._capture()
        else:
            self._launch()

    def _launch(self) -> None:
        self.times += 1
        if self.refused or self.times < WARM_UP or self.device.type != "cuda":
            self.work()
        elif waits := waits_in(self.work):
            self._refuse(waits)

    def launch_from_now_on(self) -> None:
        """Use no graph any more. It is kept: to free it would free memory that others of its stream use."""
        self.refused = True
        self._set_aside += [self.graph] if self.graph else []
        self.graph = None

    def _refuse(self, why: str) -> None:
        self.launch_from_now_on()
        self.refuse(why)

    def _capture(self) -> None:
        """Capture the work and do it once: by the graph if one of its kind was checked, else from Python."""
        tensors, generator = dict(self.changes()), generator_of(self.device)
        before, draws = _copies(tensors), generator.get_state()

        def carry_out(way: Callable[[], None]) -> None:
            with torch.no_grad():
                for name, value in before.items():
                    tensors[name].copy_(value)
            generator.set_state(draws)
            way()

        def launched() -> dict[str, Tensor]:
            carry_out(self.work)
            return _copies(tensors)

        if why := self._why_no_graph():
            carry_out(self.work)
            self._refuse(why)
            return
        graph = self._set_aside[-1]
        carry_out(graph.replay)
        if self.kind not in self.checked:
            replayed, times = _copies(tensors), [launched(), launched()]
            wrong = difference(before, replayed, times, self.tolerance)
            if wrong:  # perhaps the work differs from itself by more than two times of it show
                times += [launched(), launched()]
                wrong = difference(before, replayed, times, self.tolerance)
            if wrong:
                self._refuse(f"a replay comes to another {wrong}")
                return
            self.checked.add(self.kind)
        self.graph = self._set_aside.pop()

    def _why_no_graph(self) -> str:
        """Capture the work in a graph, which is set aside; return why there is none, or ""."""
        why = self._captured()
        if why == NO_MEMORY:
            release_memory(self.device)  # which the allocator does not while a capture is under way
            why = self._captured()
        return why

    def _captured(self) -> str:
        self._set_aside.append(GRAPHS[self.device.type](self.pool))
        try:
            self._set_aside[-1].capture(self.work)
        except torch.OutOfMemoryError:
            return NO_MEMORY
        except RuntimeError as error:
            return first_line(error)
        return ""


def waits_in(work: Callable[[], None]) -> str:
    """Do a work on a GPU; return where it waits for the device, which none can that is to be captured, or ""."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waiting = [one for one in caught if "called a synchronizing" in str(one.message)]
    for one in caught:
        if one not in waiting and "prototype" not in str(one.message):  # of the mode itself
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return f"{waiting[0].filename}:{waiting[0].lineno} waits for the device" if waiting else ""


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def difference(
    before: Mapping[str, Tensor],
    replayed: Mapping[str, Tensor],
    launched: Sequence[Mapping[str, Tensor]],
    tolerance: float,
) -> str:
    """Return the name of a tensor that a replay changes in another way than the work itself does, or "".

    Norms are those of the difference over all of a tensor. Where the work itself comes to numbers that are not finite
    there is nothing to compare: so must the replay.

    Args:
        before: the tensors' values.
        replayed: after a replay.
        launched: after the work itself, several times from the same values: on a GPU sums may be in another order.
        tolerance: of `TOLERANCE`.
    """
    for name, value in launched[0].items():
        own, other, start, *again = (one[name].double() for one in (launched[0], replayed, before, *launched[1:]))
        if name == LOSS and value.dim():
            touched = (own != start) | (other != start)
            own, other, start, *again = (torch.where(touched, each, 0.0) for each in (own, other, start, *again))
        norms = torch.stack([each.norm() for each in (other - own, own - start, own, *(one - own for one in again))])
        error, change, size, *noises = norms.tolist()
        noise = max(noises)
        if name == LOSS:  # before any sum of a backward pass: so it tells work that differs from time to time, too
            noise, change = 0.0, size
        if not math.isfinite(size):
            same = torch.equal(own.isfinite(), other.isfinite())
        elif value.is_floating_point():
            same = error <= NOISE * noise + tolerance * change + ROUNDING * size
        else:
            same = error <= NOISE * noise
        if not same:
            return name
    return ""


def kind_of(config: RunConfig, images: int, *, packed: bool) -> Hashable:
    """Return a key of all settings that the operations of a step of so many images depend on.

    In a pack each is of a kind of its own: it is checked while the device works for other runs.
    """
    return object() if packed else f"{images} {config.model_dump_json(exclude=_NOT_OF_A_STEP, by_alias=True)}"
