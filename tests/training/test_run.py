"""A run from start to end: its record, pairing, resume, divergence, refusals."""

import dataclasses
import json
import math
import os
import shutil
import signal
from unittest.mock import Mock

import pytest
import timm
import torch
from outcome import SPEED, correct, folder, outcome, rows, status, weights
from small import SmallNet
from torch import nn

from normlab import models, runs
from normlab.common import progress, source
from normlab.common.errors import FolderGoneError, InterruptedRunError, RunBusyError, UserError
from normlab.config.schema import RunConfig
from normlab.data.batches import Split
from normlab.data.datasets import load
from normlab.training import checkpoint, device, engines, loop, setup, supervision, tasks
from normlab.training import run as training
from normlab.training.record import Recorder
from normlab.training.run import train_run

MEASURED = {"epoch", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr"}


def test_a_run_leaves_the_promised_record(tiny) -> None:
    config = tiny()
    ended = train_run(config)
    record = folder(config)
    assert json.loads((record / "status.json").read_text()) == ended
    assert (ended["state"], ended["error"]) == ("done", None)
    assert ended["run_id"] in record.name
    assert ended["started"] <= ended["heartbeat"] <= ended["ended"]
    assert ended["peak_memory_bytes"] > 50e6  # torch alone takes more
    assert ended["parameters"] == 8 * 27 + 16 * 72 + 2 * (8 + 16) + 170
    read, _ = runs.read_metrics(record)
    assert [(row["epoch"], row["step"]) for row in read] == [(1, 3), (2, 6)]
    for row in read:
        assert set(row) == {*MEASURED, *SPEED}
        assert 0 <= row["train_accuracy"] <= 1
        assert min(row[name] for name in SPEED) > 0
    assert runs.read_config(record) == config.as_dict()
    provenance = json.loads((record / "provenance.json").read_text())
    assert provenance["versions"]["torch"] == torch.__version__
    assert not list(record.glob("*.pt"))
    assert train_run(config) == ended, "a finished run is left alone"


def test_a_run_whose_output_nobody_reads_any_more_is_interrupted_and_goes_on(tiny) -> None:
    config = tiny("study=piped")
    with pytest.raises(BrokenPipeError):
        train_run(config, on_status=Mock(side_effect=BrokenPipeError))
    assert status(config)["state"] == "interrupted"
    assert train_run(config)["state"] == "done"


def of_a_library(num_classes: int) -> nn.Module:
    return nn.Sequential(timm.layers.ConvNormAct(3, 4, 3), nn.Flatten(), nn.Linear(256, num_classes))


def test_the_version_of_a_library_that_a_network_comes_from_is_recorded(tiny) -> None:
    config = tiny(f"model.target={__name__}.of_a_library", "epochs=1")
    train_run(config)
    versions = json.loads((folder(config) / "provenance.json").read_text())["versions"]
    assert versions["timm"] == timm.__version__
    assert set(versions) == {"python", "normlab", "torch", "torchvision", "hydra-core", "numpy", "timm"}


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


def test_a_status_has_the_images_per_second_and_is_read_as_it_was_written(tiny) -> None:
    config, told = tiny(), []
    ended = train_run(config, on_status=lambda status: told.append((status, runs.read_status(folder(config)))))
    assert all(written == read for written, read in told)
    assert ended["images_per_second"] == runs.read_metrics(folder(config))[0][-1]["images_per_second"] > 0


@pytest.mark.parametrize("settings", [(), ("norm=ln", "eval_stats=batch", "sampler=paired"), ("weight_average=0.5",)])
def test_accuracy_and_images_that_are_right_are_those_of_the_final_weights(tiny, settings) -> None:
    config = tiny("save_weights=true", *settings)
    ended = train_run(config)
    network = models.build(config, num_classes=10, image_size=8).eval()
    network.load_state_dict(torch.load(folder(config) / "weights.pt", weights_only=True))
    assert config.weight_average or training.weights_sha256(network) == ended["weights_sha256"]
    plain = tiny("eval_batch=7")  # the order of the data set
    test = load(plain, torch.device("cpu"), log=print).test
    with torch.no_grad():
        hits = [h for images, labels in test.batches() for h in (network(images).argmax(1) == labels).tolist()]
    found = correct(config)
    assert found is not None
    assert [hit for label in range(10) for hit, of in zip(hits, test.labels, strict=True) if of == label] == [
        *found.bits()
    ]
    assert sum(hits) / len(test) == rows(config)[-1]["test_accuracy"]
    assert found.counts == tuple((test.labels == label).sum() for label in range(10))


# Resume


def test_a_run_interrupted_after_any_step_ends_bit_identical(tiny, steps) -> None:
    """Three steps an epoch: at each boundary and within."""
    train_run(tiny("study=whole"))
    for after in range(1, 7):
        config = tiny(f"study={after}")
        steps.taken = 0
        steps.interrupt(config, after)
        assert status(config)["state"] == "interrupted"
        assert (folder(config) / checkpoint.NEWEST).exists()
        train_run(config)
        assert steps.taken == 6, "a step was repeated or left out"
        assert outcome(config) == outcome(tiny("study=whole"))


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
        (
            "norm=bnn_free",
            "model=binary_resnet",
            "optimizer=adam",
            "schedule=step",
            "schedule.cycles=2",
            "precision=bf16",
        ),
    ],
    ids=" ".join,
)
def test_resume_is_bit_identical_whatever_the_settings(tiny, steps, settings) -> None:
    whole, parts = tiny("study=whole", *settings), tiny("study=parts", *settings)
    train_run(whole)
    steps.interrupt(parts, after=3)
    train_run(parts)
    assert outcome(parts) == outcome(whole)


