"""A run from start to end: pairing, resume, divergence, locks, damaged files."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from normlab import runs
from normlab.common.errors import InterruptedRunError, RunBusyError, UserError
from normlab.config.schema import RunConfig
from normlab.data.batches import Split
from normlab.training import checkpoint, engines, loop, setup, supervision, tasks
from normlab.training import run as training
from normlab.training.record import Recorder
from normlab.training.run import train_run

MEASURED = ("epoch", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr")


def record(config: RunConfig) -> runs.Run:
    return runs.Run(config.as_dict())


def rows(config: RunConfig) -> list[dict]:
    """The measurements of a run, without those that depend on the machine's speed."""
    read, warnings = runs.read_metrics(record(config).folder)
    assert not warnings
    return [{key: row[key] for key in MEASURED} for row in read]


class Steps:
    """Counts the training steps of this process, and can ask it to stop after one of them."""

    def __init__(self) -> None:
        self.taken, self.stop_after = 0, 0

    def __call__(self, *arguments, **options) -> None:
        self.taken += 1
        if self.taken == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        set_learning_rate(*arguments, **options)


set_learning_rate = engines.set_learning_rate


@pytest.fixture
def steps_taken(monkeypatch) -> Steps:
    steps = Steps()
    monkeypatch.setattr(engines, "set_learning_rate", steps)
    return steps


@pytest.fixture
def stop_after(steps_taken):
    """Interrupt the run as a signal would, after so many training steps from now."""

    def arrange(steps: int) -> None:
        steps_taken.stop_after = steps_taken.taken + steps

    return arrange


def test_a_run_leaves_the_promised_record(tiny) -> None:
    config = tiny()
    status = train_run(config)
    folder = record(config).folder
    assert json.loads((folder / "status.json").read_text()) == status
    assert status["state"] == "done"
    assert status["error"] is None
    assert status["run_id"] in folder.name
    assert status["started"] <= status["heartbeat"] <= status["ended"]
    assert status["peak_memory_bytes"] > 50e6  # torch alone takes more
    assert status["parameters"] == 8 * 27 + 16 * 72 + 2 * (8 + 16) + 170
    read, _ = runs.read_metrics(folder)
    assert [row["epoch"] for row in read] == [1, 2]
    assert [row["step"] for row in read] == [3, 6]
    for row in read:
        assert set(row) == {*MEASURED, "wall_seconds", "images_per_second"}
        assert 0 <= row["train_accuracy"] <= 1
        assert row["wall_seconds"] > 0
        assert row["images_per_second"] > 0
    assert runs.read_config(folder) == config.as_dict()
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["versions"]["torch"] == torch.__version__
    assert not list(folder.glob("*.pt"))


def test_a_finished_run_is_left_alone(tiny) -> None:
    config = tiny("epochs=1")
    first = train_run(config)
    assert train_run(config) == first


def test_training_loss_and_accuracy_are_those_of_the_images_seen(tiny, monkeypatch) -> None:
    """Against a plain sum over every batch's own loss, the last and smaller batch weighted by its images."""
    seen: list[tuple[float, int, int]] = []
    original = tasks.F.cross_entropy

    def recording(logits, labels, **options):
        if torch.is_grad_enabled():
            loss = original(logits.double(), labels, **options).item()
            seen.append((loss, len(labels), int((logits.argmax(1) == labels).sum())))
        return original(logits, labels, **options)

    monkeypatch.setattr(tasks.F, "cross_entropy", recording)
    config = tiny("epochs=1")
    train_run(config)
    assert [images for _, images, _ in seen] == [16, 16, 8]
    assert rows(config)[0]["train_loss"] == pytest.approx(sum(loss * n for loss, n, _ in seen) / 40, rel=1e-6)
    assert rows(config)[0]["train_accuracy"] == pytest.approx(sum(hits for *_, hits in seen) / 40)


def test_accuracy_is_that_of_the_final_weights(tiny) -> None:
    from normlab import models
    from normlab.data.datasets import load

    config = tiny("save_weights=true")
    status = train_run(config)
    network = models.build(config, num_classes=10, image_size=8).eval()
    network.load_state_dict(torch.load(record(config).folder / "weights.pt", weights_only=True))
    assert training.weights_sha256(network) == status["weights_sha256"]
    data = load(config.model_copy(update={"eval_batch": 7}), torch.device("cpu"), log=print)
    with torch.no_grad():
        hits = sum((network(images).argmax(1) == labels).sum().item() for images, labels in data.test.batches())
    assert hits / len(data.test) == rows(config)[-1]["test_accuracy"]


