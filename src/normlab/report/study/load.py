"""A study's folder as tidy DataFrames: one row per run, one row per evaluation."""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from normlab import runs
from normlab.common.errors import UserError
from normlab.report.study.arms import Place, but_for_the_seed, flatten, places, varying
from normlab.report.study.find import holds_runs, study_folder
from normlab.report.study.index import TEXTS, Columns, Index, length
from normlab.runs import lock
from normlab.runs.states import FINISHED, STALE_SECONDS, State

STATES = (State.DONE, State.RUNNING, State.DIVERGED, State.FAILED, State.INTERRUPTED, State.MISSING)

_RUN_COLUMNS = [
    "run", "setting", "arm", "batch", "seed", "state", "note", "epochs",
    "wall_seconds", "peak_memory_bytes", "parameters", "classes",
]  # fmt: skip


_PLACE = ["run", *Place._fields, "state"]
_REST = ["epochs", "wall_seconds", "peak_memory_bytes", "parameters", "note"]
_NOT_VARIED = ("batch", "seed", "epochs", "probe", "norm._target_")  # in columns of their own, or changing no result


@dataclass(frozen=True, repr=False)
class Study:
    """What a study's folder holds. `results` has one row per run with what varied and what came out.

    All tables begin with the columns run (the folder's name), setting (what a table of the report is about: data set,
    network and whatever else varies), arm (the norm, with those of its options that vary), batch and seed (Int64), and
    have a column state (one of `STATES`, or "unreadable").

    Attributes:
        runs: one row per run and per gap in the study's grid, whose run is "" and whose state is missing. More columns:
            note (about the state); as float64, nan where unknown: epochs (asked for), wall_seconds, peak_memory_bytes,
            parameters (trainable numbers), classes.
        evaluations: one row per evaluation of a run. More columns, float64, nan where not finite: epoch (from 1), step,
            train_loss and train_accuracy (seen while training the epoch), test_loss, test_accuracy (fractions of 1),
            lr, images_per_second (of training), wall_seconds (since the run's start).
        probes: per probe (a file's name), one row per measurement. More columns: the row's own (step, layer,
            position, ...; numbers nan where not finite, lists as they are; docs/probes.md).
        configs: each run's frozen configuration, by its folder's name.
        provenance: each run's provenance (versions, hardware), likewise.
        remarks: per setting, a sentence about what varies with the batch size.
        warnings: sentences about what could not be read, and what was imported.
    """

    name: str
    folder: Path
    runs: pd.DataFrame
    evaluations: pd.DataFrame
    probes: dict[str, pd.DataFrame]
    configs: dict[str, dict[str, Any]]
    provenance: dict[str, dict[str, Any]]
    remarks: dict[str, str]
    warnings: list[str]

    def states(self) -> dict[str, int]:
        """Number of runs in each state, gaps of the grid among the missing."""
        counts = self.runs["state"].value_counts()
        names = [*STATES, State.UNREADABLE] if State.UNREADABLE in counts else STATES
        return {str(state): int(counts.get(state, 0)) for state in names}

    def __repr__(self) -> str:
        told = ", ".join(f"{number} {state}" for state, number in self.states().items() if number)
        return f"Study {self.name}: {told or 'no runs'}"

    def results(self) -> pd.DataFrame:
        """What varied and what came out: one row per run, for analyses of your own.

        Columns:
            run, setting, arm, batch, seed, state: as in `runs`.
            every setting that differs between runs, by its name on the command line (norm.name, optimizer.lr, ...); of
                mixed types as objects, None where a run has no such setting. Not those that are marked (*) in
                conf/config.yaml, nor probes: they change no result.
            epoch, step, train_loss, train_accuracy, test_loss, test_accuracy, lr, images_per_second: float64, of the
                last evaluation. Of a run whose state is not done, that is not its end.
            best_test_accuracy, best_test_loss: of all evaluations, chosen on the test set and so optimistic.
            epochs, wall_seconds, peak_memory_bytes, parameters, note: as in `runs`.
        """
        table = self.runs[self.runs["run"] != ""].set_index("run", drop=False)
        of_cell = {run: but_for_the_seed(config) for run, config in self.configs.items()}
        cells = {cell: self.configs[run] for run, cell in of_cell.items()}  # far fewer than runs
        flat = {cell: flatten(runs.completed(runs.identity(config))) for cell, config in cells.items()}
        varied = [name for name in varying(list(flat.values())) if not name.startswith(_NOT_VARIED)]
        settings = pd.DataFrame(
            {name: [flat.get(of_cell.get(run), {}).get(name) for run in table["run"]] for name in varied},
            index=table.index,
        )
        measured = [column for column in self.evaluations if column not in (*_PLACE, "wall_seconds")]
        last = self.evaluations.drop_duplicates("run", keep="last").set_index("run")[measured]
        by_run = self.evaluations.groupby("run", sort=False)
        for column, best in (("test_accuracy", "max"), ("test_loss", "min")):
            if column in measured:
                last[f"best_{column}"] = by_run[column].agg(best)
        return pd.concat([table[_PLACE], settings, last.reindex(table.index), table[_REST]], axis=1).reset_index(
            drop=True
        )

    def noted(self) -> list[Any]:
        """The rows of runs whose state wants an explanation, as named tuples."""
        return list(self.runs[self.runs["note"].fillna("") != ""].itertuples(index=False))


