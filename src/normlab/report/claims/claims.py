"""The papers' claims as objects, read from claims.yaml; `judge` tests them on the runs of a study."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from normlab.common.installation import command_name
from normlab.report.analysis.metrics import METRICS, RATES, Metric
from normlab.runs import reading

# Values that the runs of a side must have where a claim does not name the setting, so that a deliberate oddity of a
# study (batches that are not independent, statistics of test batches, a folded initialization) does not count for a
# claim about plain BN. Other values of these settings have to be named; all other settings only have to be equal
# between the sides.
ORDINARY: dict[str, Any] = {
    "init.name": ["default", "glorot", "he_fan_in", "orthogonal"],
    "sampler.name": "iid",
    "norm_batch": None,  # or as large as the batch, which is the same
    "eval_stats": "running",
    "input_norm": ["dataset", "none"],
}
ORDINARY_OPTIONS: dict[str, dict[str, Any]] = {"bn": {"norm.scale_init": 1.0, "norm.scale_lr_divisor": 1.0}}
LOWEST, HIGHEST = "lowest", "highest"
MARGIN, MARGIN_FACTOR = 1.0, 1.5  # [A] the smallest differences of interest where a claim names none: points, a factor
_DEFAULT_WEIGHTS = (1.0, -1.0, None, None)


@dataclass(frozen=True)
class Side:
    """A weighted selection of runs.

    Attributes:
        weight: the factor of the side's values in the contrast.
        where: values by dotted setting; a list means any of its values, the same one on all sides.
    """

    weight: float
    where: Mapping[str, Any]

    @property
    def norm(self) -> str:
        """Return the norm's name, or its class where runs of several names are selected by that."""
        return str(self.where.get("norm.name") or self.where["norm._target_"].rpartition(".")[2])


@dataclass(frozen=True)
class Comparison:
    """A contrast of sides and the claim's expectation of it.

    Attributes:
        reference: the value that the contrast is compared with, on the scale of the measure (a logarithm for factors).
        margin: the half width of an equality, on the same scale; 0 for the others.
        exact: whether the sides are one computation, so that differences of exactly 0 leave nothing to chance.
    """

    sides: tuple[Side, ...]
    measure: Metric
    expect: Literal["greater", "less", "equal"]
    reference: float
    margin: float
    exact: bool = False

    @property
    def in_points(self) -> bool:
        """Return whether values are percentages, so that contrasts are percentage points."""
        return self.measure.unit == "%"

    @property
    def in_factors(self) -> bool:
        """Return whether values are natural logarithms, so that contrasts are factors."""
        return self.measure.log

    @property
    def smallest(self) -> float:
        """Return the smallest difference of interest, the claim's or else ours, on the scale of the measure; or nan."""
        if self.expect == "equal":
            return self.margin
        if self.tolerates_equality:  # "not more than a point behind": what arms that are alike are away from
            return abs(self.reference)
        return MARGIN if self.in_points else math.log(MARGIN_FACTOR) if self.in_factors else math.nan

    @property
    def denies_equality(self) -> bool:
        """Return whether two sides that are alike, to within the smallest difference of interest, answer it with no.

        Of accuracies and of factors: of other measures, and of ranges of rates, we know no such difference.
        """
        weights = [side.weight for side in self.sides if side.weight]
        measured = self.measure.probe != RATES and (self.measure.diverged == "chance" or self.in_factors)
        return self.expect != "equal" and self.reference == 0 and weights == [1, -1] and measured

    @property
    def tolerates_equality(self) -> bool:
        """Return whether sides that are alike can satisfy it, as arms that have learned nothing are."""
        tolerant = {"equal": True, "greater": self.reference < 0, "less": self.reference > 0}
        return len(self.sides) > 1 and tolerant[self.expect]


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
    tuning: str
    comparisons: tuple[Comparison, ...]

    @property
    def command(self) -> str:
        """Return the command line that trains the runs of its first experiment."""
        return f"{command_name('train')} -m experiment={self.experiments[0]} budget=laptop" + (
            f" +tuning={self.tuning}" if self.tuning else ""
        )

    @property
    def citation(self) -> str:
        """Return the paper and, if known, the place in it."""
        return self.paper if self.place == "n/a" else f"{self.paper}, {self.place}"


@cache
def claims() -> tuple[Claim, ...]:
    """Return every claim, in the order of claims.yaml."""
    text = Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8")
    return tuple(parse(entry) for entry in reading.parse_yaml(text))


def parse(entry: Mapping[str, Any]) -> Claim:
    """Return the claim of one entry of claims.yaml.

    Raises:
        ValueError: if a list of values is not on every side of a comparison.
    """
    fields = {"notes": "", "any": False, "tuning": "", **entry}
    where, measure = fields.pop("where", {}), fields.pop("measure")
    fields["comparisons"] = tuple(_comparison({"measure": measure, **each}, where) for each in entry["comparisons"])
    fields["experiments"] = tuple(entry["experiments"])
    fields["free"] = frozenset(entry.get("free", ()))
    return Claim(**fields)


def _comparison(entry: Mapping[str, Any], where: Mapping[str, Any]) -> Comparison:
    measure, expect = METRICS[entry["measure"]], entry["expect"]
    sides = []
    for default, own in zip(_DEFAULT_WEIGHTS, entry["sides"], strict=False):
        settings = {**where, **own}
        sides.append(Side(float(settings.pop("weight", default)), settings))
    for key in {key for side in sides for key, value in side.where.items() if isinstance(value, list)}:
        if any(side.where.get(key) != sides[0].where.get(key) for side in sides):
            raise ValueError(f"claims.yaml: the list of values of {key} pairs equal values: it must be on every side")

    def bound(name: str) -> float:
        """Return a bound of the entry on the scale of the measure; no difference by default."""
        value = entry.get(name)
        if value is None:
            return 0.0
        return math.log(value) if measure.log else float(value)

    return Comparison(
        tuple(sides),
        measure,
        expect,
        reference=bound("to" if expect == "equal" else "than"),
        margin=bound("within"),
        exact=bool(entry.get("exact", False)),
    )
