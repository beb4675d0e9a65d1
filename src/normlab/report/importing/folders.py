"""Runs as folders: what the source does not say is taken from the study, and all are written or none."""

import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from normlab import runs
from normlab.common.errors import UserError
from normlab.report.importing.records import Evaluations, Record, diverged, evaluations
from normlab.report.importing.settings import METRICS, Import, some
from normlab.report.study.arms import OF_THE_ARM, flatten, natural
from normlab.runs import files
from normlab.runs.folder import CONFIG, STATUS
from normlab.runs.identity import CARRIED_OUT

NEEDED = ("dataset.name", "model.name", "batch", "epochs")


class Made(NamedTuple):
    """A run's folder in waiting; `by_source`: the source's last epoch stands for the number of epochs."""

    name: str
    config: dict[str, Any]
    status: dict[str, Any]
    rows: list[dict[str, Any]]
    provenance: dict[str, Any]
    by_source: bool


@dataclass(frozen=True)
class Trained:
    """A cell of runs that the study has trained: their settings, without the arm's own, and one of their folders."""

    settings: dict[str, Any]
    folder: Path

    def at(self, key: str) -> Any:
        node: Any = self.settings
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node


def trained(study_folder: Path) -> list[Trained]:
    found: dict[str, Trained] = {}
    for path in runs.find(study_folder):
        try:
            config = runs.read_config(path)
            if config["norm"].get("imported"):
                continue
            settings = runs.completed(runs.identity(config))
        except (UserError, KeyError, AttributeError, TypeError):
            continue  # a damaged run tells nothing; the report says so
        for key in ("norm", "norm_batch", "seed", "probe", *CARRIED_OUT):
            settings.pop(key, None)
        own = [key.partition(".")[2] for key in OF_THE_ARM if key.startswith("optimizer.")]
        if isinstance(settings.get("optimizer"), Mapping):
            settings["optimizer"] = {k: v for k, v in settings["optimizer"].items() if k not in own}
        found.setdefault(json.dumps(settings, sort_keys=True, default=str), Trained(settings, path))
    return list(found.values())


def _like(trained: Sequence[Trained], given: Mapping[str, Any]) -> list[Trained]:
    """Those of the study's cells that have what is given, as far as any has; without the groups that none has."""
    like = list(trained)
    for key, value in sorted(given.items(), key=lambda item: not item[0].endswith(".name")):
        same = [cell for cell in like if cell.at(key) == value]
        if same:
            like = same
        elif key.endswith(".name"):
            gone = {key.removesuffix(".name"), *(["depth"] if key == "model.name" else [])}
            like = [Trained({k: v for k, v in c.settings.items() if k not in gone}, c.folder) for c in like]
    return like


def _agreed(nodes: Sequence[Mapping[str, Any]], prefix: str = "") -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What all have with one value; and, by dotted name, the values of what they have not."""
    same: dict[str, Any] = {}
    others: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for node in nodes for key in node):
        values = [node.get(key) for node in nodes]
        if all(isinstance(value, Mapping) and value for value in values):
            same[key], differing = _agreed(values, f"{prefix}{key}.")  # type: ignore[arg-type]
            name = f"{prefix}{key}.name"
            others |= {name: differing[name]} if name in differing else differing  # its options follow from it
        elif all(key in node and value == values[0] for node, value in zip(nodes, values, strict=True)):
            same[key] = values[0]
        else:
            others[f"{prefix}{key}"] = [value for i, value in enumerate(values) if value not in values[:i]]
    return same, others


def _steps_per_epoch(like: Sequence[Trained], given: Mapping[str, Any]) -> int | None:
    """Of the study's own runs on the same data with the same batch size, if they have one number."""
    found = set()
    for cell in like:
        if cell.at("batch") != given.get("batch", cell.at("batch")) or "dataset" not in cell.settings:
            return None
        rows, _ = runs.read_metrics(cell.folder)
        found.add(rows[-1]["step"] / rows[-1]["epoch"] if rows and rows[-1]["epoch"] else None)
    number = found.pop() if len(found) == 1 else None
    return int(number) if number and number >= 1 and number == int(number) else None


