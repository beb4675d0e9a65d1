"""Every run of a sweep as Hydra itself composes it."""

from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import open_dict
from omegaconf.errors import MissingMandatoryValue

from normlab.config.hydra import settings_of
from normlab.launchers.composing import compose, serving

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)
        with open_dict(config):
            config.hydra.job.config_name = "config"
        yield loader, config


def by_hydra(loader, config, overrides):
    composed = loader.load_sweep_config(config, list(overrides))
    with open_dict(composed):
        composed.pop("hydra")
    return settings_of(composed)


QUICK = [
    [],
    ["optimizer.lr=1e-3"],
    ["+tuning=lr", "optimizer.lr=0.5"],
    ["probe=[ics,gradients]", "probe.ics.times=7", "probe.ics.layers=[conv1,fc]"],
]
EXTRA = [
    ["study=one/two", "output_dir=/somewhere"],
    ["dataset.flip=true", "norm_batch=null"],
    ["+norm.gamma_init=1"],
    ["++norm.eps=0.1"],
    ["~label_smoothing"],
    ["dataset=image_folder", "dataset.path=/a/folder"],
    ["model=deep_linear", "dataset=linear_regression"],
    ["experiment=small_batch", "budget=laptop"],
    ["schedule=step", "schedule.milestones=[0.3,0.6]"],
    ["optimizer={lr:0.3}"],
    ["study='a name with spaces'"],
    ["data_dir=${output_dir}/data", "output_dir=elsewhere"],
    ["dataset=image_folder", "dataset.path=${data_dir}/x"],
]


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "extra", [*QUICK, *(pytest.param(each, marks=pytest.mark.slow) for each in EXTRA)], ids=" ".join
)
def test_equal_to_hydras_own(hydra, extra) -> None:
    runs = [["norm=bn", "seed=0", *extra], ["norm=bn", "seed=1", *extra], ["norm=lp1", "seed=1", *extra]]
    assert compose(*hydra, runs) == [by_hydra(*hydra, run) for run in runs]


def test_runs_do_not_share_what_is_written_into_one(hydra) -> None:
    first, second = compose(*hydra, [["norm=bn", "optimizer.lr=0.5"], ["norm=bn", "seed=3"]])
    assert first["optimizer"]["lr"] == 0.5
    assert second["optimizer"]["lr"] == by_hydra(*hydra, ["norm=bn", "seed=3"])["optimizer"]["lr"] != 0.5
    assert (first["seed"], second["seed"]) == (0, 3)


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["norm=absent"], HydraException),
        (["nothing=3"], HydraException),
        (["norm.groups=3"], HydraException),
        (["optimizer=3"], ValueError),
        (["dataset=image_folder"], MissingMandatoryValue),
    ],
    ids=str,
)
def test_refuses_what_hydra_refuses(hydra, overrides, error) -> None:
    with pytest.raises(error):
        by_hydra(*hydra, ["seed=1", *overrides])
    with pytest.raises(error):
        compose(*hydra, [["seed=1", *overrides]])


@pytest.mark.parametrize(
    ("runs", "left", "lacking"),
    [
        ("norm=gn norm.groups=8|norm=bn norm.groups=8", "norm=gn norm.groups=8|norm=bn", {"norm.groups": ("norm=bn",)}),
        (  # what differed in that value only is one run
            "norm=gn norm.groups=8|norm=gn norm.groups=4|norm=bn norm.groups=8|norm=bn norm.groups=4",
            "norm=gn norm.groups=8|norm=gn norm.groups=4|norm=bn",
            {"norm.groups": ("norm=bn",)},
        ),
        ("norm=gn norm.groups=8|norm=evonorm_s0 norm.groups=8", None, {}),
        ("norm=bn norm.groups=8|norm=none norm.groups=8", None, {}),
        ("norm=bn norm.eps=8|norm=none norm.eps=8", "norm=bn norm.eps=8|norm=none", {"norm.eps": ("norm=none",)}),
        (
            "probe=[ics] probe.ics.times=7|probe=[gradients] probe.ics.times=7|probe=[] probe.ics.times=7",
            "probe=[ics] probe.ics.times=7|probe=[gradients]|probe=[]",
            {"probe.ics.times": ("probe=[gradients]", "probe=[]")},
        ),
        (
            "model=resnet model.kwargs={a:1}|model=custom model.kwargs={a:1}",
            "model=resnet|model=custom model.kwargs={a:1}",
            {"model.kwargs": ("model=resnet",)},
        ),
        (  # what is added or left out stays
            "norm=gn +norm.own=1 norm.groups=2|norm=bn +norm.own=1 norm.groups=2 seed=1 ~label_smoothing",
            "norm=gn +norm.own=1 norm.groups=2|norm=bn +norm.own=1 seed=1 ~label_smoothing",
            {"norm.groups": ("norm=bn",)},
        ),
    ],
)
def test_a_setting_goes_to_the_runs_that_have_it(hydra, runs, left, lacking) -> None:
    given = [run.split(" ") for run in runs.split("|")]
    expected = given if left is None else [run.split(" ") for run in left.split("|")]
    assert serving(*hydra, given) == (expected, lacking)
