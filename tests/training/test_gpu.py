"""Tests of all that only a GPU can show: captured CUDA graphs, streams, packed runs. `scripts/gpu_check` runs them."""

import pytest
import torch
from outcome import rows, weights
from torch import Tensor
from training.test_engines import NORMS, SMALL, train_both

from normlab.config.schema import RunConfig
from normlab.data.datasets import Loaded
from normlab.training import device, engines, graphs, packing, supervision
from normlab.training.interleaving import Interleaver
from normlab.training.interrupt import StopRequest
from normlab.training.run import Resources, train_run
from normlab.training.supervision import LossCheck

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
# Deterministic, so that two runs differ by the engine alone.
SETTINGS = (*SMALL, "device=cuda", "deterministic=true")


@pytest.fixture(autouse=True)
def _as_before():
    yield
    torch.use_deterministic_algorithms(False)


def assert_near(config: RunConfig, other: RunConfig, rel: float = 1e-3) -> None:
    names = ("step", "train_loss", "test_loss", "lr")
    for one, another in zip(rows(config), rows(other), strict=True):
        assert [one[name] for name in names] == pytest.approx([another[name] for name in names], rel=rel)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_trains_captured_as_it_does_step_by_step(tiny, norm) -> None:
    assert_near(*train_both(tiny, *SETTINGS, f"norm={norm}"))


@pytest.mark.parametrize(
    "settings",
    [
        ("precision=bf16",),
        ("precision=tf32",),
        ("precision=fp16",),
        ("memory_format=channels_last",),
        ("optimizer=adam",),
        ("optimizer=rmsprop", "optimizer.lr=1e-3"),
        ("optimizer.agc=0.05", "norm_batch=4"),
        ("weight_average=0.9",),
        ("dataset.flip=true", "dataset.crop_padding=1"),
        ("sampler=paired", "sampler.images_per_label=4"),
        ("probe=[gradients,landscape]",),
        ("model.target=small.SmallNet", "model.name=small"),  # with dropout, whose masks are the same
    ],
    ids=" ".join,
)
def test_every_kind_of_step_trains_captured_as_it_does_step_by_step(tiny, settings) -> None:
    assert_near(*train_both(tiny, *SETTINGS, *settings), rel=2e-2 if "16" in settings[0] else 1e-3)


def test_engine_auto_is_a_graph_on_a_gpu_and_its_capture_is_timed(tiny) -> None:
    status = train_run(tiny(*SETTINGS, "engine=auto"))
    assert status["state"] == "done"
    assert status["capture_seconds"] > 0


def test_a_process_goes_on_after_a_capture_that_failed() -> None:
    """It draws random numbers, has the memory of the capture back, and captures again."""
    x = torch.ones(1000, device="cuda")
    with device.new_stream(torch.device("cuda:0")):
        with pytest.raises(RuntimeError, match="captur"):
            graphs.CudaGraph(torch.cuda.graph_pool_handle()).capture(lambda: torch.rand_like(x).mean().item())
        assert 0 < float(torch.rand_like(x).mean()) < 1
        graph = graphs.CudaGraph(torch.cuda.graph_pool_handle())
        graph.capture(lambda: x.copy_(torch.rand_like(x)))
        graph.replay()
        first = x.clone()
        graph.replay()
        assert not torch.equal(x, first)


def test_replays_and_checks_of_losses_wait_for_nothing(tiny, monkeypatch) -> None:
    step, failed = engines.Graphed.step, LossCheck.failed

    def strict_step(engine: engines.Graphed) -> None:
        replayed = engine.steps.get(engine.train.images_of(engine.position.batch))
        captured = replayed is not None and replayed.graph is not None
        torch.cuda.set_sync_debug_mode("error" if captured else "default")
        try:
            step(engine)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def strict_failed(check: LossCheck, losses: Tensor) -> bool:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return failed(check, losses)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(supervision, "HEARTBEAT_SECONDS", 0.0)
    monkeypatch.setattr(engines.Graphed, "step", strict_step)
    monkeypatch.setattr(LossCheck, "failed", strict_failed)
    assert train_run(tiny(*SETTINGS, "engine=graph"))["state"] == "done"


@pytest.mark.parametrize("after", [2, 5, 9])
def test_an_interrupted_captured_run_goes_on_to_the_same_end(tiny, after, steps) -> None:
    config, undisturbed = (tiny(*SETTINGS, "engine=graph", f"study={study}") for study in ("parts", "whole"))
    train_run(undisturbed)
    steps.interrupt(config, after)
    train_run(config)
    assert_near(config, undisturbed)


def test_divergence_is_noticed_at_its_step(tiny) -> None:
    """At least at the end of the epoch, by the losses that the replays noted."""
    status = train_run(tiny(*SETTINGS, "engine=graph", "optimizer.lr=1e30"))
    assert status["state"] == "diverged"
    assert 1 <= status["diverged_step"] <= 6


def test_packed_runs_end_bit_identical_to_solo_ones(tiny) -> None:
    settings = [
        (f"norm={norm}", f"batch={batch}", f"seed={batch}")
        for norm in ("bn", "none", "noisy_bn", "gn")
        for batch in (8, 16)
    ]
    loaded: Loaded = {}
    packed, solo = (
        [tiny(*SETTINGS, *one, "engine=graph", f"study={study}") for one in settings] for study in ("packed", "solo")
    )
    states = packing.train_packed(
        packed,
        4,
        torch.device("cuda:0"),
        lambda config, interleaver: train_run(
            config, stop=StopRequest(), resources=Resources("cuda:0", 1, interleaver, loaded)
        ),
    )
    assert [one["state"] for one in states] == ["done"] * len(settings)
    for config in solo:
        train_run(config)
    assert [weights(config) for config in packed] == [weights(config) for config in solo]


def test_a_packed_run_without_memory_leaves_the_others(tiny) -> None:
    """Of a GPU of 1 GiB, which a layer of the middle one asks for twice over."""
    small = [tiny(*SETTINGS, "engine=graph", f"seed={seed}", "study=packed") for seed in range(2)]
    network = ("model.target=small.SmallNet", "model.name=small")
    large = tiny(*SETTINGS, *network, "study=packed", "dataset.image_size=256", "dataset.train_size=1024", "batch=1024")

    def work(config: RunConfig, interleaver: Interleaver) -> dict:
        try:
            return train_run(config, stop=StopRequest(), resources=Resources("cuda:0", 1, interleaver, {}))
        except Exception as error:
            return {"state": type(error).__name__}

    torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        states = packing.train_packed([small[0], large, small[1]], 3, torch.device("cuda:0"), work)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [one["state"] for one in states] == ["done", "OutOfMemoryError", "done"]
