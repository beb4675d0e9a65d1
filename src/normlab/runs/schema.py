"""What the files of a run may hold: every value that is read from a record has passed one of these.

Numbers have bounds beyond which no run gets; what a run could not measure is null. `check` turns a mapping into a
sentence where it does not hold. Rows of metrics and probes, of which there are many, have a table of bounds of their
own: whole columns are compared with it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from normlab.runs import reading
from normlab.runs.reading import shown

LARGEST = 2**53  # up to which whole numbers are exact wherever the report puts them
MOST_EPOCHS = 10**9
MOST_SECONDS = 1e10
LONGEST_NAME = 300  # characters
MOST_COLUMNS = 100  # names of a file of rows
MOST_CLASSES = 30_000  # of a data set
MOST_IN_LIST = 10_000  # of a list in a row of a probe
PLACE = ("run", "setting", "arm", "batch", "seed", "state")  # columns of every table, which no row has


_Text = Annotated[str, Field(max_length=10_000)]
_PRINTABLE = r"^[^\p{C}\p{Zl}\p{Zp}]*$"
_Line = Annotated[str, Field(max_length=LONGEST_NAME, pattern=_PRINTABLE)]
_Word = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
_Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME, pattern=_PRINTABLE)]
_Count = Annotated[int, Field(ge=0, le=LARGEST)]
_Seconds = Annotated[float, Field(ge=0, le=MOST_SECONDS)]
_Number = Annotated[float, Field(ge=-reading.LARGEST_NUMBER, le=reading.LARGEST_NUMBER)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Class = Annotated[tuple[_Name, _Count], Field(strict=False)]
_Sum = Annotated[tuple[_Count, Annotated[str, Field(pattern="^[0-9a-f]{8}$")]], Field(strict=False)]  # JSON has lists


class _Part(BaseModel):
    """Part of a record: what it does not name may be there, and is not used."""

    model_config = ConfigDict(strict=True, extra="ignore", defer_build=True)


class Claim(_Part):
    """run.claim (`lock.Holder`)."""

    host: _Line
    machine: _Text
    pid: Annotated[int, Field(ge=0, lt=2**31)]
    started: Annotated[str, Field(max_length=LONGEST_NAME)]
    job: _Line
    restarts: _Count
    token: Annotated[str, Field(max_length=LONGEST_NAME)]


class Status(_Part):
    """status.json. Its names are checked together, which takes a tenth of the time: every run has one."""

    _names: ClassVar = ("run_id", "name", "started", "ended", "heartbeat", "host", "job", "weights_sha256")

    state: Annotated[str, Field(max_length=LONGEST_NAME)]
    run_id: _Word | None = None
    name: _Word | None = None
    started: _Word | None = None
    ended: _Word | None = None
    heartbeat: _Word | None = None
    error: Annotated[str, Field(max_length=1_000_000)] | None = None
    doing: _Text | None = None
    host: _Word | None = None
    job: _Word | None = None
    pid: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    processes: _Count | None = None
    epoch: Annotated[int, Field(ge=0, le=MOST_EPOCHS)] | None = None
    epochs: Annotated[int, Field(ge=0, le=MOST_EPOCHS)] | None = None
    step: _Count | None = None
    steps: _Count | None = None
    diverged_step: _Count | None = None
    parameters: _Count | None = None
    classes: _Count | None = None
    peak_memory_bytes: _Count | None = None
    wall_seconds: _Seconds | None = None
    capture_seconds: _Seconds | None = None
    images_per_second: Annotated[float, Field(ge=0, le=reading.LARGEST_NUMBER)] | None = None
    train_loss: _Number | None = None
    test_loss: _Number | None = None
    train_accuracy: _Share | None = None
    test_accuracy: _Share | None = None
    weights_sha256: _Word | None = None
    files: dict[_Word, _Sum] | None = Field(None, max_length=1000)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        texts = {name: getattr(self, name) or "" for name in self._names}
        if not "".join(texts.values()).isprintable():
            odd = next(name for name, text in texts.items() if not text.isprintable())
            raise ValueError(f"{odd} is {texts[odd]!r}: it has characters that cannot be shown")
        return self


class Correct(_Part):
    """correct.json (`correct.Correct`)."""

    order: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    classes: Annotated[list[_Class], Field(min_length=1, max_length=MOST_CLASSES)]
    correct: Annotated[str, Field(max_length=reading.MOST_BYTES_OF_FILE)]


class _Git(_Part):
    commit: _Name | None = None
    diff: str | None = None


class _Imported(_Part):
    source: _Name | None = None


class _Segment(_Part):
    versions: dict[_Name, _Name | None] | None = Field(None, max_length=100)
    git: _Git | None = None
    command: list[_Text] | None = Field(None, max_length=10_000)
    platform: _Text | None = None
    device: _Name | None = None
    host: _Name | None = None
    threads: _Count | None = None
    cores: _Count | None = None
    processes: _Count | None = None
    memory_format: _Name | None = None
    packed: bool | None = None
    own_code: dict[_Name, dict[str, Any] | None] | None = None
    data: dict[str, Any] | None = None
    data_fingerprint: _Name | None = None
    value_range: Any = None
    imported: _Imported | None = None
    until_step: _Count | None = None
    run: _Name | None = None


class Provenance(_Segment):
    """provenance.json."""

    earlier: list[_Segment] | None = Field(None, max_length=1000)


class _Named(_Part):
    name: _Name


class _Norm(_Named):
    imported: bool | None = None


_Whole = Annotated[int, Field(ge=0, lt=2**63)]
_Group = dict[str, Any] | None


class Config(_Part):
    """What the report needs of config.yaml."""

    norm: _Norm
    model: _Named
    dataset: _Named
    batch: _Whole
    seed: _Whole
    norm_batch: _Whole | None = None
    depth: _Whole | None = None
    epochs: Annotated[int, Field(ge=1, le=MOST_EPOCHS)]
    study: _Text | None = None
    probe: dict[str, dict[str, Any] | None] | None = None
    init: _Group = None
    sampler: _Group = None
    optimizer: _Group = None
    schedule: _Group = None


def fault(kind: type[BaseModel], value: object) -> str:
    """Return what is wrong with a value by its schema, with the place: `epoch is -1: ...`; "" if nothing is."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            return f"{shown(place)} is missing"
        if first["type"] == "string_pattern_mismatch":
            first["msg"] = "it has characters that cannot be shown"
        if not place:
            return first["msg"].removeprefix("Value error, ")
        found = shown(repr(first["input"])[:60])
        return f"{shown(place)} is {found}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return ""


