"""What runs are called: by what distinguishes them, whatever their settings hold."""

import copy
import itertools
import random
from typing import Any

import pytest

from normlab.runs import run_id, run_names

BASE: dict[str, Any] = {
    "study": "study",
    "norm": {"name": "bn", "_target_": "normlab.norms.BatchNorm", "eps": 1e-5},
    "model": {"name": "resnet", "target": None},
    "dataset": {"name": "digits", "kind": "digits", "path": None},
    "optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 0.0},
    "schedule": {"name": "constant"},
    "init": {"name": "default"},
    "probe": {},
    "depth": 18,
    "batch": 32,
    "norm_batch": None,
    "seed": 0,
    "epochs": 3,
}


def run(**settings: Any) -> dict[str, Any]:
    """The settings of a run, those of a group written `optimizer__lr`."""
    config = copy.deepcopy(BASE)
    for name, value in settings.items():
        group, _, key = name.rpartition("__")
        (config[group] if group else config)[key] = value
    return config


def named(*settings: dict[str, Any]) -> list[str]:
    return run_names([run(**each) for each in settings])


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ([{}], ["bn seed=0"]),
        ([{"seed": 0}, {"seed": 3}], ["bn seed=0", "bn seed=3"]),
        ([{"batch": 8}, {"batch": 32, "norm__name": "none"}], ["bn seed=0", "none seed=0"]),  # the arm says it
        (
            [{"batch": 8, "optimizer__lr": 0.1}, {"batch": 8, "optimizer__lr": 0.05}, {"batch": 32}],
            ["bn b=8 lr=0.1 seed=0", "bn b=8 lr=0.05 seed=0", "bn b=32 lr=0.1 seed=0"],
        ),
        (
            [{"batch": 8, "optimizer__lr": 0.1}, {"batch": 16, "optimizer__lr": 0.2}],
            ["bn b=8 seed=0", "bn b=16 seed=0"],
        ),
        ([{"depth": 18}, {"depth": 50}], ["bn resnet18 seed=0", "bn resnet50 seed=0"]),
        ([{"dataset__name": "digits"}, {"dataset__name": "cifar10"}], ["bn digits seed=0", "bn cifar10 seed=0"]),
        ([{"norm__eps": 1e-5}, {"norm__eps": 1e-3}], ["bn (eps=1e-05) seed=0", "bn (eps=0.001) seed=0"]),
        ([{"init__name": "default"}, {"init__name": "fixup"}], ["bn init=default seed=0", "bn init=fixup seed=0"]),
        ([{}, {"probe": {"ics": {"times": 9}}}], ["bn seed=0", "bn probe=ics seed=0"]),
        ([{"study": "a"}, {"study": "b"}], ["bn seed=0 study=a", "bn seed=0 study=b"]),
    ],
)
def test_a_run_is_called_by_its_arm_by_what_tells_it_apart_and_by_its_seed(settings, names) -> None:
    assert named(*settings) == names


def test_runs_that_only_options_of_a_probe_tell_apart_have_their_ids() -> None:
    configs = [run(probe={"ics": {"times": times}}) for times in (3, 4)]
    assert run_names(configs) == [f"bn seed=0 {run_id(config)}" for config in configs]


def test_equal_runs_are_numbered() -> None:
    same = f"bn seed=0 {run_id(run())}"
    assert named({}, {}) == [same, f"{same} (2)"]


ODD = ["a\nb", "\x1b[31mred", "\u202eevil", "x" * 500, "x" * 400 + "y" * 100, "", "bn seed=0", "\ud800", " ", "b=8"]


@pytest.mark.parametrize("number", range(20))
def test_names_are_unique_short_printable_and_the_same_in_every_order(number) -> None:
    draw = random.Random(number)
    choices = {
        "norm__name": draw.sample([*ODD, "bn", "none"], draw.randint(1, 3)),
        "norm__eps": draw.sample([1e-5, 1, True, None], draw.randint(1, 2)),
        "batch": draw.sample([8, 16, 32], draw.randint(1, 2)),
        "optimizer__lr": draw.sample([0.1, 0.05, 1.0], draw.randint(1, 2)),
        "optimizer__" + draw.choice(ODD): draw.sample(ODD, draw.randint(1, 2)),
        "study": draw.sample(ODD, draw.randint(1, 2)),
        "seed": [0, 1],
    }
    configs = [run(**dict(zip(choices, each, strict=True))) for each in itertools.product(*choices.values())]
    names = run_names(configs)
    assert len(set(names)) == len(configs)
    assert all(name.isprintable() and len(name) < 200 for name in names)
    order = draw.sample(range(len(configs)), len(configs))
    assert run_names([configs[i] for i in order]) == [names[i] for i in order]


def test_only_what_varies_is_named() -> None:
    varied = {"batch": (8, 32), "optimizer__lr": (0.1, 0.2), "depth": (18, 34), "norm__eps": (1e-5, 1e-3)}
    words = {"batch": " b=", "optimizer__lr": " lr=", "depth": " resnet", "norm__eps": "eps="}
    for number in range(1 << len(varied)):
        chosen = {name: values for i, (name, values) in enumerate(varied.items()) if number >> i & 1}
        runs = [run(**dict(zip(chosen, values, strict=True))) for values in itertools.product(*chosen.values())]
        for name in run_names(runs):
            assert {setting for setting, word in words.items() if word in name} == set(chosen)