def load(
    study: Path | str,
    output_dir: Path | str = "outputs",
    *,
    name: str | None = None,
    now: datetime | None = None,
) -> Study:
    """Read every run of a study. A damaged file costs its own run only, and leaves a warning.

    Configurations and provenances that are equal share their parts: they are to be read only.

    Args:
        study: its name, as in `python report.py study=...`, or the path of its folder.
        output_dir: the folder that holds studies.
        name: what the study is called; by default its name, or its folder's.
        now: the time to judge heartbeats by, with its zone; the present by default.

    Raises:
        UserError: if there is no such study, with the nearest that there is.
    """
    folder = Path(study)
    if isinstance(study, str) and (holds_runs(Path(output_dir) / study) or not holds_runs(folder)):
        folder, name = study_folder(study, Path(output_dir)), name or study
    elif not holds_runs(folder):
        raise UserError(f"The folder {folder} holds no runs.\nGive a study's name, or the folder that its runs are in.")
    now = now or datetime.now(UTC)
    configs: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    measured: dict[str, Columns] = {}
    probed: dict[str, dict[str, Columns]] = defaultdict(dict)
    warnings: list[str] = []
    index = Index(folder)
    for path in runs.find(folder):
        try:
            configs[path.name] = _config(path)
        except UserError as error:
            warnings.append(str(error))
            rows.append({"run": path.name, "state": State.UNREADABLE, "note": first_line(error)})
            continue
        row, evaluations, complaints = _read(path, configs[path.name], now, index)
        rows.append(row)
        measured[path.name] = evaluations
        warnings += complaints
        for file in runs.probe_files(path):
            probed[file.stem][path.name], complaints = index.read(path.name, f"{runs.PROBES}/{file.name}")
            warnings += complaints
    index.write()

    found, remarks = places(list(configs.values()))
    where = dict(zip(configs, found, strict=True))
    rows, complaints = _without_twins(
        rows, where, {run: len(config.get("probe") or ()) for run, config in configs.items()}
    )
    table = pd.DataFrame(
        [row | (where[row["run"]]._asdict() if row["run"] in where else {}) for row in rows]
        + [{**gap._asdict(), "run": "", "state": "missing", "note": ""} for gap in _gaps(where.values())],
        columns=_RUN_COLUMNS,
    )
    table = table.astype({"batch": "Int64", "seed": "Int64"})
    numbers = ["epochs", "wall_seconds", "peak_memory_bytes", "parameters", "classes"]
    table[numbers] = table[numbers].apply(pd.to_numeric, errors="coerce").astype(float)
    provenance = {run: _provenance(folder / run) for run in configs}
    return Study(
        name=name or folder.name,
        folder=folder,
        runs=table,
        evaluations=_tidy(measured, table, ["run", "epoch"]),
        probes={
            probe: _tidy(rows, table, ["run", "step", "layer"]) for probe, rows in probed.items() if any(rows.values())
        },
        configs=configs,
        provenance=provenance,
        remarks=remarks,
        warnings=[*warnings, *complaints, *_imported(table, configs, provenance)],
    )


