"""Whole runs on a pretended GPU: nothing mixes devices, and an epoch waits for the device in named places only."""

import itertools
from pathlib import Path

import pytest
import torch
from outcome import folder, outcome, rows
from pretended import PretendedGPU, placed, pretended
from torch import nn
from training.pretended_operations import assert_few_operations
from training.test_engines import SMALL

from normlab import runs
from normlab.config.schema import RunConfig
from normlab.data.datasets import Loaded
from normlab.training import packing
from normlab.training.interleaving import Interleaver
from normlab.training.interrupt import StopRequest
from normlab.training.run import Resources, train_run

NORMS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "norm").glob("*.yaml"))
# Where a run may wait for the device: file and function. None of them is entered at each step of an epoch.
WAITS = {
    "data/datasets.py _split": "images are on the device before another stream reads them",
    "models/initialization.py scale": "a start that looks at images",
    "norms/tracing.py _equal": "a start with the function of another network",
    "models/pretrained.py digest": "the digest of the weights at the end",
    "training/graphs.py difference": "the check of a graph, once per kind of step",
    "training/loop.py check_parameters": "at the end of an epoch",
    "training/loop.py evaluate_epoch": "what an evaluation came to",
    "training/supervision.py gather_losses": "at the end of an epoch, before a checkpoint and before probes",
    "training/state.py state_dict": "a checkpoint, for the scale of fp16",
    "training/tasks.py train_loss": "of an epoch",
    "training/average.py update_parameters": "the first update of an average, which copies",
}


def on_gpu(make, *settings: str) -> tuple[RunConfig, PretendedGPU]:
    """A run that is captured on the pretended GPU."""
    config = make(*SMALL, "device=cuda", "engine=auto", "study=gpu", "epochs=1", *settings)
    with pretended() as gpu:
        assert train_run(config)["state"] == "done"
    log = (folder(config) / runs.LOG).read_text()
    assert "WARNING" not in log, log
    return config, gpu


def assert_captured_without_waiting(gpu: PretendedGPU, *others: str) -> None:
    assert gpu.captures
    assert {where for _, where in gpu.waits} <= {*WAITS, *others}


