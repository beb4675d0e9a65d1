"""A study's folder as tidy DataFrames: one row per run, one row per evaluation."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from normlab import runs
from normlab.errors import UserError
from normlab.report.arms import Place, places

STATES = ("done", "running", "diverged", "failed", "interrupted", "missing")
UNREADABLE = "unreadable"  # a run whose files are damaged: counted apart, part of no mean
FINISHED = ("done", "diverged")
STALE_SECONDS = 120  # a running run writes a heartbeat more often than this

_RUN_COLUMNS = [
    "run", "setting", "arm", "batch", "seed", "state", "note", "epochs",
    "wall_seconds", "peak_memory_bytes", "parameters",
]  # fmt: skip
_PLACE = ["setting", "arm", "batch", "seed"]


@dataclass(frozen=True)
class Study:
    """What a study's folder holds.

    Attributes:
        runs: one row per run and per gap in the study's grid. Columns: run (the folder's name, "" for a
            gap), setting, arm, batch, seed, state, note (about the state), epochs, wall_seconds,
            peak_memory_bytes, parameters.
        evaluations: one row per evaluation of a run. Columns: run, setting, arm, batch, seed, state, and
            what the run measured (epoch, step, train_loss, test_accuracy, ...; nan where not finite).
        configs: each run's frozen configuration, by its folder's name.
        provenance: each run's provenance (versions, hardware), likewise.
        remarks: per setting, a sentence about what varies with the batch size.
        warnings: sentences about what could not be read.
    """

    name: str
    folder: Path
    runs: pd.DataFrame
    evaluations: pd.DataFrame
    configs: dict[str, dict[str, Any]]
    provenance: dict[str, dict[str, Any]]
    remarks: dict[str, str]
    warnings: list[str]

    def states(self) -> dict[str, int]:
        """Number of runs in each state, gaps of the grid among the missing."""
        counts = self.runs["state"].value_counts()
        names = [*STATES, UNREADABLE] if UNREADABLE in counts else STATES
        return {state: int(counts.get(state, 0)) for state in names}


def load(study_folder: Path | str, name: str | None = None, now: datetime | None = None) -> Study:
    """Read every run of a study. A damaged file costs its own run only, and leaves a warning.

    Args:
        now: the time to judge heartbeats by, with its zone; the present by default.
    """
    folder = Path(study_folder)
    now = now or datetime.now(UTC)
    configs: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    evaluations: list[pd.DataFrame] = []
    warnings: list[str] = []
    for path in runs.find(folder):
        try:
            configs[path.name] = _config(path)
        except UserError as error:
            warnings.append(str(error))
            rows.append({"run": path.name, "state": UNREADABLE, "note": _first_line(error)})
            continue
        row, measured, complaints = _read(path, configs[path.name], now)
        rows.append(row)
        evaluations += [pd.DataFrame(measured).assign(run=path.name)] if measured else []
        warnings += complaints

    found, remarks = places(list(configs.values()))
    where = dict(zip(configs, found, strict=True))
    table = pd.DataFrame([row | _placed(where.get(row["run"])) for row in rows], columns=_RUN_COLUMNS)
    table, complaints = _without_twins(table)
    table = pd.concat([table, *_gaps(table)], ignore_index=True)
    table = table.astype({"batch": "Int64", "seed": "Int64"})
    return Study(
        name=name or folder.name,
        folder=folder,
        runs=table,
        evaluations=_tidy(evaluations, table),
        configs=configs,
        provenance={run: _provenance(folder / run) for run in configs},
        remarks=remarks,
        warnings=warnings + complaints,
    )


def _config(path: Path) -> dict[str, Any]:
    config = runs.read_config(path)
    if not (
        isinstance(config.get("norm"), dict)
        and "name" in config["norm"]
        and isinstance(config.get("batch"), int)
        and isinstance(config.get("seed"), int)
    ):
        raise UserError(
            f"{path / 'config.yaml'} lacks norm.name, batch or seed; its run is left out of the tables.\n"
            "Delete the run's folder and start the run again."
        )
    return config


def _read(
    path: Path, config: Mapping[str, Any], now: datetime
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """One run: its row, its evaluations and what there is to complain about."""
    row: dict[str, Any] = {"run": path.name, "state": "missing", "note": "", "epochs": config.get("epochs")}
    try:
        status = runs.read_status(path)
    except UserError as error:
        return row | {"state": UNREADABLE, "note": _first_line(error)}, [], [str(error)]
    if status is None:
        return row, [], []
    measured, warnings = runs.read_metrics(path)
    row |= {key: status.get(key) for key in ("wall_seconds", "peak_memory_bytes", "parameters")}
    row["state"], row["note"] = status.get("state"), _note(status, now)
    if row["state"] not in STATES:
        row["note"] = f"{path / 'status.json'} has the unknown state {row['state']!r}"
        row["state"] = UNREADABLE
    last_epoch = measured[-1].get("epoch") if measured else None
    if row["state"] == "done" and last_epoch != config.get("epochs"):
        # An earlier epoch's accuracy must not pass for the final one.
        row["state"], row["note"] = UNREADABLE, "done, but its last evaluation cannot be read"
        warnings.append(
            f"{path / 'metrics.jsonl'} lacks the evaluation after epoch {config.get('epochs')}, so the run is"
            " left out of the tables. Delete the run's folder and start the run again."
        )
    return row, measured, warnings


def _note(status: Mapping[str, Any], now: datetime) -> str:
    if status.get("state") == "failed":
        return _first_line(status.get("error") or "no error was recorded")
    if status.get("state") == "diverged" and status.get("diverged_step") is not None:
        return f"at step {status['diverged_step']}"
    if status.get("state") == "running":
        silent = _seconds_since(status.get("heartbeat") or status.get("started"), now)
        return f"no sign of life for {silent / 60:.0f} min" if silent > STALE_SECONDS else ""
    return ""


def _seconds_since(moment: object, now: datetime) -> float:
    try:
        then = datetime.fromisoformat(str(moment))
    except ValueError:
        return 0.0
    return (now - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _placed(place: Place | None) -> dict[str, Any]:
    return place._asdict() if place else {}


def _without_twins(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Leave out copies of a run: one seed must count once."""
    best_first = table.assign(rank=table["state"].map(lambda state: state not in FINISHED))
    best_first = best_first.sort_values("rank", kind="stable")
    twins = best_first["arm"].notna() & best_first.duplicated(_PLACE)
    names = sorted(best_first.loc[twins, "run"])
    complaints = [f"{name} has the same settings and seed as another run and is left out." for name in names]
    return table[~table["run"].isin(names)], complaints