# ---- rows


class Bounds(NamedTuple):
    """The numbers that a column may have, and whether each row has one."""

    low: float = -reading.LARGEST_NUMBER  # what is not finite is null in a row
    high: float = reading.LARGEST_NUMBER
    whole: bool = False
    needed: bool = False

    @property
    def words(self) -> str:
        """Return what is expected, for a sentence."""
        kind = "a whole number" if self.whole else "a number"
        ends = {
            (True, True): f" from {self.low:g} to {self.high:g}",
            (True, False): f", {self.low:g} or more",
            (False, True): f", {self.high:g} or less",
            (False, False): "",
        }
        limits = self.low > -reading.LARGEST_NUMBER, self.high < reading.LARGEST_NUMBER
        return kind + ends[limits] + ("" if self.needed else ", or null")


_STEP = Bounds(0, LARGEST, whole=True, needed=True)
_ANY, _ACCURACY = Bounds(), Bounds(0, 1)
EVALUATION = {
    "epoch": Bounds(0, MOST_EPOCHS, whole=True, needed=True),  # 0: of imported runs, before training
    "step": _STEP,
    **{f"{images}_accuracy": _ACCURACY for images in ("train", "val", "test")},
    "task": Bounds(1, MOST_COLUMNS, whole=True),
    **{f"task_{number}_accuracy": _ACCURACY for number in range(1, MOST_COLUMNS)},
    "images_per_second": Bounds(0),
    "wall_seconds": Bounds(0, MOST_SECONDS),
}
MEASUREMENT = {"step": _STEP, "position": Bounds(0, LARGEST, whole=True)}
TEXT = "layer"  # the column of a probe that has texts
_COLUMN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,59}")


