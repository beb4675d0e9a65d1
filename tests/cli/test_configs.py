"""Every shipped file of the menu composes, is valid, and builds."""

from pathlib import Path

import pytest
import torch

from normlab import models
from normlab.training.optimizers import build_optimizer, learning_rate

CONF = Path(__file__).parents[2] / "conf"
NEEDED = {  # what a file asks of its user
    "model=custom": ("model.target=small.SmallNet",),
    "dataset=image_folder": ("dataset.path=somewhere",),
}
GROUPS = ("norm", "model", "dataset", "init", "optimizer", "schedule")
FILES = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


def test_every_group_has_files_and_is_on_the_menu() -> None:
    menu = (CONF / "config.yaml").read_text()
    for file in FILES:
        group, _, option = file.partition("=")
        line = next(line for line in menu.splitlines() if line.strip().startswith(f"- {group}: "))
        assert option in line, f"{file} is not on the menu"
    assert {path.name for path in CONF.iterdir() if path.is_dir()} == {*GROUPS, "hydra"}


@pytest.mark.parametrize("file", FILES)
def test_every_file_composes_and_builds(make, file) -> None:
    config = make(file, *NEEDED.get(file, ()))
    network = models.build(config, num_classes=10, image_size=32).to("meta")
    assert network(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    optimizer = build_optimizer(config.optimizer, network)
    assert optimizer.param_groups[0]["lr"] == config.optimizer.lr
    assert 0 < learning_rate(config, 0, 10) <= config.optimizer.lr


@pytest.mark.parametrize("norm", ["bn", "affine", "bnminus", "none"])
def test_an_arm_is_named_as_its_file(make, norm) -> None:
    assert make(f"norm={norm}").norm.name == norm
