"""Several runs in one process end as they do alone, whatever becomes of the others."""

import itertools
import json
import threading
from pathlib import Path

import pytest
import torch
from small import SmallNet
from torch import Tensor

from normlab import runs
from normlab.common.errors import InterruptedRunError
from normlab.config.schema import RunConfig
from normlab.data.datasets import Loaded
from normlab.training import packing
from normlab.training.interleaving import FairLock, Interleaver
from normlab.training.interrupt import StopRequest
from normlab.training.packing import MemoryBudget
from normlab.training.run import Resources, train_run

CPU = torch.device("cpu")
SMALL = ("dataset.train_size=90", "model.target=small.SmallResNet", "model.name=small_resnet", "optimizer.lr=5e-3")


def ended(config: RunConfig) -> str:
    return (runs.read_status(runs.Run(config.as_dict()).folder) or {})["weights_sha256"]


def together(configs: list[RunConfig], at_a_time: int = 4, stop: StopRequest | None = None) -> list[dict]:
    """What became of each; an exception by its name."""
    loaded: Loaded = {}

    def work(config: RunConfig, interleaver: Interleaver) -> dict:
        try:
            return train_run(config, stop=stop or StopRequest(), resources=Resources("cpu", 1, interleaver, loaded))
        except Exception as error:
            return {"state": type(error).__name__}

    return packing.train_packed(configs, at_a_time, CPU, work)


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_packed_runs_end_bit_identical_to_solo_ones(tiny, engine: str) -> None:
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
    assert [ended(config) for config in packed] == [ended(config) for config in solo]


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
    good = [tiny(f"seed={seed}", "study=packed") for seed in range(2)]
    alone = [tiny(f"seed={seed}", "study=solo") for seed in range(2)]
    diverging = tiny("optimizer.lr=1e30", "study=packed")
    failing = tiny("study=packed", "model.target=training.test_packing.Fails", "model.name=fails")
    states = together([good[0], diverging, failing, good[1]], at_a_time=4)
    assert [one["state"] for one in states] == ["done", "diverged", "OutOfMemoryError", "done"]
    for config in alone:
        train_run(config)
    assert [ended(config) for config in good] == [ended(config) for config in alone]


def test_a_request_to_stop_reaches_all_and_they_go_on_later(tiny) -> None:
    configs = [tiny(f"seed={seed}", "checkpoint_seconds=null", "study=packed") for seed in range(3)]
    solo = [tiny(f"seed={seed}", "study=solo") for seed in range(3)]
    stop, steps = StopRequest(), []
    after_step = packing._MeasuringInterleaver.after_step

    def counted(interleaver: packing._MeasuringInterleaver) -> None:
        steps.append(1)
        if len(steps) == 7:
            stop.requested = "SIGTERM"
        after_step(interleaver)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing._MeasuringInterleaver, "after_step", counted)
        states = together(configs, at_a_time=3, stop=stop)
    assert {one["state"] for one in states} == {InterruptedRunError.__name__}
    assert [one["state"] for one in together(configs)] == ["done"] * 3
    for config in solo:
        train_run(config)
    assert [ended(config) for config in configs] == [ended(config) for config in solo]


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


def test_they_share_the_images(tiny, monkeypatch) -> None:
    from normlab.data import sources

    read = []
    digits = sources.digits
    monkeypatch.setattr(sources, "digits", lambda: (read.append(1), digits())[1])
    together([tiny(f"seed={seed}") for seed in range(3)], at_a_time=3)
    assert len(read) == 1


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


def test_a_record_says_that_a_run_was_packed(tiny) -> None:
    config = tiny()
    together([config])
    folder = Path(runs.Run(config.as_dict()).folder)
    assert json.loads((folder / "provenance.json").read_text())["packed"] is True
    assert json.loads((folder / "status.json").read_text())["peak_memory_bytes"] is None