def columns_fit(columns: Mapping[str, Sequence[Any]], *, probe: bool) -> bool:
    """Return whether all rows of a file fit, given by column: quick, as files have thousands."""
    table = MEASUREMENT if probe else EVALUATION
    if not all(name in columns for name, bounds in table.items() if bounds.needed) or len(columns) > MOST_COLUMNS:
        return False
    for name, values in columns.items():
        if name not in _fitting and not _is_column(name):
            return False
        kinds, bounds = set(map(type, values)), table.get(name, _ANY)
        if kinds <= _NUMBERS and (kinds == _WHOLE or not bounds.whole):
            if not _within(values, bounds):
                return False
        elif not all(_cell_fits(value, name, bounds, probe=probe) for value in values):
            return False
    if probe and "histogram" in columns:
        edges = columns.get("edges", [None] * len(columns["histogram"]))
        if not all(map(_is_histogram, columns["histogram"], edges)):
            return False
    return all(_ascend(columns[name]) for name in (("step",) if probe else ("step", "epoch")))


def _is_histogram(counts: Any, edges: Any) -> bool:
    """Return whether counts and edges of bins go together; both are null where there is no histogram."""
    if counts is None or edges is None:
        return counts is edges
    if not (isinstance(counts, list) and isinstance(edges, list)) or None in counts or None in edges:
        return False
    return bool(counts) and len(edges) == len(counts) + 1 and min(counts) >= 0 and edges == sorted(set(edges))


def _within(values: Sequence[float], bounds: Bounds) -> bool:
    if bounds is _ANY:
        try:
            if math.hypot(*values) <= bounds.high:  # a third of the time
                return True
        except OverflowError:  # a whole number that no float holds
            return False
    return bounds.low <= min(values) and max(values) <= bounds.high


_NUMBERS, _WHOLE = {float, int}, {int}
_fitting: set[str] = {*EVALUATION, *MEASUREMENT, TEXT}


def _ascend(values: Sequence[Any]) -> bool:
    return tuple(sorted(values)) == values  # quicker than to compare each pair


def _is_column(name: str) -> bool:
    return bool(_COLUMN.fullmatch(name)) and name not in PLACE


def _cell_fits(value: Any, name: str, bounds: Bounds, *, probe: bool) -> bool:
    kind = type(value)
    if kind is int or kind is float:
        return (kind is int or not bounds.whole) and bounds.low <= value <= bounds.high
    if kind is NoneType:
        return not bounds.needed
    if not probe or bounds is not _ANY:
        return False
    if kind is list:
        numbers = [each for each in value if each is not None]
        if len(value) > MOST_IN_LIST or not set(map(type, numbers)) <= _NUMBERS:
            return False
        return not numbers or (bounds.low <= min(numbers) and max(numbers) <= bounds.high)
    return kind is bool or (kind is str and len(value) <= LONGEST_NAME and value.isprintable())


def row_fault(row: object, *, probe: bool) -> str:
    """Return what is wrong with a row of a probe, or of metrics; "" if it fits."""
    if not isinstance(row, dict):
        return "it is no mapping"
    table = MEASUREMENT if probe else EVALUATION
    missing = [name for name, bounds in table.items() if bounds.needed and name not in row]
    if missing:
        return f"it lacks {missing[0]}"
    if len(row) > MOST_COLUMNS:
        return f"it has more than {MOST_COLUMNS} values"
    for name, value in row.items():
        if not _is_column(name):
            return f"{shown(name)!r} is no name of a column"
        bounds = table.get(name, _ANY)
        if not _cell_fits(value, name, bounds, probe=probe):
            expected = "a number, a name, or a list of numbers" if probe and bounds is _ANY else bounds.words
            return f"{name} is {shown(repr(value)[:60])}: expected {expected}"
    if probe and not _is_histogram(row.get("histogram"), row.get("edges")):
        return "histogram and edges are not counts and the edges of their bins"
    return ""


def order_fault(row: Mapping[str, Any], before: Mapping[str, Any] | None, *, probe: bool) -> str:
    """Return a fault if a row goes back behind the one before it; "" if not."""
    for name in ("step",) if probe else ("step", "epoch"):
        if before and row[name] < before[name]:
            return f"{name} is {row[name]}, after {before[name]}"
    return ""