def test_an_interrupted_evaluation_is_repeated_and_no_step_is(tiny, monkeypatch, steps) -> None:
    train_run(tiny("study=whole"))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", Mock(side_effect=InterruptedRunError("SIGTERM")))
        with pytest.raises(InterruptedRunError):
            train_run(tiny("study=parts"))
    assert progress.outcome(status(tiny("study=parts"))) == "interrupted: by SIGTERM"
    train_run(tiny("study=parts"))
    assert steps.taken == 6 + 6
    assert outcome(tiny("study=parts")) == outcome(tiny("study=whole"))


def test_measuring_statistics_anew_is_interrupted_between_batches_and_has_heartbeats(tiny, monkeypatch) -> None:
    """eval_stats=precise: three batches a time; the signal comes in the second one of the first evaluation."""
    settings = ("eval_stats=precise", "epochs=1")
    train_run(tiny("study=whole", *settings))
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
    train_run(tiny("study=parts", *settings))
    assert weights(tiny("study=parts", *settings)) == weights(tiny("study=whole", *settings))


@pytest.fixture
def interrupted(tiny, steps) -> RunConfig:
    """A run that was interrupted after its fourth step and has two checkpoints."""
    config = tiny("checkpoint_seconds=0")
    steps.interrupt(config, after=4)
    return config


def test_a_resumed_run_keeps_its_number_of_threads(tiny, steps) -> None:
    config = tiny("threads=null")
    steps.stop_after(2)
    with pytest.raises(InterruptedRunError):
        train_run(config, resources=training.Resources(threads=1))
    train_run(config, resources=training.Resources(threads=2))
    assert json.loads((folder(config) / "provenance.json").read_text())["threads"] == 1


def test_a_run_that_goes_on_under_other_circumstances_keeps_both(interrupted, steps, monkeypatch, capsys) -> None:
    record = folder(interrupted) / "provenance.json"
    before = json.loads(record.read_text())
    steps.interrupt(interrupted, after=1)  # under the same: the next segment takes its place
    assert "earlier" not in json.loads(record.read_text())
    capsys.readouterr()

    monkeypatch.setattr(device.checkout, "state", lambda: {"commit": "f00" * 10, "diff": ""})
    made = json.loads(record.read_text()) | {"threads": 7, "versions": before["versions"] | {"numpy": "1.0"}}
    run = runs.Run(interrupted.as_dict())
    run.write_provenance(made)
    run.write_status("interrupted")
    train_run(interrupted)
    now = json.loads(record.read_text())
    (earlier,) = now["earlier"]
    assert earlier == made | {"until_step": 5}
    assert now["git"]["commit"] == "f00" * 10
    error = capsys.readouterr().err
    for word in ("goes on under other circumstances", "f00f00f", "NumPy 1.0, then", "threads 7, then 1"):
        assert word in error