@pytest.mark.parametrize("arm", ["bn", "affine", "bnminus", "none"])
@pytest.mark.parametrize("steps", range(1, 7))  # three per epoch: at each boundary and within
def test_an_interrupted_run_goes_on_and_ends_bit_identical(tiny, stop_after, steps_taken, arm, steps) -> None:
    whole, parts = tiny(f"norm={arm}", "study=whole"), tiny(f"norm={arm}", "study=parts")
    expected = train_run(whole)
    stop_after(steps)
    with pytest.raises(InterruptedRunError):
        train_run(parts)
    assert record(parts).state == "interrupted"
    assert (record(parts).folder / checkpoint.NEWEST).exists()
    status = train_run(parts)
    assert steps_taken.taken == 6 + 6, "a step was repeated or left out"
    assert status["state"] == "done"
    assert status["weights_sha256"] == expected["weights_sha256"]
    assert rows(parts) == rows(whole)


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer=adam", "schedule=polynomial", "schedule.per=step", "schedule.warmup_epochs=0.5"),
        ("optimizer=rmsprop", "schedule=step", "label_smoothing=0.1", "dataset.val_size=20"),
        ("precision=fp16", "norm=bnminus", "drop_last=true"),
        ("precision=bf16", "norm_batch=4", "dataset.flip=true", "dataset.crop_padding=1"),
        ("sampler=paired", "norm_batch=8", "eval_stats=batch", "weight_average=0.9", "dataset.crop_size=6"),
        ("input_norm=bn", "norm=bn_scaled", "eval_stats=precise", "precise_batches=2", "init=lsuv"),
        ("norm=bnp", "init=bn_folded", "optimizer.agc=0.02", "optimizer.lr=1e-3"),
    ],
)
def test_resume_is_bit_identical_whatever_the_settings(tiny, stop_after, settings) -> None:
    expected = train_run(tiny("study=whole", *settings))
    stop_after(3)
    with pytest.raises(InterruptedRunError):
        train_run(tiny("study=parts", *settings))
    assert train_run(tiny("study=parts", *settings))["weights_sha256"] == expected["weights_sha256"]
    assert rows(tiny("study=parts", *settings)) == rows(tiny("study=whole", *settings))


def test_an_interrupted_evaluation_is_repeated_and_no_step_is(tiny, monkeypatch, steps_taken) -> None:
    expected = train_run(tiny("study=whole"))
    original = loop.evaluate

    def interrupted(*arguments):
        raise InterruptedRunError("SIGTERM")

    monkeypatch.setattr(loop, "evaluate", interrupted)
    with pytest.raises(InterruptedRunError):
        train_run(tiny("study=parts"))
    monkeypatch.setattr(loop, "evaluate", original)
    assert train_run(tiny("study=parts"))["weights_sha256"] == expected["weights_sha256"]
    assert steps_taken.taken == 6 + 6
    assert rows(tiny("study=parts")) == rows(tiny("study=whole"))


def test_measuring_statistics_anew_is_interrupted_between_batches_and_has_heartbeats(tiny, monkeypatch) -> None:
    """eval_stats=precise: three batches a time; the signal comes in the second one of the first evaluation."""
    settings = ("eval_stats=precise", "epochs=1")
    expected = train_run(tiny("study=whole", *settings))
    original, shown, beats = Split.plain_batches, [], []

    def signalled(self, count):
        for images in original(self, count):
            shown.append(len(beats))
            if len(shown) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield images

    monkeypatch.setattr(Split, "plain_batches", signalled)
    monkeypatch.setattr(supervision, "HEARTBEAT_SECONDS", 0.0)
    with pytest.raises(InterruptedRunError):
        train_run(tiny("study=parts", *settings), on_status=beats.append)
    assert len(shown) == 2
    assert shown[1] > shown[0], "no heartbeat after the first"
    assert train_run(tiny("study=parts", *settings))["weights_sha256"] == expected["weights_sha256"]


KILLED = """
    import json, os, signal, sys
    from normlab.config.schema import RunConfig
    from normlab.training import checkpoint, run

    saved, save = 0, checkpoint.save
    def dying(*arguments):
        global saved
        save(*arguments)
        saved += 1
        if saved == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.save = dying
    run.train_run(RunConfig.model_validate(json.loads(sys.argv[1])))
"""


def test_a_killed_run_goes_on_from_its_last_checkpoint(tiny, steps_taken) -> None:
    whole, killed = tiny("study=whole"), tiny("study=killed", "checkpoint_seconds=0")
    expected = train_run(whole)
    died = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), json.dumps(killed.as_dict())],
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert died.returncode == -signal.SIGKILL
    assert record(killed).state == "running"
    steps_taken.taken = 0
    assert train_run(killed)["weights_sha256"] == expected["weights_sha256"]
    assert steps_taken.taken == 6 - 4
    assert rows(killed) == rows(whole)


