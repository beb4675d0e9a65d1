"""A list of runs trained by one process, several at a time (see interleaving.py)."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from normlab.common import bugs
from normlab.config.schema import RunConfig
from normlab.runs import State
from normlab.training.device import new_stream, release_memory
from normlab.training.interleaving import FairLock, Interleaver, PackedInterleaver

SETTLED_STEPS = 8  # of a run: its graph is captured, its optimizer has its state
MARGIN = 1.25  # of memory: evaluations come later, and fragments are lost
Status = dict[str, Any]
Work = Callable[[RunConfig, Interleaver], Status]


def train_packed(configs: Sequence[RunConfig], at_a_time: int, device: torch.device, work: Work) -> list[Status]:
    """Return the status that `work` returns for each of `configs`, `at_a_time` of them under way together.

    A run starts when the one that started before it has settled, and fits into the memory that is left
    (`MemoryBudget`). An error that is no run's own, as every call of CUDA raises once a kernel has failed, ends the
    whole: the runs without a status have crashed with it.

    Args:
        work: trains one run; returns what becomes of it, its own errors as well.
    """
    left = deque(enumerate(configs))
    results: dict[int, Status] = {}
    lock, budget = FairLock(), MemoryBudget(device)
    errors: list[BaseException] = []

    def train() -> None:
        with _kept(errors), ExitStack() as stack:
            if device.type == "cuda":
                torch.cuda.set_device(device)
                stack.enter_context(new_stream(device))
            interleaver = stack.enter_context(_MeasuringInterleaver(lock, device, budget))
            stack.enter_context(_kept(errors))  # before the lock is another thread's
            while left and not errors:
                if not budget.admits(left[0][1]):
                    interleaver.wait_for_others()
                    continue
                number, config = left.popleft()
                interleaver.start_run(config)
                results[number] = work(config, interleaver)
                if results[number].get("crashed") and device.type == "cuda":
                    torch.cuda.synchronize(device)  # raises if the error has spoiled the process for all
                interleaver.end_run()

    threads = [threading.Thread(target=train, name=f"run {n}") for n in range(min(at_a_time, len(configs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] if number in results else crashed(errors[0]) for number in range(len(configs))]


def crashed(error: BaseException) -> Status:
    """Return the status of a run that an unforeseen error has ended."""
    return {"state": State.FAILED, "error": bugs.told(error), "crashed": True}


@contextmanager
def _kept(errors: list[BaseException]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        errors.append(error)


class MemoryBudget:
    """Memory of a device, and how much of it runs took.

    A run is expected to need as much as the most demanding run so far, in proportion to its batch where that is larger.
    The memory of a CPU is left to its operating system.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.limited = device, device.type == "cuda"
        self.under_way = 0
        self.starting = False
        self.measured: list[tuple[int, int]] = []  # batch, bytes

    def reserved(self) -> int:
        """Return the bytes that this process keeps of the device."""
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    def free(self) -> float:
        """Return the bytes that are free on the device; infinite for a CPU."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else float("inf")

    def admits(self, config: RunConfig) -> bool:
        """Return whether a run may start now."""
        if self.under_way == 0 or not self.limited:
            return True  # nothing will make more room
        if self.starting:
            return False
        need = max((size * max(1.0, config.batch / batch) for batch, size in self.measured), default=0.0)
        return need * MARGIN <= self.free()


class _MeasuringInterleaver(PackedInterleaver):
    """An interleaver that measures how much memory each of its runs has taken once it has settled."""

    def __init__(self, lock: FairLock, device: torch.device, budget: MemoryBudget) -> None:
        super().__init__(lock, device)
        self.budget = budget
        self.batch, self.reserved_before, self.settles_at = 0, 0, 0

    def start_run(self, config: RunConfig) -> None:
        self.budget.under_way += 1
        self.budget.starting = True
        self.batch, self.reserved_before = config.batch, self.budget.reserved()
        self.settles_at = self.steps + SETTLED_STEPS

    def after_step(self) -> None:
        super().after_step()
        if self.steps == self.settles_at:
            self._measure()

    def end_run(self) -> None:
        if self.steps < self.settles_at:
            self._measure()
        self.budget.under_way -= 1
        release_memory(self.device)  # its graph's above all, for the next

    def wait_for_others(self) -> None:
        """Let the others go on until memory may have become free."""
        if not self._hand_over():
            raise AssertionError("a run waits for memory, and none is under way")

    def _measure(self) -> None:
        taken = self.budget.reserved() - self.reserved_before
        if taken > 0:
            self.budget.measured.append((self.batch, taken))
        self.budget.starting = False
