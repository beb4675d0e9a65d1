"""Every shipped file of the menu composes, is valid, and builds."""

import pickle
import re
from pathlib import Path

import pytest
import torch
import yaml

from normlab import models
from normlab.norms import LpNorm
from normlab.runs import run_name
from normlab.training.optimizers import build_optimizer, learning_rate

CONF = Path(__file__).parents[2] / "conf"
NEEDED = {  # what a file asks of its user
    "model=custom": ("model.target=small.SmallNet",),
    "model=torchvision": ("model.name=mobilenet_v2",),
    "model=timm": ("model.name=resnet10t",),
    "dataset=image_folder": ("dataset.path=somewhere",),
    "dataset=npz": ("dataset.path=somewhere",),
    "dataset=linear_regression": ("model=deep_linear",),
}
SHAPES = {  # what it takes, if not an image of 32x32 pixels
    "model=inception_v3": (3, 75, 75),
    "model=deep_linear": (10, 1, 1),
    "dataset=linear_regression": (10, 1, 1),
}
GROUPS = ("norm", "model", "dataset", "sampler", "init", "optimizer", "schedule", "probe", "logger")
FILES = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


def test_every_group_has_files_and_is_on_the_menu() -> None:
    menu = (CONF / "config.yaml").read_text()
    for file in FILES:
        group, _, option = file.partition("=")
        [entry] = re.findall(rf"((?:^ *#.*\n)*)^ *- {group}:(.*)$", menu, re.MULTILINE)
        assert re.search(rf"[:|#] *{option}( |$)", " ".join(entry), re.MULTILINE), f"{file} is not on the menu"
    assert {path.name for path in CONF.iterdir() if path.is_dir()} == {
        *GROUPS,
        *("budget", "cluster", "experiment", "hydra", "tuning"),
    }


@pytest.mark.parametrize(("file", "optimizer"), [("lr", "sgd"), ("lr_adam", "adam"), ("lr_adam", "rmsprop")])
def test_a_grid_of_rates_holds_the_optimizers_own_and_brings_images_to_choose_on(make, file, optimizer) -> None:
    config = make(f"+tuning={file}", f"optimizer={optimizer}")
    assert (config.tuned, config.dataset.val_size) == (["optimizer.lr"], 300)
    assert run_name(config.as_dict()) == run_name(config.model_copy(update={"tuned": []}).as_dict())
    grid = yaml.safe_load((CONF / "tuning" / f"{file}.yaml").read_text())["hydra"]["sweeper"]["params"]["optimizer.lr"]
    rates = [float(rate) for rate in grid.split(",")]
    assert rates == sorted(rates)
    assert rates[1] < config.optimizer.lr < rates[-2]
    assert f"+tuning=lr or {file}" in (CONF / "config.yaml").read_text() or file == "lr"


@pytest.mark.no_cover
@pytest.mark.parametrize("file", FILES)
def test_every_file_composes_and_builds(make, file) -> None:
    config = make(file, *NEEDED.get(file, ()))
    shape = SHAPES.get(file, (3, 32, 32))
    network = models.build(config, num_classes=10, image_size=shape[-1]).to("meta")
    assert network(torch.empty(2, *shape, device="meta")).shape == (2, 10)
    optimizer = build_optimizer(config.optimizer, network)
    assert optimizer.param_groups[0]["lr"] == config.optimizer.lr
    assert 0 < learning_rate(config, 0, 10) <= config.optimizer.lr


def test_a_deep_linear_network_descends_as_its_papers(make) -> None:
    config, other = make("model=deep_linear"), make("model=deep_linear", "optimizer=adam")
    assert (config.optimizer.lr, config.optimizer.momentum, config.optimizer.weight_decay) == (1e-6, 0, 0)
    assert (config.schedule.name, config.dataset.kind, config.batch) == ("constant", "linear_regression", 1000)
    assert other.optimizer == make("optimizer=adam").optimizer


NORMS = [file.removeprefix("norm=") for file in FILES if file.startswith("norm=")]


@pytest.mark.parametrize("norm", NORMS)
def test_a_norms_option_that_is_left_out_is_recorded_as_in_its_file(make, norm) -> None:
    whole = make(f"norm={norm}")
    assert whole.norm.name == norm
    rest = make(f"norm={norm}", *(f"~norm.{option}" for option in whole.norm.options))
    assert rest.as_dict() == whole.as_dict()
    assert run_name(rest.as_dict()) == run_name(whole.as_dict())


def test_an_option_that_is_left_out_under_a_name_of_ones_own_is_recorded_as_the_class_has_it(make) -> None:
    options = make("norm=lp2", "norm.name=own", "~norm.p", "norm.eps=0.1").norm.options
    assert options == {"p": LpNorm().p, "eps": 0.1, "momentum": 0.1}  # type: ignore[attr-defined]


def test_a_number_can_come_as_a_text(make, monkeypatch) -> None:
    monkeypatch.setenv("EPS", "1e-1")
    options = make("norm.eps=${oc.env:EPS}", "norm.momentum='1'", "norm.scale_init=${oc.env:EPS}").norm.options
    assert repr(options) == repr({"eps": 0.1, "momentum": 1.0, "scale_init": 0.1, "scale_lr_divisor": 1.0})


def test_a_run_with_every_probe_can_be_sent_to_a_worker(make) -> None:
    config = make("probe=[ics,landscape,activations,affine,gradients,sharpness]")
    sent = pickle.loads(pickle.dumps(config))
    assert sent == config
    assert sent.as_dict() == config.as_dict()
