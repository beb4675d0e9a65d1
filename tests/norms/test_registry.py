"""Variants by name, as someone has them who imports nothing but `normlab.norms`."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import variants
import yaml
from small import SmallNet
from torch import nn

from normlab import norms
from normlab.common.errors import UserError
from normlab.common.registry import declarations, option, register, registered
from normlab.norms.group import GroupNorm2d

ROOT = Path(__file__).parents[2]
MENU = ROOT / "conf" / "norm"
DECLARED = declarations("norms")


def of_the_menu(name: str) -> dict[str, Any]:
    file = yaml.safe_load((MENU / f"{name}.yaml").read_text())
    options = {key: float(value) if key in ("eps", "momentum") else value for key, value in file.items()}
    return file.get("norm", options) | ({"eps": 1e-4} if name == "nf" else {})  # YAML takes 1e-4 for a text


@pytest.mark.parametrize("name", DECLARED)
def test_a_name_means_what_it_means_on_the_command_line(name: str) -> None:
    target = f"normlab.norms.{DECLARED[name].class_name}"
    assert {"_target_": target, "name": name, **DECLARED[name].defaults()} == of_the_menu(name)


def test_options_take_the_place_of_the_usual_ones() -> None:
    network = norms.rewrite(SmallNet(10), "gn", groups=4)
    assert [layer.num_groups for layer in network.modules() if isinstance(layer, GroupNorm2d)] == [4, 4]
    grouped = norms.rewrite(SmallNet(10), "bn", norm_batch=2, eps=1e-3)
    assert all(
        layer.norm_batch == 2 and layer.eps == 1e-3 for layer in grouped.modules() if isinstance(layer, nn.BatchNorm2d)
    )


REFUSED = [  # a value beyond each bound; tests/common/test_registry.py has what is no number, whole or finite
    ("noisy_bn", {"mu_range": -0.5}, "mu_range=-0.5 is out of range: expected 0 or more"),
    ("noisy_none", {"sigma_high": 0.9}, "sigma_high=0.9 is out of range: expected 1 or more"),
    ("renorm", {"rmax": 0.5}, "rmax=0.5 is out of range: expected 1 or more"),
    ("renorm", {"dmax": -1}, "dmax=-1 is out of range: expected 0 or more"),
    ("renorm", {"dmax_end": 0.01}, "dmax_end=0.01 is out of range: expected 0.0384615 to 1, a fraction of the run"),
    ("renorm", {"ramp_start": 5000}, "ramp_start=5000 is out of range: expected 0 to 1, a fraction of the run"),
    ("renorm", {"ramp_unit": "epochs"}, "ramp_unit=epochs is not valid: expected one of fraction, steps"),
    ("renorm", {"ramp_unit": "steps", "ramp_start": 1}, "dmax_end=0.1923077 is out of range: expected 1 or more"),
    ("renorm", {"learn_scale": 1}, "learn_scale=1 is not valid: expected true or false"),
    ("mabn", {"window": 0}, "window=0 is out of range: expected 1 or more"),
    ("mabn", {"rmax": 0.5}, "rmax=0.5 is out of range: expected 1 or more"),
    ("mabn", {"r_from": 0.01}, "r_from=0.01 is out of range: expected 0.05 to 1"),
    ("mabn", {"warmup": 100}, "warmup=100 is out of range: expected 0 to 1"),
    ("mabn", {"unit": "epochs"}, "unit=epochs is not valid: expected one of fraction, steps"),
    ("powernorm", {"warmup": -1}, "warmup=-1 is out of range: expected 0 to 1"),
    ("powernorm", {"alpha": 1.0}, "alpha=1.0 is out of range: expected a number below 1"),
    ("powernorm", {"alpha_backward": 1.5}, "alpha_backward=1.5 is out of range: expected a number below 1"),
    ("gn", {"groups": 0}, "groups=0 is out of range: expected 1 or more"),
    ("evonorm_s0", {"groups": 0}, "groups=0 is out of range: expected 1 or more"),
    ("frn", {"learned_eps": 1}, "learned_eps=1 is not valid: expected true or false"),
    ("nf", {"alpha": 0.0}, "alpha=0.0 is out of range: expected a number above 0"),
    ("lp1", {"p": 3}, "p=3 is not valid: expected one of 1, 2, inf"),
    ("wn", {"init": "wieghts"}, "init=wieghts is not valid: expected one of weights, data.\nDid you mean norm.init"),
]


@pytest.mark.parametrize(("name", "options", "sentence"), REFUSED)
def test_a_value_that_an_option_cannot_have_is_refused(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        norms.named(name, **options)
    assert str(error.value).startswith(f"norm.{sentence}")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("bnmnus", {}, "Did you mean bnminus?"),
        ("renorm", {"r_max": 3.0}, "Did you mean rmax?"),
        ("gn", {"groups": 5}, "groups=5 does not divide"),
        ("bn", {"norm": 4}, "Expected one of: eps, momentum, scale_init, scale_lr_divisor."),
        ("affine", {"eps": 1e-3}, "Expected none."),
        ("bnp", {}, "it needs optimizer.precondition=bnp, which train.py has."),
        (norms.Affine(), {"eps": 1e-3}, "Affine has its options already"),
    ],
)
def test_a_mistake_is_a_sentence_with_what_would_be_right(name: Any, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        norms.rewrite(SmallNet(10), name, **options)
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) <= 5


def test_norms_alone_need_neither_hydra_nor_configuration() -> None:
    code = "import sys, normlab.norms; print({'hydra', 'omegaconf', 'pydantic', 'yaml'} & {*sys.modules})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"


def test_declarations_read_from_the_source_are_those_of_the_classes() -> None:
    ours = {
        name: found for name, found in registered(norms.Variant).items() if found[0].__module__.startswith("normlab.")
    }
    assert {name: (cls.__name__, each) for name, (cls, each) in ours.items()} == {
        name: (each.class_name, each) for name, each in DECLARED.items()
    }


def test_every_declaration_has_a_file_and_a_place_on_the_menu() -> None:
    assert set(DECLARED) == {path.stem for path in MENU.glob("*.yaml")}
    assert DECLARED["bnp"].needs == "optimizer.precondition=bnp"
    text = (ROOT / "conf" / "config.yaml").read_text()
    comment = re.search(r"((?:  #[ |\w]+\n)+)  - norm: bn ", text)
    assert comment is not None
    assert sorted(re.findall(r"\w+", comment[1])) == sorted(DECLARED)


@pytest.mark.parametrize("name", DECLARED)
def test_every_norm_declares_its_row_on_the_page_of_variants(name: str) -> None:
    row = ("family", "formula", "source", "over", "parameters", "use", "cost")
    assert [key for key in row if not getattr(DECLARED[name], key)] == []


def test_the_page_of_variants_is_made_from_the_declarations_and_the_measurements() -> None:
    page = variants.PAGE.read_text(encoding="utf-8")
    assert variants.made(page) == page, "make it anew: python scripts/variants.py"


def test_places_in_tables_and_aliases_belong_to_one_norm_each() -> None:
    assert len({each.order for each in DECLARED.values()}) == len(DECLARED)
    aliases = [alias for each in DECLARED.values() for alias in each.aliases]
    assert len(set(aliases) | set(DECLARED)) == len(aliases) + len(DECLARED)


def test_a_variant_of_ones_own_has_a_name_too() -> None:
    @register("scaled_affine", defaults={"scale": 0.25})
    class ScaledAffine(norms.Affine):
        scale: float = option(0.5, gt=0)

    assert norms.named("scaled_affine").scale == 0.25  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"norm\.scale=-1 is out of range: expected a number above 0"):
        norms.rewrite(SmallNet(10), "scaled_affine", scale=-1)
