"""Rows as runs: which rows are of one run, and what they say, each value checked."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from normlab import runs
from normlab.common.errors import UserError
from normlab.report.importing.settings import ACCURACIES, COUNTS, LARGEST, LOSSES, METRICS, Import, is_count
from normlab.report.importing.sources import Row

BLANKS = ("", "na", "n/a", "none", "null", "-", "--")  # of a metric: not measured
LONGEST = 60  # characters of a name: three of them, and what else names a folder, fit into a file system's 255
_NAME = re.compile(rf"[^<>$\\`]{{1,{LONGEST}}}")


Evaluations = dict[int | None, dict[str, float]]  # by epoch; None: at the end, as the source has none


class Record(NamedTuple):
    """A run of the source: what it says of the run's settings, and its rows with what they measured."""

    arm: str
    seed: int
    given: Mapping[str, Any]
    rows: Sequence[tuple[Row, Mapping[str, float]]]
    assumed: list[str]

    def __str__(self) -> str:
        return ", ".join([f"arm {self.arm}", f"seed {self.seed}", *(f"{k} {v}" for k, v in self.given.items())])

    @property
    def where(self) -> str:
        return self.rows[-1][0].where


def records_of(rows: Sequence[Row], name: str, wanted: Import) -> Iterator[Record]:
    given = {key: _setting(key, value, f"set={{{key}: ...}}") for key, value in (wanted.set or {}).items()}
    columns = set().union(*(row.cells for row in rows), given)
    if "arm" not in columns:
        raise UserError(
            f"{name} does not say which arm its rows are of: it has no column arm.\n"
            "Name the column, 'columns={arm: method}', or the arm of all rows, 'set={arm: mine}'."
        )
    if not columns & set(METRICS):
        raise UserError(f"{name} has no measured column.\nExpected one or more of {', '.join(METRICS)}.")
    _check_shares(rows, wanted.percent)
    _check_epochs(rows, wanted.first_epoch)
    grouped: dict[Any, list[tuple[Row, dict[str, float]]]] = defaultdict(list)
    settings_of: dict[Any, dict[str, Any]] = {}
    for row in rows:
        settings = given | {
            key: _setting(key, value, row.where)
            for key, value in row.cells.items()
            if key not in (*METRICS, "epoch", "step", "state")
        }
        if "seed" in columns and "seed" not in settings:
            raise UserError(f"{row.where} has no seed, and others have one.\nGive it one.")
        if "arm" not in settings:
            raise UserError(f"{row.where} does not say which arm it is of.\nGive it one.")
        key = json.dumps(settings, sort_keys=True)
        settings_of[key] = settings
        grouped[key].append((row, _metrics(row, wanted.percent)))
    for key, found in grouped.items():
        settings = settings_of[key]
        assumed = [] if "seed" in columns else [f"seed {settings.setdefault('seed', 0)}, as {name} has none."]
        yield Record(settings.pop("arm"), settings.pop("seed"), settings, found, assumed)


def evaluations(record: Record, *, first_epoch: int, steps_per_epoch: int | None) -> Evaluations:
    """What was measured by epoch, with its step where the source says one.

    Args:
        first_epoch: what the source calls it, 0 or 1; ours is 1.

    Raises:
        UserError: for rows without an epoch, and rows that are of one epoch with two values.
    """
    found: Evaluations = {}
    came_from: dict[tuple[int | None, str], tuple[int | None, str]] = {}
    for row, metrics in record.rows:
        step, epoch = _whole(row, "step"), _whole(row, "epoch")
        if epoch is not None:
            epoch += 1 - first_epoch
        elif step is not None:
            if not steps_per_epoch:
                raise UserError(
                    f"{row.where} says its step, and not its epoch.\n"
                    "Say how many steps an epoch has, steps_per_epoch=..., or give it a column epoch."
                )
            epoch = math.ceil(step / steps_per_epoch)  # that it is in; of several in one, the last counts
        elif not metrics and len(record.rows) > 1:
            continue  # it says nothing
        here = found.setdefault(epoch, {})
        for column, value in metrics.items():
            before, where = came_from.get((epoch, column), (None, ""))
            if where and (step is None or step == before):
                raise UserError(
                    f"{row.where}: {column} of {record} is in {where.rpartition(', ')[2]}, too.\n"
                    "Rows that are not the same need a column that tells them apart: seed, epoch, a setting."
                )
            if step is None or before is None or step > before:  # of several evaluations in an epoch, the last
                came_from[epoch, column] = step, row.where
                here[column] = value
        if step is not None:
            here["step"] = max(step, int(here.get("step", 0)))
    if None in found and len(found) > 1:
        raise UserError(f"{record.where}: some rows of {record} have an epoch or a step, others not.\nGive all one.")
    return found