def complete(
    records: Sequence[Record], trained: Sequence[Trained], source: str, study: str, wanted: Import
) -> list[Made]:
    """The runs with all that a run's folder holds.

    Args:
        trained: what the study has trained, from which settings are taken that the source does not say.

    Raises:
        UserError: naming the settings that neither says, and what is wrong with a run.
    """
    found = [_in_epochs(record, trained, wanted) for record in records]
    last_epochs: dict[Hashable, int] = defaultdict(int)  # of the runs that are alike but for arm, batch and seed
    last_steps: dict[Hashable, float] = defaultdict(float)  # of those alike but for arm and seed
    for record, by_epoch, _ in found:
        kind, of_a_batch = _kind(record, "batch"), _kind(record)
        last_epochs[kind] = max(last_epochs[kind], *(epoch or 0 for epoch in by_epoch))
        last_steps[of_a_batch] = max(last_steps[of_a_batch], *(row.get("step", 0) for row in by_epoch.values()))
    made: dict[str, Made] = {}
    missing: dict[str, str] = {}
    for record, by_epoch, per_epoch in found:
        given, last = dict(record.given), last_epochs[_kind(record, "batch")]
        if "epochs" not in given and last > 0:
            given["epochs"] = last
            record.assumed.append(f"epochs={last}, the last of {source}.")
        same, others = _agreed([cell.settings for cell in _like(trained, given)])
        settings = _merged(same, given)
        for key, values in others.items():
            if key not in given:
                missing[key] = (
                    f"{key} (the study's own runs differ: {some(sorted(map(_shown, values), key=natural), 4)})"
                )
        missing = {key: key for key in NEEDED if key not in flatten(settings)} | missing
        if missing:
            continue
        taken = [key for key in flatten(same) if key not in given]
        rows = _in_time(by_epoch, settings["epochs"], per_epoch, record)
        in_steps = not any("epoch" in row.cells for row, _ in record.rows)
        by_source = "epochs" in given and "epochs" not in record.given
        run = _make(record, settings, taken, rows, source, last_steps[_kind(record)] if in_steps else 0, by_source)
        if run.name in made:
            raise UserError(f"{record.where}: {record} is the same run as another one of {source}.\nRemove one.")
        made[run.name] = run
    if missing:
        example = ", ".join(f"{key}: ..." for key in list(missing)[:4])
        raise UserError(
            f"{source} does not say {some(list(missing.values()))}."
            + ("" if trained else f"\nStudy {study} has no runs of its own to take it from.")
            + f"\nGive what holds for all rows: 'set={{{example}}}'; what differs: a column of that name."
        )
    return list(made.values())


def _kind(record: Record, *but: str) -> Hashable:
    """What the runs that are alike have in common: all that is given of them, but for these settings."""
    return json.dumps({key: value for key, value in record.given.items() if key not in but}, sort_keys=True)


def _in_epochs(record: Record, trained: Sequence[Trained], wanted: Import) -> tuple[Record, Evaluations, int | None]:
    """The record with its evaluations, and the steps per epoch if they are known."""
    per_epoch = wanted.steps_per_epoch
    if not per_epoch and not all({"epoch", "step"} <= set(row.cells) for row, _ in record.rows):
        per_epoch = _steps_per_epoch(_like(trained, record.given), record.given)
        if per_epoch:
            record.assumed.append(f"{per_epoch} steps per epoch, as the study's own runs of this batch size have.")
    return (
        record,
        evaluations(record, first_epoch=1 if wanted.first_epoch != 0 else 0, steps_per_epoch=per_epoch),
        per_epoch,
    )


