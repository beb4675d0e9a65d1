"""Several runs in one process end as they do alone, whatever becomes of the others."""

import contextlib
import itertools
import json
import threading
from typing import Any

import pytest
import torch
from outcome import folder, outcome, status
from small import SmallNet
from torch import Tensor

from normlab.common.errors import InterruptedRunError
from normlab.config.schema import RunConfig
from normlab.data import sources
from normlab.data.datasets import Loaded
from normlab.training import packing, resume
from normlab.training.interleaving import FairLock, Interleaver, PackedInterleaver
from normlab.training.interrupt import StopRequest
from normlab.training.packing import MemoryBudget
from normlab.training.run import Resources, train_run
from normlab.training.state import TrainingState

CPU = torch.device("cpu")
SMALL = ("dataset.train_size=90", "model.target=small.SmallResNet", "model.name=small_resnet", "optimizer.lr=5e-3")


def together(configs: list[RunConfig], at_a_time: int = 4, stop: StopRequest | None = None) -> list[dict]:
    """The status that each ended with; an exception by its name."""
    loaded: Loaded = {}

    def work(config: RunConfig, interleaver: Interleaver) -> dict:
        try:
            return train_run(config, stop=stop or StopRequest(), resources=Resources("cpu", 1, interleaver, loaded))
        except Exception as error:
            return {"state": type(error).__name__}

    return packing.train_packed(configs, at_a_time, CPU, work)