def _config(path: Path) -> dict[str, Any]:
    config = runs.read_config(path)
    if not (
        all(isinstance(config.get(group), dict) and "name" in config[group] for group in ("norm", "model", "dataset"))
        and isinstance(config.get("batch"), int)
        and isinstance(config.get("seed"), int)
    ):
        raise UserError(
            f"{path / 'config.yaml'} lacks settings of a run (norm.name, model, dataset, batch, seed).\n"
            "Move the run's folder away and start the run again."
        )
    return config


def _read(
    path: Path, config: Mapping[str, Any], now: datetime, index: Index
) -> tuple[dict[str, Any], Columns, list[str]]:
    """One run: its row, its evaluations and what there is to complain about."""
    row: dict[str, Any] = {"run": path.name, "state": "missing", "note": "", "epochs": config.get("epochs")}
    try:
        status = runs.read_status(path)
    except UserError as error:
        return row | {"state": State.UNREADABLE, "note": first_line(error)}, {}, [str(error)]
    if status is None:
        return row, {}, []
    measured, warnings = index.read(path.name, runs.METRICS)
    row |= {key: status.get(key) for key in ("wall_seconds", "peak_memory_bytes", "parameters", "classes")}
    row["state"], row["note"] = status.get("state"), _note(path, status, now)
    if row["state"] not in STATES:
        row["note"] = f"{path / 'status.json'} has the unknown state {row['state']!r}"
        row["state"] = State.UNREADABLE
    if row["state"] == "done" and (not measured or measured["epoch"][-1] != config.get("epochs")):
        # An earlier epoch's accuracy must not pass for the final one.
        row["state"], row["note"] = State.UNREADABLE, "done, but its last evaluation cannot be read"
        warnings.append(
            f"{path / 'metrics.jsonl'} lacks the evaluation after epoch {config.get('epochs')}, so the run is"
            " left out of the tables. Delete the run's folder and start the run again."
        )
    return row, measured, warnings


def _note(path: Path, status: Mapping[str, Any], now: datetime) -> str:
    if status.get("state") == "failed":
        return first_line(status.get("error") or "no error was recorded")
    if status.get("state") == "diverged" and status.get("diverged_step") is not None:
        return f"at step {status['diverged_step']}"
    if status.get("state") == "running":
        by = lock.holder(path)
        if by and by.gone:
            return "lost: its process is gone; the same command goes on from its checkpoint"
        silent = seconds_since(status.get("heartbeat") or status.get("started"), now)
        return f"no sign of life for {silent / 60:.0f} min" if silent > STALE_SECONDS else ""
    return ""