@pytest.fixture
def interrupted(tiny, stop_after) -> RunConfig:
    """A run that was interrupted after its fourth step and has two checkpoints."""
    config = tiny("checkpoint_seconds=0")
    stop_after(4)
    with pytest.raises(InterruptedRunError):
        train_run(config)
    return config


def test_a_resumed_run_keeps_its_number_of_threads(make, stop_after) -> None:
    settings = ("model=custom", "model.target=small.SmallNet", "dataset.train_size=40", "batch=16", "epochs=1")
    config = make(*settings, "dataset.test_size=20", "device=cpu")
    stop_after(2)
    with pytest.raises(InterruptedRunError):
        train_run(config, resources=training.Resources(threads=1))
    train_run(config, resources=training.Resources(threads=2))
    assert json.loads((record(config).folder / "provenance.json").read_text())["threads"] == 1


def test_a_network_that_changed_since_is_a_sentence(tiny, interrupted, monkeypatch) -> None:
    from torch import nn

    monkeypatch.setattr(setup.models, "build", lambda *_, **__: nn.Sequential(nn.Flatten(), nn.Linear(192, 10)))
    with pytest.raises(UserError, match="The network has changed since"):
        train_run(interrupted)


def test_a_checkpoint_of_other_parameter_groups_is_a_sentence(tiny, interrupted, monkeypatch) -> None:
    """As an older version of ours may have left it."""
    original = setup.build_optimizer

    def in_one_group(config, network, **_):
        optimizer = original(config, network)
        return torch.optim.SGD([p for group in optimizer.param_groups for p in group["params"]], lr=0.1)

    monkeypatch.setattr(setup, "build_optimizer", in_one_group)
    with pytest.raises(UserError, match="The network has changed since") as error:
        train_run(interrupted)
    assert "start it anew" in str(error.value)


def test_resume_refuses_other_images(tiny, interrupted, monkeypatch) -> None:
    original = setup.load
    monkeypatch.setattr(setup, "load", lambda *a, **o: dataclasses.replace(original(*a, **o), fingerprint="another"))
    with pytest.raises(UserError, match="have changed since"):
        train_run(interrupted)
    assert record(interrupted).state == "failed"


def test_a_resnet_interrupted_within_an_epoch_ends_bit_identical(make, stop_after) -> None:
    settings = ("dataset.train_size=40", "dataset.test_size=20", "batch=16", "epochs=2", "threads=1")
    expected = train_run(make(*settings, "study=whole"))
    stop_after(4)
    with pytest.raises(InterruptedRunError):
        train_run(make(*settings, "study=parts"))
    assert train_run(make(*settings, "study=parts"))["weights_sha256"] == expected["weights_sha256"]


def test_divergence_is_a_result_with_its_step(tiny) -> None:
    config = tiny("norm=none", "optimizer.lr=1e10", "epochs=3")
    status = train_run(config)
    assert status["state"] == "diverged"
    assert 2 <= status["diverged_step"] <= 9
    assert f"step {status['diverged_step']} " in status["error"]
    assert record(config).state in runs.FINISHED
    assert train_run(config) == status


def test_what_the_last_step_of_an_epoch_breaks_is_divergence_too(tiny, monkeypatch) -> None:
    original = engines.learning_rate
    monkeypatch.setattr(
        engines, "learning_rate", lambda c, step, n: float("inf") if step == 5 else original(c, step, n)
    )
    status = train_run(tiny())
    assert (status["state"], status["diverged_step"]) == ("diverged", 6)
    assert [row["epoch"] for row in rows(tiny())] == [1]


def test_a_divergence_is_noticed_at_a_heartbeat_and_its_step_does_not_depend_on_it(
    tiny, monkeypatch, steps_taken
) -> None:
    settings = ("norm=none", "optimizer.lr=1e10", "batch=2", "checkpoint_seconds=null")  # epochs of 20 steps
    monkeypatch.setattr(supervision, "HEARTBEAT_SECONDS", math.inf)
    late = train_run(tiny(*settings, "study=late"))
    assert late["diverged_step"] < steps_taken.taken == 20
    steps_taken.taken = 0
    monkeypatch.setattr(supervision, "HEARTBEAT_SECONDS", 0.0)
    soon = train_run(tiny(*settings, "study=soon"))
    assert soon["diverged_step"] == late["diverged_step"] == steps_taken.taken