def diverged(record: Record, end: Mapping[str, float], missing: str) -> bool:
    """Whether the run did.

    Args:
        end: its last evaluation.
        missing: what it lacks to be done, in words; "" if it lacks nothing.
    """
    lost = any(not math.isfinite(end[loss]) for loss in LOSSES if loss in end)
    told = [row for row, _ in record.rows if "state" in row.cells]
    told.sort(key=lambda row: (_whole(row, "epoch") or 0, _whole(row, "step") or 0))  # however the file has them
    states = [(str(row.cells["state"]).lower(), row.where) for row in told]
    for state, where in states:
        if state not in runs.FINISHED:
            raise UserError(f"{where}: state={state} is not valid: expected done or diverged.")
    if not states:
        if lost:
            record.assumed.append("runs whose last loss is not finite have diverged.")
        return lost
    state, where = states[-1]
    if lost and state == "done":
        raise UserError(f"{where}: state is done, but the last loss is not finite.\nExpected state diverged.")
    if missing and state == "done":
        raise UserError(
            f"{where}: state is done, but {missing}.\nIf the run was meant to be that short, give it a column epochs;"
            " if it was cut short, no state."
        )
    return state == "diverged"


def _metrics(row: Row, percent: bool) -> dict[str, float]:
    """What a row has measured; a loss that is not finite is kept, as it tells of divergence."""
    found = {}
    for column in METRICS:
        value = _number(row, column)
        if value is not None and value < 0 and column not in (*LOSSES, *ACCURACIES):
            raise UserError(f"{row.where}: {column}={value:g} is not valid: expected a number, 0 or more.")
        if value is not None and (column in LOSSES or math.isfinite(value)):
            found[column] = value / 100 if percent and column in ACCURACIES else value
    return found


def _number(row: Row, column: str) -> float | None:
    value = row.cells.get(column)
    if isinstance(value, str) and value.lower() in BLANKS:
        return None
    try:
        if isinstance(value, str) and "_" in value:
            raise ValueError
        return None if value is None else float(value)
    except ValueError:
        raise UserError(
            f"{row.where}: {column}={value} is not a number.\nExpected e.g. 0.93; an empty cell if it was not measured."
        ) from None


def _whole(row: Row, column: str) -> int | None:
    value = _number(row, column)
    if value is not None and not (0 <= value <= LARGEST and value == int(value)):
        raise UserError(f"{row.where}: {column}={row.cells[column]} is not valid: expected a whole number, 0 or more.")
    return None if value is None else int(value)


def _check_epochs(rows: Sequence[Row], first_epoch: int | None) -> None:
    first = next((row for row in rows if _whole(row, "epoch") == 0), None)
    if first and first_epoch is None:
        raise UserError(
            f"{first.where} is of epoch 0.\n"
            "If the first epoch is called 0, say first_epoch=0: every epoch then counts one more.\n"
            "If epoch 0 is before training and the first is called 1, say first_epoch=1."
        )


def _check_shares(rows: Sequence[Row], percent: bool) -> None:
    """Raises:
    UserError: for accuracies that look as if `percent` were the other way round.
    """
    for column in ACCURACIES:
        values = [(value, row) for row in rows if (value := _number(row, column)) is not None and math.isfinite(value)]
        for value, row in values:
            if value < 0 or value > 100:
                raise UserError(f"{row.where}: {column}={value:g} is no accuracy: expected 0 to 1, or per cent.")
            if value > 1 and not percent:
                raise UserError(
                    f"{row.where}: {column}={value:g} is above 1.\nIf the accuracies are in per cent, say percent=true."
                )
            if percent and 0 < value < 1:
                raise UserError(
                    f"{row.where}: {column}={value:g} with percent=true is less than one per cent.\n"
                    "If the accuracies are shares of 1, leave percent out. If they are a mixture of both, or rightly so"
                    " low, write all as shares of 1."
                )
        if percent and values and 0 < max(value for value, _ in values) <= 1:
            raise UserError(
                f"{values[0][1].where}: no {column} is above 1, though percent=true.\n"
                "If the accuracies are shares of 1, leave percent out."
            )


def _setting(key: str, value: Any, where: str) -> Any:
    """A setting's value as YAML would have it; equal numbers are one."""
    if key in ("arm", "dataset.name", "model.name") or (isinstance(value, str) and not isinstance(_typed(value), str)):
        value = str(value) if key in ("arm", "dataset.name", "model.name") else _typed(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {key}={value} is not valid: expected a finite number.")
    if isinstance(value, float) and value == int(value):
        value = int(value)
    if key == "seed" and not (is_count(value) or (value == 0 and not isinstance(value, bool))):
        raise UserError(f"{where}: seed={value} is not valid: expected a whole number, 0 or more.")
    if key in COUNTS and not is_count(value) and not (value is None and key in ("depth", "norm_batch")):
        raise UserError(f"{where}: {key}={value} is not valid: expected a whole number, 1 or more.")
    if isinstance(value, str) and not (_NAME.fullmatch(value) and value.isprintable()):
        shown = value[:LONGEST].encode("unicode_escape").decode() + "..." * (len(value) > LONGEST)
        raise UserError(
            f"{where}: {key}={shown} cannot be shown in tables, figures and pages alike.\n"
            f"Expected 1 to {LONGEST} characters, none of < > $ \\ ` and no control characters."
        )
    return value


def _typed(text: str) -> Any:
    words = {"true": True, "false": False, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in () if "_" in text else (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