def linear(outputs: int):
    """In place of `models.build`."""
    return lambda *_, **__: nn.Sequential(nn.Flatten(), nn.Linear(192, outputs))


def test_a_network_that_changed_since_is_a_sentence(interrupted, monkeypatch) -> None:
    monkeypatch.setattr(setup.models, "build", linear(10))
    with pytest.raises(UserError, match="The network has changed since"):
        train_run(interrupted)


def test_resume_refuses_other_images(interrupted, monkeypatch) -> None:
    original = setup.load
    monkeypatch.setattr(setup, "load", lambda *a, **o: dataclasses.replace(original(*a, **o), fingerprint="another"))
    with pytest.raises(UserError, match="have changed since"):
        train_run(interrupted)
    assert status(interrupted)["state"] == "failed"


def test_of_two_processes_on_one_run_the_second_ends_in_a_sentence(tiny) -> None:
    config = tiny()
    run = runs.Run(config.as_dict())
    run.freeze()
    with run.lock():
        run.write_status("running", started=runs.now())
        with pytest.raises(RunBusyError, match=f"already being trained by process {os.getpid()}"):
            train_run(config)
    assert run.state == "running"


# Divergence

DIVERGING = ("norm=none", "optimizer.lr=1e10", "batch=2", "checkpoint_seconds=null")  # epochs of 20 steps


def test_what_the_last_step_of_an_epoch_breaks_is_divergence_too(tiny, monkeypatch) -> None:
    original = engines.learning_rate
    monkeypatch.setattr(
        engines, "learning_rate", lambda c, step, *more: float("inf") if step == 5 else original(c, step, *more)
    )
    ended = train_run(tiny())
    assert (ended["state"], ended["diverged_step"]) == ("diverged", 6)
    assert [row["epoch"] for row in rows(tiny())] == [1]


def test_a_divergence_is_a_result_whose_step_does_not_depend_on_when_it_is_noticed(tiny, monkeypatch, steps) -> None:
    monkeypatch.setattr(supervision, "HEARTBEAT_SECONDS", math.inf)
    late = train_run(tiny(*DIVERGING, "study=late"))
    assert late["state"] == "diverged"
    assert f"step {late['diverged_step']} " in late["error"]
    assert 2 <= late["diverged_step"] < steps.taken == 20
    steps.taken = 0
    monkeypatch.setattr(supervision, "HEARTBEAT_SECONDS", 0.0)
    soon = train_run(tiny(*DIVERGING, "study=soon"))
    assert soon["diverged_step"] == late["diverged_step"] == steps.taken
    assert train_run(tiny(*DIVERGING, "study=soon")) == soon, "it is finished"


def test_no_checkpoint_follows_a_divergence(tiny, monkeypatch) -> None:
    monkeypatch.setattr(supervision, "HEARTBEAT_SECONDS", math.inf)
    saved = []
    monkeypatch.setattr(Recorder, "checkpoint", lambda recorder, state: saved.append(state.position.batch))
    ended = train_run(tiny(*DIVERGING, "checkpoint_seconds=0"))
    assert ended["state"] == "diverged"
    assert saved == [*range(1, ended["diverged_step"])]


def test_code_from_outside_of_the_snapshot_is_told_once_even_if_it_is_imported_late(tiny, monkeypatch) -> None:
    live = [["early (a.py)"], ["early (a.py)", "late (b.py)"]]
    monkeypatch.setattr(source, "outside_of_snapshot", lambda: live.pop(0))
    config = tiny()
    train_run(config)
    log = (folder(config) / "run.log").read_text()
    told = "Not in the snapshot of code, so imported as they are now: "
    assert [line.partition(told)[2] for line in log.splitlines() if told in line] == ["early (a.py).", "late (b.py)."]


