"""Several runs in one process: each in a thread of its own, but only one at a time says what is to be done.

While the device works for some, Python goes on with the next. A run hands over between two steps, so that no run is
ever in the middle of anything when another one has the turn: global state of PyTorch (the default generator, what a
capture records, what tracing patches) is one run's at a time.
"""

import threading
import time
from collections import deque

import torch

SLICE = 8  # steps that a run asks of a GPU before it hands over
AHEAD = 2  # slices that may still be waiting on the GPU: enough to keep it busy while others have their turn


class Turn:
    """Of a run that has its process to itself."""

    packed = False

    def over(self) -> None:
        """After a step: the next one may be another run's."""

    def wait(self) -> None:
        """Until the device has done what it was asked to; meanwhile others go on."""


class Turns:
    """A baton for threads: who waits for it longest gets it next."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    def take(self) -> None:
        with self._guard:
            if not self._held:
                self._held = True
                return
            mine = self._queue()
        mine.acquire()

    def give(self) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False

    def hand_over(self) -> bool:
        """Let everybody else who waits go first; False if nobody does."""
        with self._guard:
            if not self._waiting:
                return False
            mine = self._queue()
            self._waiting.popleft().release()
        mine.acquire()
        return True

    def _queue(self) -> threading.Lock:
        mine = threading.Lock()
        mine.acquire()
        self._waiting.append(mine)
        return mine


class PackedTurn(Turn):
    """Of one run among several; made by the thread that trains it, and entered while it does.

    On a GPU the run has a stream of its own, and a state of the default generator of its own, from which captured
    graphs read their seed whenever they are replayed.
    """

    packed = True

    def __init__(self, turns: Turns, device: torch.device) -> None:
        self.turns, self.device = turns, device
        self.steps = 0
        self._slices: deque[torch.cuda.Event] = deque()
        if device.type == "cuda":
            self._generator = torch.cuda.default_generators[device.index]
            self._state = self._generator.clone_state()

    def __enter__(self) -> "PackedTurn":
        self.turns.take()
        self._mine_again()
        return self

    def __exit__(self, *_: object) -> None:
        self.turns.give()

    def over(self) -> None:
        self.steps += 1
        if self.device.type != "cuda":
            self._pass_on()
        elif self.steps % SLICE == 0:
            self._slices.append(_asked_so_far())
            self._pass_on()
            while len(self._slices) > AHEAD:
                self._until(self._slices.popleft())

    def wait(self) -> None:
        if self.device.type == "cuda":
            self._slices.clear()
            self._until(_asked_so_far())

    def _until(self, event: torch.cuda.Event) -> None:
        while not event.query():
            self._pass_on()

    def _pass_on(self) -> None:
        if self.turns.hand_over():
            self._mine_again()
        elif self.device.type == "cuda":
            time.sleep(5e-5)

    def _mine_again(self) -> None:
        if self.device.type == "cuda":
            self._generator.graphsafe_set_state(self._state)


def _asked_so_far() -> torch.cuda.Event:
    """What the device has done all that it was asked to do on this thread's stream."""
    event = torch.cuda.Event()
    event.record()
    return event
