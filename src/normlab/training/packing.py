"""A list of runs trained by one process, several at a time (see turns.py)."""

import gc
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from normlab.config.schema import RunConfig
from normlab.training.interleaving import PackedTurn, Turns

SETTLED_STEPS = 8  # of a run: its graph is captured, its optimizer has its state
MARGIN = 1.25  # of memory: evaluations come later, and fragments are lost
Status = dict[str, Any]
Work = Callable[[RunConfig, PackedTurn], Status]


def carry_out(configs: Sequence[RunConfig], at_a_time: int, device: torch.device, work: Work) -> list[Status]:
    """What `work` returns for each of `configs`, `at_a_time` of them under way together.

    `work` must not raise. A run starts when the one that started before it has settled, and fits into the memory that
    is left (`Room`).
    """
    left = deque(enumerate(configs))
    results: dict[int, Status] = {}
    turns, room = Turns(), Room(device)

    def train() -> None:
        with ExitStack() as stack:
            if device.type == "cuda":
                torch.cuda.set_device(device)
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
            turn = _Settling(turns, device, room)
            stack.enter_context(turn)
            while left:
                if not room.admits(left[0][1]):
                    turn.rest()
                    continue
                number, config = left.popleft()
                turn.starts(config)
                results[number] = work(config, turn)
                turn.ends()

    threads = [threading.Thread(target=train, name=f"run {n}") for n in range(min(at_a_time, len(configs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(configs))]


class Room:
    """Memory of a device, and what runs were seen to need of it.

    A run is taken to need what the most demanding run so far needed, in proportion to its batch where that is larger.
    The memory of a CPU is left to its operating system.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.planned = device, device.type == "cuda"
        self.under_way = 0
        self.starting = False
        self.seen: list[tuple[int, int]] = []  # batch, bytes

    def free(self) -> float:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else float("inf")

    def admits(self, config: RunConfig) -> bool:
        """Whether a run may start now."""
        if self.under_way == 0 or not self.planned:
            return True  # nothing will make more room
        if self.starting:
            return False
        need = max((size * max(1.0, config.batch / batch) for batch, size in self.seen), default=0.0)
        return need * MARGIN <= self.free()


class _Settling(PackedTurn):
    """A turn that notes what a run that has just settled takes of the memory."""

    def __init__(self, turns: Turns, device: torch.device, room: Room) -> None:
        super().__init__(turns, device)
        self.room = room
        self.batch, self.before, self.settles_at = 0, 0.0, 0

    def starts(self, config: RunConfig) -> None:
        self.room.under_way += 1
        self.room.starting = True
        self.batch, self.before = config.batch, self.room.free()
        self.settles_at = self.steps + SETTLED_STEPS

    def over(self) -> None:
        super().over()
        if self.steps == self.settles_at:
            self._settle()

    def ends(self) -> None:
        if self.steps < self.settles_at:
            self._settle()
        self.room.under_way -= 1
        if self.device.type == "cuda":  # what it had, its graph's memory above all, is for the next
            gc.collect()
            torch.cuda.empty_cache()

    def rest(self) -> None:
        """Let the others go on until something has changed, perhaps."""
        if not self.turns.hand_over():
            raise AssertionError("a run waits for memory, and none is under way")
        self._mine_again()

    def _settle(self) -> None:
        taken = self.before - self.room.free()
        if 0 < taken < float("inf"):
            self.room.seen.append((self.batch, int(taken)))
        self.room.starting = False