def _gaps(table: pd.DataFrame) -> list[pd.DataFrame]:
    """The runs that would complete each setting's grid of arms, batch sizes and seeds."""
    gaps = []
    for setting, group in table.groupby("setting"):
        have = set(zip(group["arm"], group["batch"], group["seed"], strict=True))
        grid = itertools.product(*(group[key].unique() for key in ("arm", "batch", "seed")))
        absent = [{"arm": a, "batch": b, "seed": s} for a, b, s in grid if (a, b, s) not in have]
        if absent:
            gaps.append(pd.DataFrame(absent).assign(setting=setting, run="", state="missing", note=""))
    return gaps


def _tidy(evaluations: list[pd.DataFrame], table: pd.DataFrame) -> pd.DataFrame:
    if not evaluations:
        return pd.DataFrame(columns=["run", *_PLACE, "state", "epoch"])
    every = pd.concat(evaluations, ignore_index=True)
    measured = every.drop(columns="run").apply(pd.to_numeric, errors="coerce")
    every = pd.concat([every["run"], measured], axis=1)
    # A run that went on from a checkpoint may have evaluated an epoch twice: the later row counts.
    every = every.drop_duplicates(["run", "epoch"], keep="last")
    return (
        table[["run", *_PLACE, "state"]]
        .merge(every, on="run")
        .sort_values(["run", "epoch"], ignore_index=True)
    )


def _provenance(path: Path) -> dict[str, Any]:
    """A run's provenance, or nothing: the report can do without."""
    try:
        found = json.loads((path / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
