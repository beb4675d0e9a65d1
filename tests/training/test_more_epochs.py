"""More epochs for a finished run: it goes on exactly where a run of more epochs would have been, or says why not."""

import dataclasses
import json

import pytest
import torch
from outcome import folder, outcome, rows
from small import SmallNet
from steps import rewritten

from normlab import runs
from normlab.config.schema import RunConfig
from normlab.launchers.weights import add_weights, lacks_weights
from normlab.runs.shorter import KEPT, find_shorter
from normlab.training import setup
from normlab.training.run import train_run

CONSTANT = ("schedule=constant", "probe=[gradients,activations,affine]", "checkpoint_seconds=null")
RAMP = ("norm.ramp_start=1", "norm.dmax_end=4", "norm.rmax_end=8")
STEPS = tuple(f"probe.{name}.steps=[0,3,6,9,12]" for name in ("gradients", "activations", "affine"))
END = ("optimizer", "scaler", "averaged")


def end(config):
    """All that the last checkpoint holds but what depends on the time."""
    saved = torch.load(folder(config) / KEPT, weights_only=True)
    return [saved[key] for key in END]


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def of(epochs: int, *settings: str) -> tuple[str, ...]:
    return (*CONSTANT, *STEPS, f"epochs={epochs}", *settings)


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer=adam", "schedule.warmup_epochs=1.5", "schedule.per=step", "weight_average=0.9"),
        pytest.param(
            ("eval_every=2", "eval_stats=precise", "precise_batches=2", "precision=fp16", "init=lsuv"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("sampler=paired", "optimizer=rmsprop", "norm=renorm", "norm.ramp_unit=steps", *RAMP),
            marks=pytest.mark.slow,
        ),
    ],
    ids=" ".join,
)
def test_more_epochs_end_as_if_they_had_been_asked_for_at_once(tiny, steps, settings) -> None:
    whole = tiny("study=whole", *of(5, *settings))
    train_run(whole)
    shorter, longer = (tiny(*of(epochs, *settings)) for epochs in (3, 5))
    train_run(shorter)
    before = {path.name: path.read_bytes() for path in folder(shorter).iterdir() if path.is_file()}
    steps.taken = 0
    ended = train_run(longer)
    assert steps.taken == 3 * 2
    assert outcome(longer) == outcome(whole)
    assert same(end(longer), end(whole))
    assert ended["test_accuracy"] == rows(whole)[-1]["test_accuracy"]
    made = json.loads((folder(longer) / "provenance.json").read_text())
    assert [(part["run"], part["until_step"]) for part in made["earlier"]] == [(folder(shorter).name, 9)]
    assert before == {path.name: path.read_bytes() for path in folder(shorter).iterdir() if path.is_file()}


