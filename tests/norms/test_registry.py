"""Variants by name, as someone has them who imports nothing but `normlab.norms`."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from small import SmallNet, SmallResNet
from torch import nn

from normlab import norms
from normlab.common.errors import UserError

MENU = Path(__file__).parents[2] / "conf" / "norm"


def of_the_menu(name: str) -> dict[str, Any]:
    file = yaml.safe_load((MENU / f"{name}.yaml").read_text())
    options = {key: float(value) if key in ("eps", "momentum") else value for key, value in file.items()}
    return file.get("norm", options) | ({"eps": 1e-4} if name == "nf" else {})  # YAML takes 1e-4 for a text


@pytest.mark.parametrize("name", sorted(path.stem for path in MENU.glob("*.yaml") if path.stem != "bnp"))
def test_a_name_means_what_it_means_on_the_command_line(name: str) -> None:
    cls, declaration = norms.variants()[name]
    target = f"normlab.norms.{cls.__name__}"
    assert {"_target_": target, "name": name, **declaration.defaults()} == of_the_menu(name)


@pytest.mark.parametrize("name", sorted(norms.NAMED))
def test_every_name_makes_a_network_that_trains(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = norms.rewrite(SmallResNet(10), name)
        images = torch.randn(4, 3, 8, 8)
        norms.data_dependent_start(network, images)
        steps = norms.Steps(network)
        steps.begin(0, 2)
        nn.functional.cross_entropy(network(images), torch.arange(4)).backward()
        steps.end()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_options_take_the_place_of_the_usual_ones() -> None:
    network = norms.rewrite(SmallNet(10), "gn", groups=4)
    assert [layer.num_groups for layer in network.modules() if isinstance(layer, norms.GroupNorm2d)] == [4, 4]
    grouped = norms.rewrite(SmallNet(10), "bn", norm_batch=2, eps=1e-3)
    assert all(
        layer.norm_batch == 2 and layer.eps == 1e-3 for layer in grouped.modules() if isinstance(layer, nn.BatchNorm2d)
    )


def test_a_network_of_torchvision_gets_what_the_variants_class_gives_it() -> None:
    ours = norms.rewrite(torchvision.models.resnet18(weights=None, num_classes=10), "bnminus").eval()
    theirs = torchvision.models.resnet18(weights=None, num_classes=10).eval()
    norms.rewrite(theirs, norms.BatchNormMinus(eps=1e-5, momentum=0.1))
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("bnmnus", {}, "Did you mean bnminus?"),
        ("renorm", {"r_max": 3.0}, "Did you mean rmax?"),
        ("gn", {"groups": 5}, "groups=5 does not divide"),
        ("mabn", {"window": 0}, "window=0 is out of range"),
        ("bnp", {}, "There is no variant bnp."),
        (norms.Affine(), {"eps": 1e-3}, "Affine has its options already"),
    ],
)
def test_a_mistake_is_a_sentence_with_what_would_be_right(name: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        norms.rewrite(SmallNet(10), name, **options)
    assert told in str(error.value)
    assert len(str(error.value).splitlines()) <= 5


def test_a_network_without_batch_norm_is_told_so() -> None:
    with pytest.raises(UserError, match="has no BatchNorm2d layer"):
        norms.rewrite(nn.Sequential(nn.Linear(2, 2)), "gn")


def test_norms_alone_need_neither_hydra_nor_configuration() -> None:
    code = "import sys, normlab.norms; print({'hydra', 'omegaconf', 'pydantic', 'yaml'} & {*sys.modules})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"
