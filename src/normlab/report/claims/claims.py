"""The papers' claims, as data: claims.yaml read into objects. `verdicts` judges them against a study."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from normlab.common.installation import command_name
from normlab.report.analysis.metrics import METRICS, Metric

# What a side's runs have where a claim does not say otherwise, so that a deliberate oddity of a study (batches that are
# not independent, statistics of test batches, a folded start) does not speak to a claim about plain BN. Other values of
# these, and all other settings, have to be named; else they only have to be equal between the sides.
ORDINARY: dict[str, Any] = {
    "init.name": ["default", "glorot", "he_fan_in", "orthogonal"],
    "sampler.name": "iid",
    "norm_batch": None,  # or as large as the batch, which is the same
    "eval_stats": "running",
    "input_norm": ["dataset", "none"],
}
ORDINARY_OPTIONS: dict[str, dict[str, Any]] = {"bn": {"norm.scale_init": 1.0, "norm.scale_lr_divisor": 1.0}}
LOWEST, HIGHEST = "lowest", "highest"


@dataclass(frozen=True)
class Side:
    """A weighted selection of runs. `where` has dotted settings; a list means any of its values, equal on all sides."""

    weight: float
    where: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A contrast of sides and what is expected of it.

    Attributes:
        reference: in the measure's own terms (a logarithm for factors): what the contrast is compared with.
        margin: of an equality; 0 for the others.
        exact: whether the sides are one computation, so that differences of exactly 0 leave nothing to chance.
    """

    sides: tuple[Side, ...]
    measure: Metric
    expect: Literal["greater", "less", "equal"]
    reference: float
    margin: float
    exact: bool = False

    @property
    def lenient(self) -> bool:
        """Whether it is about sides that are alike, or one not much worse: so may be arms that have learned nothing."""
        close = {"equal": True, "greater": self.reference < 0, "less": self.reference > 0}
        return len(self.sides) > 1 and close[self.expect]


@dataclass(frozen=True)
class Claim:
    """An entry of claims.yaml, which explains the fields."""

    id: str
    sentence: str
    paper: str
    place: str
    number: str
    experiments: tuple[str, ...]
    notes: str
    free: frozenset[str]
    any: bool
    comparisons: tuple[Comparison, ...]

    @property
    def command(self) -> str:
        """What runs it."""
        return f"{command_name('train')} -m experiment={self.experiments[0]} budget=laptop"


@cache
def claims() -> tuple[Claim, ...]:
    """Every claim, in the file's order."""
    text = Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8")
    return tuple(parse(entry) for entry in yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def parse(entry: Mapping[str, Any]) -> Claim:
    """One entry of claims.yaml."""
    rest = dict(entry)
    where, measure = rest.pop("where", {}), rest.pop("measure")
    read = {
        "comparisons": tuple(_comparison({"measure": measure, **found}, where) for found in rest["comparisons"]),
        "experiments": tuple(rest["experiments"]),
        "free": frozenset(rest.get("free", ())),
    }
    return Claim(**{"notes": "", "any": False, **rest, **read})


def _comparison(entry: Mapping[str, Any], where: Mapping[str, Any]) -> Comparison:
    measure, expect = METRICS[entry["measure"]], entry["expect"]
    sides = []
    for weight, found in zip((1.0, -1.0, None, None), entry["sides"], strict=False):
        side = {**where, **found}
        sides.append(Side(float(side.pop("weight", weight)), side))
    for key, values in ((key, value) for side in sides for key, value in side.where.items() if isinstance(value, list)):
        if any(side.where.get(key) != values for side in sides):
            raise ValueError(f"claims.yaml: {key}={values} pairs runs of equal values, so it has to be on every side")

    def own(name: str, default: float) -> float:
        value = entry.get(name)
        return default if value is None else math.log(value) if measure.log else float(value)

    return Comparison(
        tuple(sides),
        measure,
        expect,
        reference=own("to" if expect == "equal" else "than", 0.0),
        margin=own("within", 0.0),
        exact=bool(entry.get("exact", False)),
    )