def test_the_longest_finished_run_is_extended_and_one_under_way_is_not(tiny, steps, tmp_path) -> None:
    for epochs in (1, 2):
        train_run(tiny(*of(epochs)))
    run = runs.Run(tiny(*of(4)).as_dict())
    assert str(find_shorter(run)) == f"goes on from epoch 2 of {folder(tiny(*of(2))).name}"
    under_way = runs.Run(tiny(*of(3)).as_dict())
    under_way.freeze()
    with under_way.lock():
        under_way.write_status("running", started=runs.now())
        assert find_shorter(run).epochs == 2
    train_run(tiny(*of(3)))
    assert steps.taken == 3 + 3 + 3, "each goes on from the one before"
    assert find_shorter(run).epochs == 3
    assert find_shorter(runs.Run(tiny(*of(4, "optimizer.lr=0.05")).as_dict())) is None
    assert find_shorter(runs.Run(tiny(*of(4), "study=other").as_dict())) is None
    assert find_shorter(runs.Run(tiny(*of(1)).as_dict())) is None, "fewer epochs"
    longest = folder(tiny(*of(3)))
    longest.symlink_to(longest.rename(tmp_path / "elsewhere"))
    assert find_shorter(run).epochs == 2, "links are not followed"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("schedule=cosine",), "schedule=cosine spreads over all epochs, so its epochs differ from those of {}"),
        (("schedule=constant", "norm=renorm"), "norm=renorm changes with the share of all epochs that is done"),
        (
            ("schedule=constant", "model=binary_resnet"),
            "model=binary_resnet has binary weights after a share of all epochs",
        ),
        (("schedule=constant", "probe=[gradients]"), "probe=gradients measures 20 times, evenly over all epochs"),
        (("schedule=constant", "keep_checkpoint=false"), "{} has kept no checkpoint (keep_checkpoint)"),
        (("schedule=constant", "norm=none", "optimizer.lr=1e30"), "{} diverged, which leaves nothing to go on from"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_spreads_over_all_epochs_starts_anew_and_says_why(tiny, settings, why) -> None:
    shorter = tiny(*settings, "epochs=1")
    train_run(shorter)
    assert not (folder(shorter) / KEPT).exists()
    found = str(find_shorter(runs.Run(tiny(*settings, "epochs=2").as_dict())))
    assert found.startswith("starts anew: ")
    assert why.format(folder(shorter).name) in found


class FollowsProgress(SmallNet):
    def at_step(self, step: int, steps: int) -> None:
        """Do what only the network knows."""


def test_a_network_that_is_told_how_far_the_run_is_starts_anew(tiny, steps, capfd) -> None:
    settings = (*of(1, "keep_checkpoint=true"), f"model.target={__name__}.FollowsProgress")
    train_run(tiny(*settings))
    train_run(tiny(*settings, "epochs=2"))
    assert steps.taken == 3 + 6
    assert "starts anew: FollowsProgress may change with the share of all epochs" in capfd.readouterr().err


def forged_weights(saved) -> None:
    saved["network"]["head.bias"] += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda record, _: (record / KEPT).write_bytes(b"PK"), "it is truncated or altered"),
        (lambda record, _: rewritten(record / KEPT, lambda saved: saved.pop("position")), "it lacks position"),
        (lambda record, _: rewritten(record / KEPT, lambda saved: saved["optimizer"].clear()), "optimizer lacks"),
        (lambda record, _: rewritten(record / KEPT, forged_weights), "has other weights than it ended with"),
        (lambda record, _: (record / "metrics.jsonl").write_text(""), "its record is damaged"),
        (lambda _, patch: patch.setattr(RunConfig, "own_code", other_code), "the code of model.target=x has changed"),
        (lambda _, patch: patch.setattr(setup, "load", other_images), "images of dataset=digits have changed since"),
    ],
    ids=range(7),
)
def test_what_cannot_be_gone_on_from_is_left_and_the_run_starts_anew(tiny, steps, monkeypatch, capfd, spoil, why):
    train_run(tiny(*of(3), "study=whole"))
    train_run(tiny(*of(2)))
    spoil(folder(tiny(*of(2))), monkeypatch)
    steps.taken = 0
    train_run(tiny(*of(3)))
    assert steps.taken == 9
    assert outcome(tiny(*of(3))) == outcome(tiny(*of(3), "study=whole"))
    error = capfd.readouterr().err
    assert why in error
    assert error.count("starts anew") == 1


def other_code(config: RunConfig):
    return {"model.target": {"object": "x", "code": "other", "modules": {"small": "other"}}}


LOAD = setup.load


def other_images(*arguments, **options):
    return dataclasses.replace(LOAD(*arguments, **options), fingerprint="another")


def test_a_run_stopped_after_it_took_over_the_rows_goes_on(tiny, steps) -> None:
    train_run(tiny(*of(4), "study=whole"))
    train_run(tiny(*of(2)))
    steps.interrupt(tiny(*of(4)), after=2)
    train_run(tiny(*of(4)))
    assert outcome(tiny(*of(4))) == outcome(tiny(*of(4), "study=whole"))
    made = json.loads((folder(tiny(*of(4))) / "provenance.json").read_text())
    assert [part.get("run") for part in made["earlier"]] == [folder(tiny(*of(2))).name]


@pytest.mark.parametrize("average", ["weight_average=null", "weight_average=0.9"])
def test_weights_of_a_finished_run_come_from_its_kept_checkpoint_or_it_says_why_not(tiny, average) -> None:
    train_run(tiny(*of(2, average), "study=asked", "save_weights=true"))
    for study, keep in (("kept", "null"), ("gone", "false")):
        train_run(tiny(*of(2, average), f"study={study}", f"keep_checkpoint={keep}"))
    said: list[str] = []
    for study in ("kept", "gone"):
        config = tiny(*of(2, average), f"study={study}", "save_weights=true")
        assert lacks_weights(runs.Run(config.as_dict()), config)
        add_weights([runs.Run(config.as_dict())], said.append)
    assert "weights.pt is written from the kept checkpoint: bn seed=0" in said[0]
    assert "There is no weights.pt of bn seed=0" in said[1]
    assert "delete the folder" in said[1]
    asked, kept = (torch.load(folder(tiny(*of(2, average), f"study={s}")) / "weights.pt") for s in ("asked", "kept"))
    assert same(dict(asked), dict(kept))