def seconds_since(moment: object, now: datetime) -> float:
    """Seconds from an ISO 8601 time (UTC where it has no zone) to `now`; 0 for what is no time."""
    try:
        then = datetime.fromisoformat(str(moment))
    except ValueError:
        return 0.0
    return (now - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()


def first_line(error: object) -> str:
    """A record of any kind as one line, empty for an empty one."""
    return (str(error).strip().splitlines() or [""])[0]


def _without_twins(
    rows: list[dict[str, Any]], where: Mapping[str, Place], probes: Mapping[str, int]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Leave out copies of a run, the unfinished ones first, then those with fewer probes: one seed must count once."""
    chosen: dict[Place, str] = {}
    for row in sorted(rows, key=lambda row: (row["state"] not in FINISHED, -probes.get(row["run"], 0))):
        if row["run"] in where:
            chosen.setdefault(where[row["run"]], row["run"])
    kept = [row for row in rows if row["run"] not in where or chosen[where[row["run"]]] == row["run"]]
    twins = [(run, chosen[place]) for run, place in where.items() if chosen[place] != run]
    return kept, [f"{run} is the same run as {other} and is left out." for run, other in twins]


def _gaps(have: Collection[Place]) -> Iterator[Place]:
    """The runs that would complete each setting's grid of arms, batch sizes and seeds."""
    by_setting: dict[str, set[Place]] = defaultdict(set)
    for place in have:
        by_setting[place.setting].add(place)
    for setting, here in by_setting.items():
        arms, batches, seeds = ({place[i] for place in here} for i in range(1, 4))
        grid = (Place(setting, *cell) for cell in itertools.product(arms, batches, seeds))  # type: ignore[arg-type]
        yield from sorted(set(grid) - here)


def _tidy(measured: Mapping[str, Columns], table: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    """The rows of all runs, each with its run's place and state; by the key, of whose equals the last one is kept."""
    files = [columns for columns in measured.values() if columns]
    names = list(dict.fromkeys(itertools.chain.from_iterable(files))) or key[1:]
    texts = [name for name in names if any(isinstance(columns.get(name), list) for columns in files)]
    of_numbers = [name for name in names if name not in texts]
    numbers = np.empty((len(of_numbers), sum(map(length, files))))  # one block, as pandas works quickest with
    for row, name in zip(numbers, of_numbers, strict=True):
        np.concatenate([np.empty(0), *_parts(name, files)], out=row)
    every = pd.DataFrame(numbers.T, columns=of_numbers, copy=False)
    for name in texts:
        every.insert(names.index(name), name, _texts(name, files))
    position = {run: i for i, run in enumerate(table["run"])}
    of_runs = [position.get(run, -1) for run in measured]
    order = pd.DataFrame({"run": np.repeat(np.array(of_runs, int), [length(rows) for rows in measured.values()])})
    order = order.assign(**{name: every[name] for name in key if name in every})
    # A run that went on from a checkpoint may have measured a moment twice: the later row counts. Twins are left out.
    if -1 in of_runs or not _ascend(order):
        order = order[order["run"] >= 0].drop_duplicates(keep="last").sort_values([*order])
        every = every.loc[order.index].reset_index(drop=True)
    places_and_states = table[["run", *Place._fields, "state"]].iloc[order["run"]].reset_index(drop=True)
    return pd.concat([places_and_states, every], axis=1)


def _ascend(order: pd.DataFrame) -> bool:
    """Whether the rows are in order as they are, none of them twice: the usual case, and quickly told."""
    if len(order.columns) > 2:
        return False
    run, moment = order.to_numpy().T
    return bool(((np.diff(run) > 0) | (np.diff(run) == 0) & (np.diff(moment) > 0)).all())


def _parts(name: str, files: Sequence[Columns]) -> list[Any]:
    """A column of each file, nan where it has none."""
    return [columns[name] if name in columns else np.full(length(columns), np.nan) for columns in files]


def _texts(name: str, files: Sequence[Columns]) -> pd.Series:
    """Of a column that is not all numbers: itself if it holds lists or is known to hold texts, else its numbers."""
    values = pd.Series(list(itertools.chain.from_iterable(_parts(name, files))))
    if name in TEXTS or any(isinstance(value, list) for value in values):
        return values
    return pd.to_numeric(values, errors="coerce").astype(float)


def _imported(
    table: pd.DataFrame, configs: Mapping[str, Mapping[str, Any]], provenance: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """A sentence per arm and source that is not of our own training."""
    there = [(run, arm) for run, arm in zip(table["run"], table["arm"], strict=True) if run in configs]
    found = Counter(
        (arm, (provenance[run].get("imported") or {}).get("source", "an unknown source"))
        for run, arm in there
        if configs[run]["norm"].get("imported")
    )
    for (arm, source), number in found.items():
        yield (
            f"Arm {arm}: {number} run{'s were' if number > 1 else ' was'} made elsewhere and imported from {source}."
            " Their initial weights and batches are not paired with others', their settings are not checked, and no"
            " verdict uses them."
        )


@lru_cache(maxsize=256)
def _provenance_of(text: bytes) -> dict[str, Any]:
    found = json.loads(text)
    return found if isinstance(found, dict) else {}


def _provenance(path: Path) -> dict[str, Any]:
    """A run's provenance, or nothing: the report can do without."""
    try:
        return _provenance_of((path / runs.PROVENANCE).read_bytes())
    except (OSError, ValueError):
        return {}