def on_cpu(make, *settings: str) -> RunConfig:
    config = make(*SMALL, "engine=eager", "study=cpu", "epochs=1", *settings)
    train_run(config)
    return config


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_trains_captured_as_on_a_cpu(tiny, norm) -> None:
    """To the last bit: the kernels are the same. A step launches few operations."""
    config, gpu = on_gpu(tiny, f"norm={norm}")
    assert_captured_without_waiting(gpu)
    assert_few_operations(gpu, norm)
    assert outcome(config) == outcome(on_cpu(tiny, f"norm={norm}"))


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_trains_captured_in_half_precision(tiny, norm) -> None:
    config, gpu = on_gpu(tiny, f"norm={norm}", "precision=bf16")
    assert_captured_without_waiting(gpu)
    losses = [
        [row["train_loss"] for row in rows(one)] for one in (config, on_cpu(tiny, f"norm={norm}", "precision=bf16"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer=sgd", "optimizer.nesterov=true", "schedule=step", "schedule.milestones=[0.5]"),
        ("optimizer=gd",),
        ("optimizer.agc=0.05", "norm_batch=4"),
        ("weight_average=0.9", "epochs=2"),
        ("dataset.flip=true", "dataset.crop_padding=1", "label_smoothing=0.1"),
        ("sampler=paired", "sampler.images_per_label=4"),
        ("sampler=class_incremental", "sampler.memory_batch=4", "epochs=4"),
        ("drop_last=true", "batch=24", "epochs=2"),
        ("model.target=small.SmallNet", "model.name=small"),  # with dropout
        ("norm=wn", "norm.init=data"),
        ("norm=wn", "init=lsuv", "input_norm=bn"),
        ("norm=none", "init=bn_folded"),
        ("norm=bnp", "optimizer=gd"),
        ("norm=renorm", "norm_batch=4", "schedule.warmup_epochs=0.5"),
        ("norm=mabn", "norm_batch=4"),
        ("norm=powernorm", "norm_batch=4"),
        ("norm=evonorm_b0", "norm_batch=4"),
        ("norm=online", "norm_batch=4"),
        ("train_only=norm", "init=uniform_gamma"),
        ("train_only=norm", "norm=online", "weight_average=0.9"),
        ("norm=mbn_style", "norm_batch=4", "input_norm=bn"),
        ("norm=cbn", "norm_batch=4", "norm.burn_in=1"),
        ("deterministic=true", "norm=mabn"),
        ("dataset.val_size=20", "dataset.test_size=90", "eval_batch=16", "epochs=5"),
        ("save_weights=true", "keep_checkpoint=true"),
        ("checkpoint_seconds=0",),
    ],
    ids=" ".join,
)
def test_every_kind_of_step_trains_captured_as_on_a_cpu(tiny, settings) -> None:
    """To the last bit."""
    try:
        config, gpu = on_gpu(tiny, *settings)
        assert outcome(config) == outcome(on_cpu(tiny, *settings))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_captured_without_waiting(gpu)


@pytest.mark.parametrize(
    ("settings", "rel"),
    [
        (("optimizer=adam", "optimizer.weight_decay=0.1", "schedule=polynomial"), 1e-5),  # its rate is a float32
        (("optimizer=adam", "optimizer.decoupled=true"), 1e-5),
        (("optimizer=rmsprop", "optimizer.lr=1e-3"), 1e-5),
        (("memory_format=channels_last",), 1e-5),
        (("precision=tf32",), None),
        (("precision=fp16", "optimizer=adam", "model.target=small.SmallNet", "model.name=small"), 2e-2),
        (("precision=fp16", "model.target=small.SmallNet", "model.name=small"), 2e-2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_other_kinds_train_captured_as_nearly(tiny, settings, rel) -> None:
    config, gpu = on_gpu(tiny, *settings)
    assert_captured_without_waiting(gpu)
    if rel:
        losses = [[row["train_loss"] for row in rows(one)] for one in (config, on_cpu(tiny, *settings))]
        assert losses[0] == pytest.approx(losses[1], rel=rel)


@pytest.mark.parametrize(
    "settings",
    [
        ("probe=[gradients,landscape,ics]",),
        ("probe=[activations,affine]",),
        ("probe=[sharpness]",),
        ("eval_stats=precise", "precise_batches=3"),
        ("eval_stats=batch",),
    ],
    ids=" ".join,
)
def test_what_is_measured_between_steps_waits_where_it_may(tiny, settings) -> None:
    _, gpu = on_gpu(tiny, *settings)
    others = {where for _, where in gpu.waits if where.startswith(("probes/", "norms/"))}
    assert_captured_without_waiting(gpu, *others)


@pytest.mark.parametrize(
    "settings",
    [
        ("model=resnet", "depth=18"),
        ("model=cifar_resnet", "depth=20"),
        ("model=binary_resnet", "norm=bnn_free", "optimizer=adam", "model.binarize_at=0.75"),
        ("model=vgg", "depth=11", "dataset.image_size=32", "model.width=0.25"),
        ("model=gitman_cifar", "dataset.image_size=22", "dataset.crop_size=20"),
        ("model=inception_v3", "dataset.image_size=75", "dataset.train_size=10", "dataset.test_size=10", "batch=2"),
    ],
    ids=" ".join,
)
def test_every_network_is_captured(make, settings) -> None:
    small = ("dataset.train_size=40", "dataset.test_size=10", "batch=8", "epochs=1", "threads=1", "optimizer.lr=1e-3")
    config = make(*small, "device=cuda", "engine=auto", *settings)
    with pretended() as gpu:
        assert train_run(config)["state"] == "done"
    assert_captured_without_waiting(gpu)


def test_training_waits_no_oftener_with_more_steps(tiny) -> None:
    """Nothing that is named waits at each step, and nothing is copied to the device at each step."""
    (_, few), (_, many) = (on_gpu(tiny, f"dataset.train_size={size}", f"seed={size}") for size in (96, 192))
    assert few.waits == many.waits
    assert few.copies == many.copies


class Counts(nn.Module):
    """A network with a decision of Python's own, which replays do not make anew: every other pass counts double."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(_weighted(self.bn(self.conv(images)).mean((2, 3))))


PASSES = itertools.count()


@torch.fx.wrap
def _weighted(features: torch.Tensor) -> torch.Tensor:
    return features * (1.0 + next(PASSES) % 2)


def test_a_graph_that_comes_to_something_else_is_not_used(tiny) -> None:
    """The rest of the run is launched from Python, and says so once."""
    network = ("model.target=training.pretended_runs.Counts", "model.name=counts", "epochs=3")
    config = tiny("dataset.train_size=96", *network, "device=cuda", "engine=auto")
    with pretended():
        status = train_run(config)
    log = (folder(config) / runs.LOG).read_text()
    assert status["state"] == "done"
    assert log.count("cannot be captured (a replay comes to another") == 1
    assert "engine=eager" in log


class Ramps(nn.Module):
    """A network whose layer follows the run by a number of Python."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, num_classes)
        self.ramp = Ramp()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.ramp(self.bn(self.conv(images)).mean((2, 3))))


class Ramp(nn.Module):
    now = 0.0

    def at_step(self, step: int, steps: int) -> None:
        self.now = step / steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1.0 + self.now)


def test_a_layer_that_changes_a_number_of_python_is_not_captured(tiny) -> None:
    """The check alone would not see it: all that it compares is of one step."""
    ramp = ("model.target=training.pretended_runs.Ramps", "model.name=ramps", "epochs=3")
    config, eager = (
        tiny("dataset.train_size=96", *ramp, f"device={device}", f"study={device}") for device in ("cuda", "cpu")
    )
    with pretended():
        train_run(config)
    train_run(eager)
    assert "at_step of a layer changes a number of Python" in (folder(config) / runs.LOG).read_text()
    assert outcome(config) == outcome(eager)


def test_a_compiled_network_is_captured_once_it_is_compiled(tiny, monkeypatch) -> None:
    """Compilation itself, which a pretended GPU has none of, is PyTorch's."""
    compiled = []

    def compile_it(network: nn.Module, *, dynamic: bool) -> nn.Module:
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", compile_it)
    config, gpu = on_gpu(tiny, "engine=compile", "epochs=3")
    assert compiled
    assert_captured_without_waiting(gpu, "training/engines.py _compiling")
    assert outcome(config) == outcome(on_cpu(tiny, "epochs=3"))


def test_a_step_that_waits_is_not_captured(tiny) -> None:
    config = tiny(*SMALL, "model.target=training.test_engines.ReadsItsLoss", "model.name=reads", "device=cuda")
    with pretended() as gpu:
        train_run(config)
    log = (folder(config) / runs.LOG).read_text()
    assert "waits for the device" in log
    assert "test_engines.py" in log
    assert not gpu.captures


def test_a_kind_of_step_is_checked_once_in_a_process(tiny) -> None:
    _, first = on_gpu(tiny, "seed=1")
    _, second = on_gpu(tiny, "seed=2", "optimizer.lr=0.01")
    _, other = on_gpu(tiny, "seed=2", "norm=affine")
    checks = [gpu.waits["tolist", "training/graphs.py difference"] for gpu in (first, second, other)]
    assert checks[0] > 0
    assert checks[1] == 0
    assert checks[2] > 0


def test_packed_runs_end_bit_identical_to_solo_ones(tiny) -> None:
    sizes = {"bn": 8, "none": 16, "noisy_bn": 8, "mabn": 16, "online": 8}
    mixed = [(f"norm={norm}", f"batch={batch}") for norm, batch in sizes.items()]
    mixed += [("train_only=norm", "batch=16"), ("model.target=small.SmallNet", "model.name=small")]  # with dropout
    both = [
        [tiny(*SMALL, "device=cuda", "engine=auto", "epochs=1", f"study={study}", *one) for one in mixed]
        for study in ("packed", "solo")
    ]
    loaded: Loaded = {}

    def work(config: RunConfig, interleaver: Interleaver) -> dict:
        with placed():
            return train_run(config, stop=StopRequest(), resources=Resources("cuda:0", 1, interleaver, loaded))

    with pretended() as gpu:
        states = packing.train_packed(both[0], 3, torch.device("cuda:0"), work)
        assert [one["state"] for one in states] == ["done"] * len(mixed)
        checks = gpu.waits["tolist", "training/graphs.py difference"]
        # Of two alike in a pack each is checked.
        twins = [tiny(*SMALL, "device=cuda", "epochs=1", f"seed={seed}", "study=twins") for seed in range(2)]
        packing.train_packed(twins, 2, torch.device("cuda:0"), work)
        assert gpu.waits["tolist", "training/graphs.py difference"] - checks > 1.5 * checks / len(mixed)
        for config in both[1]:
            train_run(config)
    assert [outcome(config) for config in both[0]] == [outcome(config) for config in both[1]]


def test_an_interrupted_run_goes_on_to_the_same_end(tiny, steps) -> None:
    undisturbed = on_gpu(tiny, "epochs=2", "weight_average=0.9")[0]
    config = tiny(*SMALL, "device=cuda", "engine=auto", "study=parts", "epochs=2", "weight_average=0.9")
    with pretended():
        steps.interrupt(config, after=5)
        train_run(config)
    assert outcome(config) == outcome(undisturbed)


def test_a_run_that_was_begun_on_a_cpu_goes_on(make, steps) -> None:
    """Where weights and the state of the optimizer are laid out in memory in another way."""
    few = ("dataset.train_size=80", "dataset.test_size=20", "batch=16", "epochs=1", "optimizer.lr=1e-3")
    undisturbed, begun = (make(*few, "device=cpu", f"study={study}") for study in ("undisturbed", "moved"))
    train_run(undisturbed)
    steps.interrupt(begun, after=3)
    config = make(*few, "device=cuda", "study=moved")
    with pretended():
        train_run(config)
    losses = [rows(one)[-1]["train_loss"] for one in (config, undisturbed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