def test_no_checkpoint_follows_a_divergence(tiny, monkeypatch) -> None:
    monkeypatch.setattr(supervision, "HEARTBEAT_SECONDS", math.inf)
    saved = []
    monkeypatch.setattr(Recorder, "checkpoint", lambda recorder, state: saved.append(state.position.batch))
    status = train_run(tiny("norm=none", "optimizer.lr=1e10", "batch=2", "checkpoint_seconds=0"))
    assert status["state"] == "diverged"
    assert saved == [*range(1, status["diverged_step"])]


def test_of_two_processes_on_one_run_the_second_ends_in_a_sentence(tiny) -> None:
    config = tiny()
    run = record(config)
    run.freeze()
    with run.lock():
        run.write_status("running", started=runs.now())
        with pytest.raises(RunBusyError, match=f"already being trained by process {os.getpid()}"):
            train_run(config)
    assert record(config).state == "running"


def test_an_output_that_does_not_fit_the_classes_is_a_sentence(tiny, monkeypatch) -> None:
    from torch import nn

    monkeypatch.setattr(setup.models, "build", lambda *_, **__: nn.Sequential(nn.Flatten(), nn.Linear(192, 9)))
    with pytest.raises(UserError, match=r"gives \(16, 9\) for a batch of 16 images"):
        train_run(tiny())


def test_too_little_memory_is_a_sentence(tiny, monkeypatch) -> None:
    def hungry(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "train", hungry)
    with pytest.raises(UserError, match="does not fit into the memory"):
        train_run(tiny())
    assert record(tiny()).state == "failed"


def test_a_failure_is_recorded_with_its_reason(tiny, monkeypatch) -> None:
    def failing(*_, **__):
        raise RuntimeError("the reason")

    monkeypatch.setattr(setup.models, "build", failing)
    config = tiny()
    with pytest.raises(RuntimeError):
        train_run(config)
    status = runs.read_status(record(config).folder)
    assert status is not None
    assert status["state"] == "failed"
    assert status["error"] == "RuntimeError: the reason"
    assert "Traceback" in (record(config).folder / "run.log").read_text()


@pytest.mark.parametrize("batch", [13, 1])
def test_statistics_over_a_single_value_are_refused_before_training(make, batch) -> None:
    """ResNet's last feature maps of a digit are 1x1 pixels, so a batch of one image has one value per channel."""
    config = make("dataset.train_size=40", f"batch={batch}", "epochs=1")
    with pytest.raises(UserError, match="does not fit"):
        train_run(config)
    assert not runs.read_metrics(record(config).folder)[0]


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (("batch=13",), "Use larger images, another norm (one over a single value is undefined) or another batch or"),
        (("batch=10", "eval_stats=batch", "eval_batch=19"), "undefined) or another eval_batch."),
        (("batch=10", "norm=in"), "another norm"),
        (("model=deep_linear", "dataset.train_size=40", "batch=10", "norm=in"), "Use another norm"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_with_advice(make, settings, advice) -> None:
    small = ("dataset.train_size=40", "dataset.test_size=20", "epochs=1")
    with pytest.raises(UserError, match="does not fit") as error:
        train_run(make(*small, *settings))
    assert advice in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [("norm=none", "init=bn_folded", "calibration_images=1"), ("init=lsuv", "norm_batch=8", "calibration_images=9")],
)
def test_calibration_images_that_have_no_statistics_are_a_sentence(make, settings) -> None:
    """In groups of 8 the ninth image is alone, with maps of one pixel at the end of the network."""
    config = make("dataset.train_size=40", "dataset.test_size=20", "batch=8", "epochs=1", *settings)
    with pytest.raises(UserError, match="calibration images does not fit resnet") as error:
        train_run(config)
    assert len(str(error.value).splitlines()) <= 5


def test_a_batch_of_one_trains_without_statistics(tiny) -> None:
    assert train_run(tiny("batch=1", "norm=affine", "epochs=1", "dataset.train_size=10"))["state"] == "done"


def test_input_and_order_of_images_are_equal_in_all_arms(tiny, monkeypatch) -> None:
    """All that the networks of two arms are given, image by image."""
    from torch import nn

    shown: dict[str, list] = {}
    original = setup.models.build

    for arm in ("bn", "none"):
        shown[arm] = []

        def watched(*arguments, arm=arm, **options) -> nn.Module:
            network = original(*arguments, **options)
            network.register_forward_pre_hook(
                lambda module, inputs: shown[arm].append(inputs[0].clone()) if not inputs[0].is_meta else None
            )
            return network

        monkeypatch.setattr(setup.models, "build", watched)
        train_run(tiny(f"norm={arm}", "dataset.flip=true", "dataset.crop_padding=1"))
    assert len(shown["bn"]) == len(shown["none"]) > 6
    assert all(torch.equal(a, b) for a, b in zip(shown["bn"], shown["none"], strict=True))
