"""Several runs in one process, each in a thread of its own, of which one at a time launches operations.

While the device works for some, Python goes on with the next. A run makes way between two steps and between two parts
of its set-up, so that no run is ever in the middle of anything while another one works: global state of PyTorch (the
default generator, what a capture records, what tracing patches) is one run's at a time.
"""

import threading
import time
from collections import deque
from typing import Self

import torch

SLICE = 8  # steps that a run launches on a GPU before it makes way
AHEAD = 2  # slices that the GPU may not have done yet: enough to keep it busy while others launch theirs


class Interleaver:
    """The interleaver of a run that has its process to itself: nothing to make way for."""

    packed = False

    def make_way(self) -> None:
        """Let others go on between two parts of the set-up, so that the device has work meanwhile."""

    def after_step(self) -> None:
        """Make way for another run after a step."""

    def synchronize(self) -> None:
        """Wait until the device has done all that the run launched; meanwhile others go on."""


class FairLock:
    """A lock that goes to the thread that has waited for it longest."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self) -> None:
        """Wait for the lock."""
        mine = threading.Lock()
        with self._guard:
            if not self._held:
                self._held = True
                return
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()  # until the thread that held the lock releases it

    def release(self) -> None:
        """Give the lock to the next thread."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False

    def hand_over(self) -> bool:
        """Let everybody else who waits go first; return False if nobody does."""
        if not self._waiting:
            return False
        self.release()
        self.acquire()
        return True


class PackedInterleaver(Interleaver):
    """The interleaver of one run among several; made by the thread that trains it, and entered while it does.

    On a GPU the run has a stream of its own, and a state of the default generator of its own, from which captured
    graphs read their seed whenever they are replayed.
    """

    packed = True

    def __init__(self, lock: FairLock, device: torch.device) -> None:
        self.lock, self.device = lock, device
        self.steps = 0
        self._slices: deque[torch.Event] = deque()  # the ends of those that the device may not have done yet
        if device.type == "cuda":
            self._generator = torch.cuda.default_generators[device.index]
            self._generator_state = self._generator.clone_state()

    def __enter__(self) -> Self:
        self.lock.acquire()
        try:
            self._resume()
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def make_way(self) -> None:
        """See `Interleaver`."""
        self._hand_over()

    def after_step(self) -> None:
        """Make way for another run: after each step on a CPU, after a slice on a GPU, until few are left to do."""
        self.steps += 1
        if self.device.type != "cuda":
            self.make_way()
        elif self.steps % SLICE == 0:
            self._slices.append(torch.cuda.current_stream().record_event())
            self._make_way_or_sleep()
            if len(self._slices) > AHEAD:
                self._wait_for(self._slices.popleft())

    def synchronize(self) -> None:
        """Wait for the run's stream; meanwhile others go on."""
        if self.device.type == "cuda":
            self._slices.clear()
            self._wait_for(torch.cuda.current_stream().record_event())

    def _wait_for(self, event: torch.Event) -> None:
        while not event.query():
            self._make_way_or_sleep()

    def _make_way_or_sleep(self) -> None:
        if not self._hand_over():
            time.sleep(5e-5)

    def _hand_over(self) -> bool:
        """Let everybody else who waits go first; return False if nobody does."""
        if self.device.type == "cuda":  # after a failed capture it is another one
            self._generator_state = self._generator.graphsafe_get_state()
        handed_over = self.lock.hand_over()
        if handed_over:
            self._resume()
        return handed_over

    def _resume(self) -> None:
        if self.device.type == "cuda":
            self._generator.graphsafe_set_state(self._generator_state)