def _in_time(by_epoch: Evaluations, epochs: int, steps_per_epoch: int | None, record: Record) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, which need an epoch and a step."""
    rows = []
    for epoch, measured in sorted((epochs if epoch is None else epoch, row) for epoch, row in by_epoch.items()):
        step = measured.get("step", epoch * (steps_per_epoch or 1))
        rows.append({"epoch": epoch, "step": step, **{key: measured[key] for key in METRICS if key in measured}})
    if not steps_per_epoch and not all("step" in row for row in by_epoch.values()):
        record.assumed.append("one step per epoch, as nothing says how many; it matters to axes of figures only.")
    return rows


def _make(
    record: Record,
    settings: dict[str, Any],
    taken: Sequence[str],
    rows: list[dict[str, Any]],
    source: str,
    last_step: float,
    by_source: bool,
) -> Made:
    """The run; `last_step` is that of the longest of the runs like this, where epochs are worked out from steps."""
    epochs, last, end = settings["epochs"], rows[-1]["epoch"], rows[-1]
    if last > epochs:
        raise UserError(f"{record.where}: {record} has an epoch {last}, and epochs={epochs}.")
    missing = f"its last epoch is {last} of {epochs}" if last < epochs else ""
    if not missing and end["step"] < last_step:
        missing = f"its last step is {end['step']:g}, others' {last_step:g}"
    state = "diverged" if diverged(record, end, missing) else "interrupted" if missing else "done"
    lost = [name for name in ("test_accuracy", "test_loss") if name not in end and any(name in row for row in rows)]
    if state == "done" and (lost or not set(end) & set(METRICS)):
        raise UserError(
            f"{record.where}: {record} has no {lost[0] if lost else 'measured value'} at its last epoch, {last}."
            "\nRuns are compared by their last evaluation. If it diverged, say so: a column state with diverged."
        )
    if state == "interrupted":
        before = f"epoch {epochs}" if last < epochs else f"step {last_step:g}"
        record.assumed.append(f"runs that end before {before} were interrupted, and are part of no mean.")
    for group in ("dataset", "model"):
        if not any(
            key.startswith(f"{group}.") for key in taken
        ):  # by its kind, the report knows how many classes it has
            settings[group] = {"kind": settings[group]["name"], **settings[group]}
    config = {
        "study": "",
        "seed": record.seed,
        **settings,
        "norm": {**settings.get("norm", {}), "name": record.arm, "imported": True},
        "depth": settings.get("depth"),
        "norm_batch": settings.get("norm_batch"),
    }
    if taken:
        groups = dict.fromkeys(key.partition(".")[0] for key in taken)
        record.assumed.append(f"as the study's own runs have it: {', '.join(groups)} (listed in provenance.json).")
    name = runs.run_name(config)
    status = {"state": state, "run_id": runs.run_id(config), "name": name, "error": None, **end, "epochs": epochs}
    imported = {"source": source, "sha256": record.rows[0][0].sha256, "time": runs.now(), "by_source": by_source}
    provenance = {"imported": {**imported, "assumed": record.assumed, "taken_over": list(taken)}}
    return Made(name, config, status, rows, provenance, by_source)


def _merged(same: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in same.items()}
    for path, value in given.items():
        *groups, key = path.split(".")
        node = merged
        for group in groups:
            node[group] = dict(node[group]) if isinstance(node.get(group), Mapping) else {}
            node = node[group]
        node[key] = value
    return merged


def against_the_disk(
    made: Sequence[Made], folder: Path, source: str, *, replace: bool
) -> tuple[list[Made], list[Made], list[str]]:
    """The runs that are not there yet, those that are there with other values, and the folders of the latter."""
    new: list[Made] = []
    changed: list[Made] = []
    gone: list[str] = []
    grown = _by_all_but_epochs(folder) if any(run.by_source for run in made) else {}
    for run in made:
        there = folder / run.name
        if not there.exists():
            # A source that has grown since: the number of epochs, which is part of a run's name, was its last one.
            shorter = grown.get(_but_for_epochs(run.config), []) if run.by_source else []
            gone += shorter
            (changed if shorter else new).append(run)
            continue
        try:
            trained = not runs.read_config(there)["norm"].get("imported")
            rows, warnings = runs.read_metrics(there)
            status = runs.read_status(there) or {}
        except (UserError, KeyError, AttributeError, TypeError):
            trained, rows, warnings, status = not _says_imported(there), [], ["damaged"], {}
        if trained:
            raise UserError(f"{there} is no imported run, and is left alone.\nMove it away to import {source}.")
        if warnings or rows != _as_written(run.rows) or status.get("state") != run.status["state"]:
            changed.append(run)
            gone.append(run.name)
    if changed and not replace:
        raise UserError(
            f"{len(changed)} of {len(made)} runs of {source} are in {folder} with other values, e.g."
            f"\n  {gone[0]}\nNothing was written. To replace them: replace=true"
        )
    return new, changed, gone


def _by_all_but_epochs(folder: Path) -> dict[str, list[str]]:
    """Folders of imported runs that took their number of epochs from their source, by their other settings."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in runs.find(folder):
        try:
            config, made = runs.read_config(path), files.read_json(path / runs.PROVENANCE)["imported"]
            if config["norm"].get("imported") and made.get("by_source"):
                found[_but_for_epochs(config)].append(path.name)
        except (UserError, KeyError, AttributeError, TypeError):
            continue  # trained here, or damaged
    return found


def _but_for_epochs(config: Mapping[str, Any]) -> str:
    return json.dumps({**runs.identity(config), "epochs": None}, sort_keys=True, default=str)


def _says_imported(folder: Path) -> bool:
    try:
        return "imported" in files.read_json(folder / runs.PROVENANCE)
    except UserError:
        return False


def _as_written(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [json.loads(files.to_json(row)) for row in rows]


def write(made: Sequence[Made], folder: Path, gone: Sequence[str] = ()) -> None:
    """All or none: each folder appears as a whole; those that are `gone` are removed when all are in their place."""
    if not made:
        return
    files.make_folder(folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".import.") as temporary:
            new, old = Path(temporary) / "new", Path(temporary) / "old"
            old.mkdir()
            for run in made:
                path = new / run.name
                files.make_folder(path)
                files.write_yaml(path / CONFIG, run.config)
                files.write_json(path / runs.PROVENANCE, run.provenance)
                lines = "".join(files.to_json(row) + "\n" for row in run.rows).encode()
                files.write_atomically(path / runs.METRICS, _writer(lines))
                files.write_json(path / STATUS, run.status)
            try:
                for name in gone:
                    (folder / name).rename(old / name)
                for run in made:
                    (new / run.name).rename(folder / run.name)
            except BaseException:  # also Ctrl-C
                for run in made:
                    if not (new / run.name).exists():
                        shutil.rmtree(folder / run.name, ignore_errors=True)
                for path in old.iterdir():
                    path.rename(folder / path.name)
                raise
    except OSError as error:
        raise files.storage_error(folder, error) from error


def _writer(content: bytes) -> Callable[[Any], object]:
    return lambda file: file.write(content)


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
