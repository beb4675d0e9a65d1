"""When a run waits for a GPU, and when not: on a stream whose events are over when they are queried a second time."""

import math
from unittest import mock

import pytest
import torch

from normlab.training.interleaving import AHEAD, SLICE, FairLock, PackedInterleaver
from normlab.training.supervision import LossCheck


class Stream:
    """A stream that counts its events and notes the queries of each."""

    def __init__(self) -> None:
        self.recorded = 0
        self.queries: list[int] = []

    def record_event(self) -> "Event":
        self.recorded += 1
        return Event(self, self.recorded)


class Event:
    def __init__(self, stream: Stream, number: int) -> None:
        self.stream, self.number = stream, number

    def query(self) -> bool:
        self.stream.queries.append(self.number)
        return self.stream.queries.count(self.number) > 1


@pytest.fixture
def stream(monkeypatch) -> Stream:
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return stream


def test_losses_are_checked_without_waiting(stream, monkeypatch) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, pin_memory: zeros(*size, dtype=dtype))
    check = LossCheck(torch.device("cuda"))
    finite, diverged = torch.ones(3), torch.tensor([1.0, math.nan])
    assert not check.failed(finite)
    assert not check.failed(diverged)  # the first check is not over, and no second one begins
    assert not check.failed(diverged)
    assert stream.recorded == 2
    assert not check.failed(finite)
    assert check.failed(finite)
    assert stream.queries == [1, 1, 2, 2]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_losses_on_a_cpu_are_checked_at_once(loss) -> None:
    check = LossCheck(torch.device("cpu"))
    assert not check.failed(torch.ones(3))
    assert check.failed(torch.tensor([1.0, loss]))
    assert not check.failed(torch.ones(3))


def test_a_packed_run_on_a_gpu_is_two_slices_ahead_of_it(stream, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "default_generators", (mock.Mock(),))
    interleaver = PackedInterleaver(FairLock(), torch.device("cuda:0"))
    for _ in range(AHEAD * SLICE):
        interleaver.after_step()
    assert (stream.recorded, stream.queries) == (AHEAD, [])
    for _ in range(SLICE):
        interleaver.after_step()
    assert (stream.recorded, stream.queries) == (AHEAD + 1, [1, 1])
    interleaver.synchronize()
    assert stream.queries == [1, 1, AHEAD + 2, AHEAD + 2]  # what was launched last is over last