# What cannot be trained


def test_an_output_that_does_not_fit_the_classes_is_a_sentence(tiny, monkeypatch) -> None:
    monkeypatch.setattr(setup.models, "build", linear(9))
    with pytest.raises(UserError, match=r"gives \(16, 9\) for a batch of 16 images"):
        train_run(tiny())


@pytest.mark.parametrize(
    ("planted", "raised", "recorded"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), UserError, "does not fit into the memory"),
        (RuntimeError("the reason"), RuntimeError, "RuntimeError: the reason"),
    ],
    ids=["no memory", "a bug"],
)
def test_a_failure_is_recorded_with_its_reason(tiny, monkeypatch, planted, raised, recorded) -> None:
    def failing(*_, **__):
        raise planted

    monkeypatch.setattr(training, "train", failing)
    with pytest.raises(raised, match=recorded.rpartition(": ")[2]):
        train_run(tiny())
    assert status(tiny())["state"] == "failed"
    assert recorded in status(tiny())["error"]
    assert "Traceback" in (folder(tiny()) / "run.log").read_text()


CALIBRATION = "calibration images does not fit resnet"


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (("batch=13",), "Use larger images or another norm (one over a single value is undefined) or another batch or"),
        (("batch=1",), "does not fit"),
        (("batch=10", "eval_stats=batch", "eval_batch=19"), "undefined) or another eval_batch."),
        (("batch=10", "norm=in"), "another norm"),
        (("model=deep_linear", "batch=10", "norm=in"), "Use another norm"),
        (("batch=8", "norm=none", "init=bn_folded", "calibration_images=1"), CALIBRATION),
        (("batch=8", "init=lsuv", "norm_batch=8", "calibration_images=9"), CALIBRATION),  # the ninth one is alone
    ],
)
def test_statistics_over_a_single_value_are_refused_before_training(make, settings, advice) -> None:
    """ResNet's last feature maps of a digit are 1x1 pixels, so a batch of one image has one value per channel."""
    config = make("dataset.train_size=40", "dataset.test_size=20", "epochs=1", *settings)
    with pytest.raises(UserError, match="does not fit") as error:
        train_run(config)
    assert advice in str(error.value)
    assert len(str(error.value).splitlines()) <= 5
    assert not runs.read_metrics(folder(config))[0]


def one_channel(num_classes: int) -> nn.Module:
    network = SmallNet(num_classes)
    network.body[0] = nn.Conv2d(1, 8, 3)
    return network


def test_a_network_for_gray_images_is_told_what_images_have(make) -> None:
    target = f"model.target={__name__}.one_channel"
    with pytest.raises(UserError, match="custom takes images of 1 channel, and those of dataset=digits have 3"):
        train_run(make("model=custom", target, "dataset.train_size=40", "batch=20"))


def test_a_batch_of_one_trains_without_statistics(tiny) -> None:
    assert train_run(tiny("batch=1", "norm=affine", "epochs=1", "dataset.train_size=10"))["state"] == "done"


def test_input_and_order_of_images_are_equal_in_all_arms(tiny, monkeypatch) -> None:
    """All that the networks of two arms are given, image by image."""
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


# A folder that is deleted while its run is trained


@pytest.mark.parametrize("which", ["run", "study", "output_dir"])
def test_a_folder_that_was_deleted_while_training_is_told_as_such(tiny, steps, tmp_path, which) -> None:
    config = tiny("checkpoint_seconds=0", "probe=[gradients]")
    gone = {"run": folder(config), "study": folder(config).parent, "output_dir": tmp_path / "outputs"}[which]
    steps.after(2, lambda: shutil.rmtree(gone))
    with pytest.raises(FolderGoneError, match=r"was deleted or moved while .* was trained"):
        train_run(config)
    assert not gone.exists(), "nothing comes back"
    train_run(config)
    assert status(config)["state"] == "done"
