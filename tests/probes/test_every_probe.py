"""What every probe of the menu has to stand: it changes nothing, misses nothing, and survives what a run does."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from probes.snapshots import snapshot
from small import SmallNet
from torch import Tensor, nn

from normlab import models, runs
from normlab.common.errors import InterruptedRunError, UserError
from normlab.common.registry import declarations
from normlab.config.schema import RunConfig
from normlab.norms import Steps, find_sites
from normlab.probes import ProbedNetwork, Probes, StepSnapshot
from normlab.probes.registry import probe_classes
from normlab.runs import reading
from normlab.training import engines
from normlab.training.gradient_transforms import build_transform
from normlab.training.optimizers import build_optimizer
from normlab.training.run import train_run

CONF = Path(__file__).parents[2] / "conf" / "probe"
PROBE_SECTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))
RESIDUAL = ("model.target=small.SmallResNet", "model.name=small_resnet")
TIMING = ("wall_seconds", "images_per_second")


def probing(probes: list[str], *settings: str) -> list[str]:
    quick = ["probe.sharpness.iterations=3"] if "sharpness" in probes else []
    return [f"probe=[{','.join(probes)}]", *(f"probe.{name}.times=3" for name in probes), *quick, *settings]


def measured(config: RunConfig) -> dict[str, list[dict[str, Any]]]:
    found, warnings = runs.read_probes(runs.Run(config.as_dict()).folder)
    assert not warnings
    return found


def outcome(config: RunConfig) -> tuple[Any, ...]:
    """What a run leaves that its probes must not change: weights and metrics, but for times."""
    status = train_run(config)
    rows, warnings = runs.read_metrics(runs.Run(config.as_dict()).folder)
    assert not warnings
    return status["state"], status["weights_sha256"], [{k: r[k] for k in r if k not in TIMING} for r in rows]


VARIANTS = {  # with state beyond parameters, or another optimizer
    "renorm": ("norm.ramp_start=0",),
    "noisy_bn": (),
    "mimicnorm": (),
    "mabn": ("norm.unit=steps", "norm.warmup=2", "norm.r_from=3"),
    "powernorm": ("norm.unit=steps", "norm.warmup=2"),
    "wn": ("norm.init=data",),
    "frn": ("optimizer=adam",),
    "evonorm_b0": ("optimizer=rmsprop", "optimizer.momentum=0.9"),
    "bnp": ("optimizer.lr=1e-3",),
    "nf": (*RESIDUAL, "optimizer.lr=1e-3"),
}
SETTINGS = {
    "bf16": ("precision=bf16",),
    "averaged": ("weight_average=0.9",),
    "input_norm": ("input_norm=bn", "label_smoothing=0.1"),
    "precise": ("eval_stats=precise", "norm_batch=4"),
    "agc": ("optimizer.agc=0.001", "optimizer.momentum=0.5"),
    "fp16": ("precision=fp16",),
}


@pytest.mark.parametrize("probe", PROBE_SECTIONS)
def test_a_probe_alone_changes_nothing(tiny, probe) -> None:
    plain, probed = tiny("norm=noisy_bn", "norm_batch=5"), tiny("norm=noisy_bn", "norm_batch=5", *probing([probe]))
    assert outcome(probed) == outcome(plain)
    assert list(measured(probed)) == [probe]
    assert not measured(plain)


@pytest.mark.slow
@pytest.mark.parametrize("norm", VARIANTS)
def test_all_probes_together_change_nothing_of_any_variant(tiny, norm) -> None:
    probes = [probe for probe in PROBE_SECTIONS if norm not in ("mabn", "powernorm") or probe != "sharpness"]
    settings = (f"norm={norm}", *VARIANTS[norm])
    probed = tiny(*settings, *probing(probes))
    assert outcome(probed) == outcome(tiny(*settings))
    found = measured(probed)
    assert set(found) == set(probes) - ({"affine"} if not found.get("affine") else set())
    for name, rows in found.items():
        assert {row["step"] for row in rows} == ({0, 1, 2, 3, 4, 5} if name == "activations" else {0, 2, 5})
    expected = list(find_sites(SmallNet(10))) if "small.SmallResNet" not in str(settings) else range(6)
    assert len(found["activations"]) == 6 * len(expected)
    for row in found["landscape"] + found["gradients"]:
        assert None not in row.values()


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_all_probes_together_change_nothing_whatever_the_settings(tiny, setting) -> None:
    probed = tiny(*SETTINGS[setting], *probing(PROBE_SECTIONS))
    assert outcome(probed) == outcome(tiny(*SETTINGS[setting]))
    assert {row["layer"] for row in measured(probed)["gradients"]} == {"body.0", "body.3", "head"}  # also in a wrapper
    assert {row["layer"] for row in measured(probed)["activations"]} == {"body.1", "body.4"}


set_learning_rate, evaluate = engines.set_learning_rate, StepSnapshot._evaluate


def interrupted(monkeypatch, config: RunConfig, target: object, original: Any, calls: int) -> None:
    """Begin a run and ask it to stop, as a signal would, at such a call of a function."""
    count = iter(range(calls + 1))

    def counted(*arguments: Any) -> Any:
        if next(count, None) == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(target, original.__name__, counted)
        with pytest.raises(InterruptedRunError):
            train_run(config)


UNDISTURBED: dict[str, tuple[Any, Any]] = {}


def undisturbed(tiny, norm: str) -> tuple[Any, Any]:
    """The outcome of a run that nobody interrupts, and its rows; one run for all tests."""
    if norm not in UNDISTURBED:
        config = tiny(f"norm={norm}", *probing(PROBE_SECTIONS), "study=whole")
        UNDISTURBED[norm] = outcome(config), measured(config)
    return UNDISTURBED[norm]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "target", "function", "call"),
    [
        *(("bn", engines, set_learning_rate, step) for step in (0, 3, 5)),
        ("mimicnorm", engines, set_learning_rate, 1),
        *(("bn", StepSnapshot, evaluate, call) for call in (0, 10, 28)),
    ],
)
def test_a_run_interrupted_at_a_step_or_amid_a_measurement_has_the_rows_of_an_undisturbed_one(
    tiny, monkeypatch, norm, target, function, call
) -> None:
    config = tiny(f"norm={norm}", *probing(PROBE_SECTIONS), "study=parts")
    expected, rows = undisturbed(tiny, norm)
    interrupted(monkeypatch, config, target, function, call)
    assert measured(config) != rows or call == 5  # after the last measurement
    assert outcome(config) == expected
    assert measured(config) == rows


def test_a_run_that_died_goes_on_from_its_checkpoint_with_its_rows(tiny, monkeypatch) -> None:
    """Rows after the checkpoint are dropped and measured again; a torn line is told of."""
    config = tiny("norm=bn", *probing(PROBE_SECTIONS), "checkpoint_seconds=0", "study=parts")
    run = runs.Run(config.as_dict())
    interrupted(monkeypatch, config, engines, set_learning_rate, 2)
    for probe in PROBE_SECTIONS:
        run.append_probe(probe, [{"step": 3, "layer": "never"}, {"step": 4, "layer": "never"}])
    path = run.folder / "probes" / "ics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "la')
    assert len(runs.read_probes(run.folder)[1]) == 1
    assert (outcome(config), measured(config)) == undisturbed(tiny, "bn")


def test_a_probe_s_file_ends_where_it_could_not_be_read_again_and_its_run_is_finished(tiny, monkeypatch) -> None:
    monkeypatch.setattr(reading, "MOST_BYTES_OF_ROWS", 4000)
    config = tiny("norm=bn", *probing(["activations"]), "study=full")
    train_run(config)
    run = runs.Run(config.as_dict())
    assert run.state == "done"
    assert 0 < (run.folder / "probes" / "activations.jsonl").stat().st_size <= 4000
    log = (run.folder / "run.log").read_text()
    assert log.count("probe=activations has measured more than a file holds") == 1


def test_what_is_not_finite_is_written_as_null_and_never_raised(tiny) -> None:
    config = tiny("norm=none", "optimizer.lr=1e30", "schedule=constant", *probing(PROBE_SECTIONS))
    status = train_run(config)
    assert (status["state"], status["diverged_step"]) == ("diverged", 2)
    found = measured(config)
    assert {row["step"] for rows in found.values() for row in rows} <= {0, 1}
    [row] = found["landscape"]
    assert None in (row["beta"], row["loss_high"], *row["losses"])
    for path in (runs.Run(config.as_dict()).folder / "probes").iterdir():
        assert "NaN" not in path.read_text()
        assert "Infinity" not in path.read_text()


@pytest.mark.parametrize("probe", PROBE_SECTIONS)
@pytest.mark.parametrize("value", [float("nan"), 1e38, 0.0])
def test_no_weight_makes_a_probe_fail(make, probe, value) -> None:
    config = make(*probing([probe]))
    network = SmallNet(num_classes=10)
    torch.nn.init.constant_(network.body[3].weight, value)
    recorded: list[dict[str, Any]] = []
    sites = tuple(site.norm for site in find_sites(network))
    probes = Probes(config.probe, ProbedNetwork(network, sites), 4, lambda name, rows: recorded.extend(rows))
    probes.measure(snapshot(network, torch.randn(8, 3, 8, 8), torch.arange(8)))
    assert recorded
    runs.files.to_json({"rows": recorded})


class Counted(nn.Module):
    """A layer with a state that is no tensor."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


