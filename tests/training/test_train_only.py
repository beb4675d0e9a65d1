"""Runs that train the scales and shifts of norms alone."""

import pytest
import torch
from outcome import folder, outcome
from small import SmallResNet
from torch import nn

from normlab import models, runs
from normlab.common.errors import UserError
from normlab.config.schema import RunConfig
from normlab.norms import find_sites
from normlab.probes.registry import probe_classes
from normlab.runs import identity, run_id
from normlab.training.optimizers import build_optimizer
from normlab.training.run import train_run

SMALL = ("model.target=small.SmallResNet", "model.name=small_resnet")
ALONE = ("train_only=norm", "init=uniform_gamma")


def build(config: RunConfig) -> nn.Module:
    return models.build(config, num_classes=10, image_size=8)


def trained(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "norm",
    [
        *("bn", "bn_scaled", "bn_var", "bn_mean", "affine", "noisy_bn", "renorm", "lp1", "mabn", "powernorm", "online"),
        *("gn", "in", "frn", "evonorm_s0", "evonorm_b0", "dyt", "derf"),
    ],
)
def test_scales_and_shifts_of_all_norms_are_trained_and_nothing_else(tiny, norm) -> None:
    config = tiny(*SMALL, f"norm={norm}", "train_only=norm")
    sites = [site.norm for site in find_sites(models.base(config, 10, 8))]
    network = build(config)
    layer = ".0" if norm == "noisy_bn" else ""  # in a sequence with its noise
    expected = {f"{site}{layer}.{name}" for site in sites for name in ("weight", "bias")}
    assert trained(network) == expected
    groups = build_optimizer(config.optimizer, network).param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(network.get_parameter(one)) for one in expected}


@pytest.mark.parametrize(
    "settings",
    [
        *(f"norm={norm}" for norm in ("none", "bnminus", "bn_frozen", "noisy_none", "mimicnorm", "wn", "wn_mean")),
        *(f"norm={norm}" for norm in ("wn_trelu", "normprop", "nf", "fixup", "skipinit", "bnp")),
        *("norm=bn_var norm.affine=false", "norm=renorm norm.learn_scale=false"),
    ],
)
def test_a_norm_without_scales_is_refused(tiny, settings) -> None:
    norm = settings.split()[0]
    with pytest.raises(UserError, match=rf"{norm} has no scale per channel to train.\nUse a norm that has one"):
        build(tiny(*SMALL, *settings.split(), "train_only=norm"))


class PartlyFrozen(SmallResNet):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.bn1.requires_grad_(False)


def test_what_a_network_has_frozen_stays_frozen(tiny) -> None:
    network = ("model.target=training.test_train_only.PartlyFrozen", "model.name=partly")
    names = trained(build(tiny(*network, *ALONE)))
    assert {name.partition(".")[0] for name in names} == {"blocks"}


def test_a_run_leaves_all_other_weights_where_they_start(tiny) -> None:
    config = tiny(*SMALL, *ALONE, "save_weights=true", "optimizer.weight_decay=0.1")
    assert train_run(config)["state"] == "done"
    start, end = build(config).state_dict(), torch.load(folder(config) / "weights.pt", weights_only=True)
    changed = {name for name, value in start.items() if not torch.equal(value, end[name])}
    buffers = {name for name, _ in build(config).named_buffers()}
    assert changed - buffers == trained(build(config))


def test_it_is_part_of_the_identity_only_where_it_is_set(tiny) -> None:
    plain = tiny().as_dict()
    assert "train_only" not in identity(plain)
    assert run_id(plain) == run_id({key: value for key, value in plain.items() if key != "train_only"})
    assert run_id(plain) != run_id(tiny("train_only=norm").as_dict())
    with pytest.raises(UserError, match="train_only=conv"):
        tiny("train_only=conv")


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer=adam", "weight_average=0.9"),
        ("optimizer=rmsprop", "norm=online", "norm_batch=4"),
        ("optimizer.agc=0.01", "norm=renorm", "eval_stats=precise"),
        ("engine=graph", "norm=frn", "input_norm=bn"),
        ("init=lsuv", "norm=gn", "norm.groups=8"),
    ],
    ids=" ".join,
)
def test_an_interrupted_run_ends_bit_identical(tiny, steps, settings) -> None:
    others = settings if "init=lsuv" in settings else ("init=uniform_gamma", *settings)
    whole, parts = (tiny(*SMALL, "train_only=norm", *others, f"study={study}") for study in ("whole", "parts"))
    train_run(whole)
    steps.interrupt(parts, after=4)
    train_run(parts)
    assert outcome(parts) == outcome(whole)


@pytest.mark.slow
def test_probes_measure_it_and_change_nothing(tiny) -> None:
    names = sorted(probe_classes())
    quick = [f"probe.{name}.times=2" for name in names] + ["probe.sharpness.iterations=3"]
    probed, plain = tiny(*SMALL, *ALONE, f"probe=[{','.join(names)}]", *quick), tiny(*SMALL, *ALONE)
    train_run(probed)
    train_run(plain)
    assert outcome(probed)[:3] == outcome(plain)[:3]
    found, warnings = runs.read_probes(folder(probed))
    assert not warnings
    assert {"activations", "affine", "landscape", "sharpness"} <= set(found)