@pytest.mark.parametrize("engine", ["eager", pytest.param("graph", marks=pytest.mark.slow)])
def test_packed_runs_end_bit_identical_to_solo_ones(tiny, engine) -> None:
    """Variants with random numbers, batch sizes, seeds, networks and augmentation mixed; deterministic algorithms."""
    mixed = [
        (*SMALL, "norm=bn"),
        (*SMALL, "norm=noisy_bn", "batch=8"),
        (*SMALL, "norm=renorm", "seed=1", "norm_batch=4"),
        (*SMALL, "norm=none", "batch=32", "dataset.flip=true", "eval_stats=running"),
        (*SMALL, "norm=wn", "init=lsuv", "optimizer=adam"),
        ("norm=bn", "batch=8"),  # with dropout
        (*SMALL, "norm=bn", "eval_stats=precise", "precise_batches=2", "epochs=3"),
    ]
    packed, solo = (
        [tiny(*settings, f"engine={engine}", "deterministic=true", f"study={study}") for settings in mixed]
        for study in ("packed", "solo")
    )
    try:
        states = together(packed, at_a_time=3)
        assert [one["state"] for one in states] == ["done"] * len(mixed)
        for config in solo:
            train_run(config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [outcome(config) for config in packed] == [outcome(config) for config in solo]


def test_they_do_make_way_for_each_other(tiny, monkeypatch) -> None:
    order: list[int] = []
    after_step = packing._MeasuringInterleaver.after_step

    def noted(interleaver: packing._MeasuringInterleaver) -> None:
        order.append(threading.get_ident())
        after_step(interleaver)

    monkeypatch.setattr(packing._MeasuringInterleaver, "after_step", noted)
    together([tiny(f"seed={seed}") for seed in range(3)], at_a_time=3)
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert len(set(order)) == 3
    assert changes > 10  # one after the other, it would be two


def test_others_go_on_while_a_run_is_set_up(tiny, monkeypatch) -> None:
    order: list[tuple[str, str]] = []
    after_step, set_up = packing._MeasuringInterleaver.after_step, resume.set_up

    def stepped(interleaver: packing._MeasuringInterleaver) -> None:
        order.append(("step", threading.current_thread().name))
        after_step(interleaver)

    def noted(*args: Any) -> TrainingState:
        order.append(("begins", threading.current_thread().name))
        state = set_up(*args)
        order.append(("ends", threading.current_thread().name))
        return state

    monkeypatch.setattr(packing._MeasuringInterleaver, "after_step", stepped)
    monkeypatch.setattr(resume, "set_up", noted)
    together([tiny("epochs=9"), tiny("epochs=1", "seed=1"), tiny("epochs=1", "seed=2")], at_a_time=2)
    *_, begins = (number for number, (what, _) in enumerate(order) if what == "begins")
    ends = order.index(("ends", order[begins][1]), begins)
    assert {what for what, _ in order[begins + 1 : ends]} == {"step"}


class Fails(SmallNet):
    """Out of memory at its first batch."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(_too_large(images))


@torch.fx.wrap
def _too_large(images: Tensor) -> Tensor:
    if images.device.type != "meta":
        raise torch.OutOfMemoryError("planted")
    return images


def test_one_that_diverges_or_runs_out_of_memory_leaves_without_the_others(tiny) -> None:
    good, alone = ([tiny(f"seed={seed}", f"study={study}") for seed in range(2)] for study in ("packed", "solo"))
    diverging = tiny("optimizer.lr=1e30", "study=packed")
    failing = tiny("study=packed", "model.target=training.test_packing.Fails", "model.name=fails")
    states = together([good[0], diverging, failing, good[1]], at_a_time=4)
    assert [one["state"] for one in states] == ["done", "diverged", "OutOfMemoryError", "done"]
    for config in alone:
        train_run(config)
    assert [outcome(config) for config in good] == [outcome(config) for config in alone]


def test_a_request_to_stop_reaches_all_and_they_go_on_later(tiny, steps) -> None:
    configs, solo = ([tiny(f"seed={seed}", f"study={study}") for seed in range(3)] for study in ("packed", "solo"))
    stop = StopRequest()
    steps.after(7, lambda: setattr(stop, "requested", "SIGTERM"))
    states = together(configs, at_a_time=3, stop=stop)
    assert {one["state"] for one in states} == {InterruptedRunError.__name__}
    assert [one["state"] for one in together(configs)] == ["done"] * 3
    for config in solo:
        train_run(config)
    assert [outcome(config) for config in configs] == [outcome(config) for config in solo]


def test_memory_is_planned(tiny) -> None:
    budget = MemoryBudget(CPU)
    budget.limited = True
    free = {"bytes": 1000.0}
    budget.free = lambda: free["bytes"]  # type: ignore[method-assign]
    small, large = tiny("batch=8"), tiny("batch=32")
    assert budget.admits(large)  # the first one always is: nothing will make more room
    budget.under_way, budget.starting = 1, True
    assert not budget.admits(small)  # until it is known what the first one takes
    budget.starting, budget.measured = False, [(8, 100)]
    free["bytes"] = 130
    assert budget.admits(small)
    assert not budget.admits(large)  # four times as many images
    free["bytes"] = 510
    assert budget.admits(large)


def test_with_no_room_for_two_they_go_one_after_the_other(tiny, monkeypatch) -> None:
    most = []
    start_run = packing._MeasuringInterleaver.start_run
    monkeypatch.setattr(MemoryBudget, "admits", lambda budget, config: budget.under_way == 0)

    def noted(interleaver: packing._MeasuringInterleaver, config: RunConfig) -> None:
        start_run(interleaver, config)
        most.append(interleaver.budget.under_way)

    monkeypatch.setattr(packing._MeasuringInterleaver, "start_run", noted)
    states = together([tiny(f"seed={seed}") for seed in range(3)], at_a_time=3)
    assert [one["state"] for one in states] == ["done"] * 3
    assert most == [1, 1, 1]


def test_they_share_the_images_and_their_records_say_that_they_were_packed(tiny, monkeypatch) -> None:
    read, digits = [], sources.digits
    monkeypatch.setattr(sources, "digits", lambda: (read.append(1), digits())[1])
    configs = [tiny(f"seed={seed}") for seed in range(3)]
    together(configs, at_a_time=3)
    assert len(read) == 1
    for config in configs:
        assert json.loads((folder(config) / "provenance.json").read_text())["packed"] is True
        assert status(config)["peak_memory_bytes"] is None


def test_a_fair_lock_goes_round() -> None:
    lock, order = FairLock(), []
    barrier = threading.Barrier(3)

    def work(name: str) -> None:
        barrier.wait()
        lock.acquire()
        for _ in range(4):
            order.append(name)
            while len(set(order)) < 3 and lock.hand_over():
                pass
            lock.hand_over()
        lock.release()

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert sorted(order) == sorted("abc" * 4)


class StickyError:
    """An error after which every call of CUDA raises it again, for the rest of the process."""

    def __init__(self) -> None:
        self.happened = False

    def check(self, *_: object) -> None:
        if self.happened:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Device:
    """What a packed run's thread asks a GPU for: events that are done, states of a generator, streams."""

    def __init__(self, error: StickyError) -> None:
        self.check = error.check

    def __getattr__(self, name: str) -> object:
        return lambda *_: (self.check(), self)[1]


@pytest.mark.parametrize("run", range(5))
def test_an_error_that_spoils_the_process_fails_its_run_and_those_that_are_not_finished(tiny, monkeypatch, run) -> None:
    """In the third step of one of five runs, three at a time: some are finished, some not begun."""
    error, memory = StickyError(), (50 << 30, 80 << 30)
    device = Device(error)
    for name in ("set_device", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, error.check)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (error.check(), memory)[1])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: device)
    monkeypatch.setattr(torch.cuda, "default_generators", (device,))
    monkeypatch.setattr(packing, "new_stream", lambda _: contextlib.nullcontext())
    configs = [tiny(f"seed={seed}") for seed in range(5)]

    def work(config: RunConfig, interleaver: Interleaver) -> dict:
        try:
            for step in range(20):
                error.happened |= (config.seed, step) == (run, 3)
                error.check()
                interleaver.after_step()
            return {"state": "done"}
        except Exception as raised:
            return packing.crashed(raised)

    ended = packing.train_packed(configs, 3, torch.device("cuda:0"), work)
    finished = [one for one in ended if one == {"state": "done"}]
    assert ended[run] not in finished
    assert len(finished) <= run
    for one in ended:
        assert one in finished or (one["state"], one["crashed"]) == ("failed", True)
        assert one in finished or "illegal memory access" in one["error"]


def test_an_error_of_one_run_alone_leaves_the_others(tiny) -> None:
    """Outside of CUDA nothing is spoiled."""
    configs = [tiny(f"seed={seed}") for seed in range(4)]

    def work(config: RunConfig, interleaver: Interleaver) -> dict:
        return packing.crashed(ValueError()) if config.seed == 0 else {"state": "done"}

    assert [one["state"] for one in packing.train_packed(configs, 2, CPU, work)] == ["failed"] + ["done"] * 3


def test_a_thread_that_cannot_begin_leaves_the_lock_to_the_others(monkeypatch) -> None:
    error, lock = StickyError(), FairLock()
    monkeypatch.setattr(torch.cuda, "default_generators", (Device(error),))
    interleaver = PackedInterleaver(lock, torch.device("cuda:0"))
    error.happened = True
    with pytest.raises(RuntimeError, match="illegal memory access"):
        interleaver.__enter__()
    assert not lock._held