@pytest.mark.parametrize("probe", PROBE_SECTIONS)
def test_a_measurement_leaves_no_hook_no_gradient_no_random_number_and_what_layers_keep(make, probe) -> None:
    config = make(*probing([probe]))
    network = SmallNet(num_classes=10)
    network.body.append(Counted())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    sites = tuple(site.norm for site in find_sites(network))
    probes = Probes(config.probe, ProbedNetwork(network, sites), 4, lambda name, rows: None)
    at = snapshot(network, torch.randn(8, 3, 8, 8), torch.arange(8))
    calls = network.body[-1].calls
    random = torch.random.get_rng_state()
    probes.measure(at)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert network.body[-1].calls == calls


OPTIMIZERS = {
    "sgd": ("norm.scale_lr_divisor=10", "optimizer.nesterov=true", "optimizer.weight_decay=0.1"),
    "adam": ("optimizer=adam",),
    "rmsprop": ("optimizer=rmsprop",),
    "agc": ("optimizer.agc=0.001",),
    "bnp": ("norm=bnp",),
    "mimicnorm": ("norm=mimicnorm",),
    "noisy": ("norm=noisy_bn",),
    "mabn": ("norm=mabn", "norm.warmup=0", "norm.r_from=0"),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_the_update_is_the_very_one_that_the_run_makes(tiny, case) -> None:
    """Bit for bit, at the third step, so that momentum and moving averages count; and twice."""
    config = tiny(*OPTIMIZERS[case])
    network = models.build(config, num_classes=10, image_size=8).train()
    optimizer = build_optimizer(config.optimizer, network)
    transform, layers = build_transform(config.optimizer, network), Steps(network)
    for step in range(3):
        images, targets = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step)), torch.arange(8)
        layers.begin(step, 6)
        optimizer.zero_grad()
        made = snapshot(network, images, targets, optimizer=optimizer, transform=transform)
        once, again = made.updated(), made.updated()
        gradients = made.loss_and_gradient[1]
        torch.manual_seed(3)
        F.cross_entropy(network(images), targets).backward()
        for name, parameter in network.named_parameters():
            assert torch.equal(gradients[name], parameter.grad)
        if transform:
            transform()
        optimizer.step()
        layers.end()
        for name, parameter in network.named_parameters():
            assert torch.equal(once[name], parameter)
            assert torch.equal(again[name], parameter)


