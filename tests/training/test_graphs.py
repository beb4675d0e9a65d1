"""When a replay is trusted, and what is left of a capture that failed."""

import gc
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from training.tape import Tape

from normlab.training import graphs
from normlab.training.graphs import CudaGraph, Replayed, difference

CPU = torch.device("cpu")
BEFORE = {"loss": torch.zeros(3), "weight": torch.full((100,), 5.0), "steps": torch.tensor(7)}
AFTER = {"loss": torch.tensor([0.0, 2.0, 0.0]), "weight": torch.full((100,), 5.1), "steps": torch.tensor(8)}


def replayed_on_cpu(work, changes, refuse=pytest.fail) -> Replayed:
    return Replayed(CPU, work, changes, kind="a kind", precision="fp32", pool=None, refuse=refuse)


def changed(name: str, value: Tensor) -> dict[str, Tensor]:
    return AFTER | {name: value}


@pytest.mark.parametrize(
    ("replayed", "again", "wrong"),
    [
        (AFTER, AFTER, ""),
        (changed("weight", BEFORE["weight"]), AFTER, "weight"),  # not updated
        (changed("weight", AFTER["weight"] + 0.1), AFTER, "weight"),  # twice
        (changed("weight", AFTER["weight"] * (1 + 1e-7)), AFTER, ""),  # rounded
        (changed("loss", torch.tensor([2.0, 0.0, 0.0])), AFTER, "loss"),  # of another batch
        (changed("steps", BEFORE["steps"]), AFTER, "steps"),
        (changed("weight", AFTER["weight"] + 1e-3), changed("weight", AFTER["weight"] - 1e-3), ""),  # noise
        (changed("weight", AFTER["weight"] + 1e-2), changed("weight", AFTER["weight"] - 1e-3), "weight"),
        (changed("loss", AFTER["loss"] * 2), changed("loss", AFTER["loss"] * 2), "loss"),  # every other time
        (changed("weight", torch.full((100,), math.nan)), AFTER, "weight"),
    ],
)
def test_a_replay_has_to_come_to_what_the_work_comes_to(replayed, again, wrong) -> None:
    assert difference(BEFORE, replayed, [AFTER, again], 1e-3) == wrong


def test_numbers_that_are_not_finite_have_to_be_so_in_both() -> None:
    lost = changed("weight", torch.full((100,), math.inf))
    assert difference(BEFORE, lost, [lost, lost], 1e-3) == ""
    assert difference(BEFORE, AFTER, [lost, lost], 1e-3) == "weight"


def test_the_loss_of_a_batch_is_compared_by_itself() -> None:
    """With what it was an epoch ago it may be nearly equal, and those of the other batches do not count."""
    before, after, other = (torch.full((1000,), 3.0) for _ in range(3))
    after[7], other[7] = 3.001, 3.02
    assert difference({"loss": before}, {"loss": after + 1e-6}, [{"loss": after}] * 2, 1e-3) == ""
    assert difference({"loss": before}, {"loss": other}, [{"loss": after}] * 2, 1e-3) == "loss"


def test_the_work_is_done_once_a_call_however_it_is_carried_out(monkeypatch) -> None:
    """Random numbers are drawn once a call, too."""
    monkeypatch.setitem(graphs.GRAPHS, "cpu", Tape)
    total, drawn = torch.zeros(()), torch.zeros(8)

    def work() -> None:
        drawn.copy_(torch.rand(8))
        total.add_(1)

    replayed = replayed_on_cpu(work, lambda: {"total": total, "drawn": drawn})
    torch.manual_seed(0)
    shown = []
    for number in range(1, 8):
        replayed()
        assert total == number
        shown.append(drawn.clone())
    torch.manual_seed(0)
    assert all(torch.equal(one, torch.rand(8)) for one in shown)
    assert replayed.graph


@pytest.mark.parametrize("times", [1, 2])
def test_a_capture_without_memory_is_tried_once_more(monkeypatch, times) -> None:
    """After the allocator has given back what it keeps; then the work goes on from Python."""
    missing, said = ["no memory"] * times, []

    class Short(Tape):
        def capture(self, work) -> None:
            if missing:
                raise torch.OutOfMemoryError(missing.pop())
            super().capture(work)

    monkeypatch.setitem(graphs.GRAPHS, "cpu", Short)
    total = torch.zeros(())
    replayed = replayed_on_cpu(lambda: total.add_(1), lambda: {"total": total}, said.append)
    for _ in range(6):
        replayed()
    assert total == 6
    assert (said == ["the device has no memory for a graph"]) == (times == 2)
    assert bool(replayed.graph) == (times == 1)


class FailingGraph:
    """A graph of CUDA that reports a failed capture as PyTorch does: at its end, by an error of its own."""

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert (pool, capture_error_mode) == ("a pool", "thread_local")
        assert not gc.isenabled()
        assert not torch.is_inference_mode_enabled()

    def capture_end(self) -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def reset(self) -> None:
        raise AssertionError("it would free workspaces that other graphs of its stream use")


@pytest.fixture
def left(monkeypatch) -> SimpleNamespace:
    """What a capture leaves: states given to the generator, pools that ended, and the graph."""
    left = SimpleNamespace(states=[], pools=[], graph=FailingGraph())
    generator = SimpleNamespace(clone_state=lambda: "usable", graphsafe_set_state=left.states.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: left.graph)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(graphs, "_can_draw", lambda: False)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: left.pools.append(pool), raising=False)
    return left


def test_a_capture_that_failed_tells_why_and_leaves_the_process_usable(left) -> None:
    def work() -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaGraph("a pool").capture(work)
    assert (left.states, left.pools) == (["usable"], [(0, "a pool")])
    assert gc.isenabled()


def test_a_generator_that_draws_is_left_as_it_is(left, monkeypatch) -> None:
    monkeypatch.setattr(graphs, "_can_draw", lambda: True)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="previous error"):
        CudaGraph("a pool").capture(lambda: None)
    assert left.states == []


def test_a_capture_whose_end_fails_alone_tells_that(left) -> None:
    with pytest.raises(RuntimeError, match="previous error"):
        CudaGraph("a pool").capture(lambda: None)
    assert left.states == ["usable"]
