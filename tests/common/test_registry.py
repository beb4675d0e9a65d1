"""Names and options that are declared on classes, and read from their source without importing them."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from normlab.common import registry
from normlab.common.errors import UserError
from normlab.common.registry import check_options, option, options_of, register, registered


class Base:
    size: int = option(3, ge=1, le=10)
    unit: str = option("fraction", choices=("fraction", "steps"))
    start: float = option(0.2, ge=0, unit="unit")
    end: float = option(0.4, ge="start", unit="unit")


@register("two", order=2, aliases=("second",))
@register("one", order=1, defaults={"share": 0.5})
class Derived(Base):
    size = 4  # no option any more
    share: float = option(0.1, gt=0, lt=1)
    shift: bool = option(True)
    p: int | str = option(1, choices=(1, 2, "inf"))
    any: float = option(0.0)
    much: int = option(12_345_678, ge=12_345_678)
    reach: tuple[float, ...] = option((0.5, 1.0), gt=0)
    layers: int | list[str] = option(5, names=True)
    mode: str = option("mean")


def test_a_class_has_the_options_of_its_bases_and_each_name_its_own_defaults() -> None:
    assert " ".join(options_of(Derived)) == "unit start end share shift p any much reach layers mode"
    declared = {name: declaration for name, (_, declaration) in registered(Base).items()}
    assert {name: d.options["share"].default for name, d in declared.items()} == {"one": 0.5, "two": 0.1}
    assert declared["two"].aliases == ("second",)
    assert declared["one"].class_name == "Derived"
    assert registered(int) == {}


@pytest.mark.parametrize(
    ("given", "checked"),
    [
        ({"share": 0.5, "other": "kept"}, {"share": 0.5, "other": "kept"}),
        ({"any": 1, "shift": False}, {"any": 1.0, "shift": False}),
        ({"any": "1", "share": " 1e-1 "}, {"any": 1.0, "share": 0.1}),  # quoted in YAML, or from the environment
        ({"reach": (1, "2")}, {"reach": [1.0, 2.0]}),
        ({"layers": ["a", "b"], "mode": "median"}, {"layers": ["a", "b"], "mode": "median"}),
        ({"p": float("inf")}, {"p": "inf"}),
        ({"p": 2.0}, {"p": 2}),
        ({"unit": "steps", "start": 100, "end": 100}, {"unit": "steps", "start": 100.0, "end": 100.0}),
    ],
)
def test_a_value_has_one_spelling(given: dict[str, object], checked: dict[str, object]) -> None:
    assert repr(check_options("norm", options_of(Derived), given)) == repr(checked)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"size": 0}, "norm.size=0 is out of range: expected 1 or more. Nearest valid: norm.size=1."),
        ({"size": 11}, "norm.size=11 is out of range: expected 10 or less. Nearest valid: norm.size=10."),
        ({"much": 0}, "norm.much=0 is out of range: expected 12345678 or more. Nearest valid: norm.much=12345678."),
        ({"share": 0}, "norm.share=0 is out of range: expected a number above 0."),
        ({"share": 1}, "norm.share=1 is out of range: expected a number below 1."),
        ({"mode": 1}, "norm.mode=1 is not valid: expected text."),
        ({"reach": 1}, "norm.reach=1 is not valid: expected a list, e.g. [0.5,0.75]."),
        ({"reach": []}, "norm.reach=[] is not valid: expected a list, e.g. [0.5,0.75]."),
        ({"reach": [1, 0]}, "norm.reach.1=0 is out of range: expected a number above 0."),
        ({"reach": ["a"]}, "norm.reach.0=a is not valid: expected a number."),
        ({"layers": 0}, "norm.layers=0 is neither a number of layers, 1 or more, nor a list of their names."),
        ({"start": 2}, "norm.start=2 is out of range: expected 0 to 1, a fraction of the run."),
        ({"end": 0.1}, "norm.end=0.1 is out of range: expected 0.2 to 1, a fraction of the run."),
        ({"unit": "steps", "start": 1}, "norm.end=0.4 is out of range: expected 1 or more. Nearest valid: norm.end=1."),
        ({"unit": "step"}, "norm.unit=step is not valid: expected one of fraction, steps.\nDid you mean norm.unit"),
        ({"shift": 1}, "norm.shift=1 is not valid: expected true or false."),
        ({"p": True}, "norm.p=true is not valid: expected one of 1, 2, inf."),
        ({"p": None}, "norm.p=null is not valid: expected one of 1, 2, inf."),
        ({"p": "inff"}, "norm.p=inff is not valid: expected one of 1, 2, inf.\nDid you mean norm.p=inf?"),
    ],
)  # fmt: skip
def test_another_value_is_refused_in_a_sentence(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        check_options("norm", options_of(Derived) | options_of(Base), given)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("name", "expected", "values"),
    [
        ("size", "a whole number", ("1.5", "a", 2.5, math.nan, True, None, [1])),
        ("share", "a number", ("abc", "", True, None, [1], 10**400)),
        ("share", "a finite number", (math.nan, math.inf, -math.inf, "inf")),
        ("any", "a number", ("abc", "", True, None, [1], 10**400)),
        ("any", "a finite number", (math.nan, math.inf, -math.inf, "inf")),
    ],
)
def test_a_type_is_checked_before_the_bounds(name: str, expected: str, values: tuple[object, ...]) -> None:
    for value in values:
        with pytest.raises(UserError) as error:
            check_options("norm", options_of(Derived) | options_of(Base), {name: value})
        assert str(error.value).endswith(f" is not valid: expected {expected}.")


def test_declarations_are_read_from_the_source_without_importing_it(tmp_path: Path, monkeypatch) -> None:
    text = Path(__file__).read_text()
    (tmp_path / "area").mkdir()
    (tmp_path / "area" / "a.py").write_text(
        "import nothing\n" + text[text.index('@register("two"') : text.index("\n\n\ndef ")]
    )
    (tmp_path / "area" / "b.py").write_text(text[text.index("class Base") : text.index("\n\n\n@register")])
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "common" / "registry.py"))
    monkeypatch.setattr(registry, "declarations", registry.declarations.__wrapped__)
    read = registry.declarations("area")
    assert list(read) == ["one", "two"]
    assert read == {name: declaration for name, (_, declaration) in registered(Base).items()}


def test_a_declaration_that_is_no_literal_is_refused(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "area").mkdir()
    (tmp_path / "area" / "a.py").write_text("@register('a', family=FAMILY)\nclass A: ...\n")
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "common" / "registry.py"))
    with pytest.raises(ValueError, match="malformed node"):
        registry.declarations.__wrapped__("area")


def test_the_registry_needs_no_torch() -> None:
    code = "import sys, normlab.common.registry as r; r.declarations('norms'); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"