@pytest.mark.parametrize(
    ("settings", "total", "steps"),
    [
        (["probe.affine.times=3"], 11, {0, 5, 10}),
        (["probe.affine.times=1"], 11, {0}),
        (["probe.affine.times=99"], 4, {0, 1, 2, 3}),
        (["probe.affine.steps=[7,0,7,99]"], 11, {0, 7}),
    ],
)
def test_measurements_are_spread_evenly_or_where_they_are_asked_for(make, settings, total, steps) -> None:
    config = make("probe=affine", *settings)
    probes = Probes(config.probe, ProbedNetwork(SmallNet(10)), total, lambda name, rows: None)
    assert {step for step in range(total) if probes.due(step)} == steps


@pytest.mark.slow
def test_probes_are_of_a_run_s_identity_and_none_of_them_is_as_it_was(make) -> None:
    assert runs.run_id(make().as_dict()) == runs.run_id(make("probe=[]").as_dict())
    assert runs.run_id(make().as_dict()) != runs.run_id(make("probe=ics").as_dict())
    assert runs.identity(make().as_dict())["probe"] == {}
    once = make("probe=ics", "probe.ics.steps=[3,1,1]")
    again = make("probe=[ics]", "probe.ics.steps=[1,3]", "probe.ics.times=7")  # steps go first
    assert runs.run_id(once.as_dict()) == runs.run_id(again.as_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["probe=ics", "probe.ics.times=0"], "probe.ics.times=0 is out of range: expected 1 or more"),
        (["probe=ics", "probe.ics.times=null"], "probe=ics has neither times nor steps to measure at"),
        (["probe=ics", "probe.ics.steps=[]"], "probe.ics.steps"),
        (["probe=ics", "probe.ics.layers=0"], "layers=0 is neither a number of layers"),
        (["probe=ics", "probe.ics.layers=conv1"], "layers=conv1 is neither a number of layers"),
        (["probe=landscape", "probe.landscape.reach=[0]"], "probe.landscape.reach.0=0 is out of range"),
        (["probe=affine", "+probe.affine.every=3"], "probe.affine.every"),
        (["probe=activations", "probe.activations.bins=2"], "bins=2 is out of range: expected 3 or more."),
        (["probe=sharpness", "probe.sharpness.tolerance=1"], "probe.sharpness.tolerance=1 is out of range"),
    ],
)
def test_wrong_settings_are_answered_in_a_sentence(make, settings, message) -> None:
    with pytest.raises(UserError) as caught:
        make(*settings)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 5


def test_the_files_of_the_menu_have_the_declared_options_and_defaults() -> None:
    declared = declarations("probes")
    page = (Path(__file__).parents[2] / "docs" / "probes.md").read_text()
    assert set(PROBE_SECTIONS) == set(declared) == set(probe_classes())
    assert all(f"`{name}`" in page for name in declared)
    for name, declaration in declared.items():
        defaults = {
            key: list(option.default) if isinstance(option.default, tuple) else option.default
            for key, option in declaration.options.items()
        }
        file = yaml.safe_load((CONF / f"{name}.yaml").read_text())
        assert file == {name: {"name": name, "steps": None, **defaults}}


def test_a_probe_has_the_options_of_its_settings_or_the_defaults(make) -> None:
    config = make("probe=[activations,landscape,sharpness]", "probe.activations.bins=7", "probe.landscape.reach=[3]")
    assert {name: settings.options for name, settings in config.probe.items()} == {
        "activations": {"histograms": 3, "bins": 7},
        "landscape": {"reach": [3.0]},
        "sharpness": {"iterations": 30, "tolerance": 0.01},
    }
    probe = probe_classes()["activations"](ProbedNetwork(SmallNet(10)), **config.probe["activations"].options)
    assert (probe.bins, probe.histograms) == (7, 3)
