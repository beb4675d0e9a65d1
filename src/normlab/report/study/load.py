"""A study's records as tidy DataFrames: one row per run, one row per evaluation."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from normlab import runs
from normlab.common.errors import UserError, count, first_line, listed
from normlab.common.progress import one_line
from normlab.report.study.arms import Place, cell_key, flat_cells, in_order, is_reconstruction, places, varying
from normlab.report.study.columns import Columns, length, tidy
from normlab.report.study.find import find_study, packed_name
from normlab.report.study.index import Index
from normlab.runs import archive, lock, reading
from normlab.runs.correct import CORRECT, Correct
from normlab.runs.reading import RecordPath, damaged, shown
from normlab.runs.states import FINISHED, RECORDED, STALE_SECONDS, State

if TYPE_CHECKING:
    from normlab.report.study.tuned import Tuning

STATES = (State.DONE, State.RUNNING, State.DIVERGED, State.FAILED, State.INTERRUPTED, State.MISSING)

_PLACE = ["run", *Place._fields, "state"]
_NUMBERS = ["epochs", "wall_seconds", "peak_memory_bytes", "parameters", "classes"]
_NOT_VARIED = ("batch", "seed", "epochs", "probe", "norm._target_")  # in columns of their own, or changing no result

_SEVERAL = {  # of one kind of fault, about all runs that have it
    "unreadable": "{number} runs cannot be read and are left out: {names}. The first: {first}",
    "lines": "{number} lines of records cannot be read and are left out, of {names}. The first: {first}",
    "unfinished": (
        "{number} runs lack the evaluation after their last epoch and are left out of the tables: {names}."
        " Delete their folders and start them again."
    ),
    "provenance": "{number} runs are shown without how they were made: {names}. The first: {first}",
    "correct": "{number} runs are left out of the tables by image: {names}. The first: {first}",
    "columns": "{number} runs have columns that are left out: {names}. The first: {first}",
    "copies": "{number} folders hold the same runs as others and are left out: {names}. The first: {first}",
}
MOST_COLUMNS = 200  # names of columns of the evaluations of all runs, or of a probe's rows


@dataclass(frozen=True, repr=False)
class Study:
    """The records of a study. `results` has one row per run with what varied and what came out.

    All tables begin with the columns run (the folder's name), setting (what a table of the report is about: data set,
    network and whatever else varies), arm (the norm, with those of its options that vary), batch and seed (Int64), and
    have a column state (one of `STATES`, or "unreadable").

    Attributes:
        folder: its folder, or the file that it is packed in.
        runs: one row per run and per gap in the study's grid, whose run is "" and whose state is missing. More columns:
            note (about the state); as float64, nan where unknown: epochs (requested), wall_seconds, peak_memory_bytes,
            parameters (trainable numbers), classes.
        evaluations: one row per evaluation of a run. More columns, float64, nan where not finite: epoch (from 1), step,
            train_loss and train_accuracy (seen while training the epoch), test_loss, test_accuracy (fractions of 1),
            lr, images_per_second (of training), wall_seconds (since the run's start).
        probes: per probe (a file's name), one row per measurement. More columns: the row's own (step, layer,
            position, ...; numbers nan where not finite, lists as they are; docs/probes.md).
        configs: each run's frozen configuration, by its folder's name.
        provenance: each run's provenance (versions, hardware), likewise.
        remarks: per setting, a sentence about what varies with the batch size.
        notes: the remarks of a person, from notes.md beside the runs.
        warnings: sentences about what could not be read, and what was imported.
        correct: by run that is done, which test images it got right, where that was recorded.
        unchecked: the runs in a folder that carry no checksums, as those of versions before 0.4.0: whether their
            files were changed cannot be seen.
    """

    name: str
    folder: Path
    runs: pd.DataFrame
    evaluations: pd.DataFrame
    probes: dict[str, pd.DataFrame]
    configs: dict[str, dict[str, Any]]
    provenance: dict[str, dict[str, Any]]
    remarks: dict[str, str]
    notes: str
    warnings: list[str]
    unchecked: Sequence[str] = ()
    tuning: "Tuning | None" = None
    correct: Mapping[str, Correct] = field(default_factory=dict)

    @cached_property
    def names(self) -> dict[str, str]:
        """Return what to call each run among the others, by its folder's name."""
        return dict(zip(self.configs, runs.run_names(list(self.configs.values())), strict=True))

    def called(self, run: str) -> str:
        """Return what to call a run, with its id; one whose settings cannot be read by the name of its folder."""
        if self.tuning:
            return self.tuning.study.called(run)  # which knows those that are not chosen, too
        name = self.names.get(run)
        return f"{name} ({run.rpartition('-')[2]})" if name else run

    @cached_property
    def caveats(self) -> list[str]:
        """Return the sentences that no table or figure goes without: what was chosen, and which arms are ours."""
        sentences = [f"{self.tuning.sentence[0].upper()}{self.tuning.sentence[1:]}."] if self.tuning else []
        ours = {run for run, config in self.configs.items() if is_reconstruction(config)}
        arms = in_order(self.placed["arm"][self.placed["run"].isin(ours)])
        if arms:
            what = "are reconstructions" if len(arms) > 1 else "is a reconstruction"
            sentences.append(f"{listed(arms, len(arms))} {what} of ours, as the paper leaves open what it does [A].")
        return sentences

    @cached_property
    def packed(self) -> bool:
        """Return whether the study is in one file."""
        return not self.folder.is_dir()

    @property
    def report_folder(self) -> Path:
        """The folder of the report: report/ with the runs, report/NAME/ beside a study in one file."""
        if self.packed:
            return self.folder.parent / "report" / packed_name(Path(self.folder.name))
        return self.folder / "report"

    def reduced(self, table: pd.DataFrame, of_rows: Callable[[pd.DataFrame], pd.DataFrame]) -> "Study":
        """Return the study of the runs of `table`, with those of its measured rows that `of_rows` returns."""
        kept, probes = set(table["run"]), {probe: of_rows(rows) for probe, rows in self.probes.items()}
        return replace(
            self,
            runs=table,
            evaluations=of_rows(self.evaluations),
            probes={probe: rows for probe, rows in probes.items() if len(rows)},
            configs={run: config for run, config in self.configs.items() if run in kept},
            remarks={setting: remark for setting, remark in self.remarks.items() if setting in set(table["setting"])},
        )

    @property
    def placed(self) -> pd.DataFrame:
        """Return the rows of `runs` that have a place: all but those of unreadable configurations."""
        return self.runs.dropna(subset=["arm"])

    @property
    def finished(self) -> pd.DataFrame:
        """Return the rows of `runs` that are done or diverged."""
        return self.runs[self.runs["state"].isin(FINISHED)]

    @property
    def every(self) -> pd.DataFrame:
        """Return the rows of `runs`, and of a tuned study those of all runs that were tried, where they were."""
        if self.tuning is None:
            return self.runs
        tried, gaps_here = self.tuning.study.runs, self.runs[self.runs["run"] == ""]
        return pd.concat([tried[tried["run"] != ""], gaps_here], ignore_index=True)

    def states(self) -> dict[str, int]:
        """Return the number of runs in each state, those that were tried and gaps of the grid among them."""
        counts = self.every["state"].value_counts()
        names = [*STATES, State.UNREADABLE] if State.UNREADABLE in counts else STATES
        return {str(state): int(counts.get(state, 0)) for state in names}

    def counted(self, *, zeros: bool = False) -> str:
        """Return `states` in words: `3 done, 1 running`; "" for a study without runs."""
        return ", ".join(f"{number} {state}" for state, number in self.states().items() if number or zeros)

    def __repr__(self) -> str:
        return f"Study {self.name}: {self.counted() or 'no runs'}"

    def results(self) -> pd.DataFrame:
        """Return what varied and what came out: one row per run, for analyses of your own.

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
        cells = flat_cells(self.configs.values())
        flat = [cells[cell_key(self.configs[run])] if run in self.configs else {} for run in table["run"]]
        varied = [name for name in varying(list(cells.values())) if not name.startswith(_NOT_VARIED)]
        settings = pd.DataFrame({name: [row.get(name) for row in flat] for name in varied}, index=table.index)
        others = (*_PLACE, *_NUMBERS, "note", *varied)
        measured = [column for column in self.evaluations if column not in others]
        last = self.evaluations.drop_duplicates("run", keep="last").set_index("run")[measured]
        by_run = self.evaluations.groupby("run", sort=False)
        for column, best in (("test_accuracy", "max"), ("test_loss", "min")):
            if column in measured:
                last[f"best_{column}"] = by_run[column].agg(best)
        facts = table[["epochs", "wall_seconds", "peak_memory_bytes", "parameters", "note"]]
        return pd.concat([table[_PLACE], settings, last.reindex(table.index), facts], axis=1).reset_index(drop=True)

    def noted(self) -> list[Any]:
        """Return the rows of `every` whose state wants an explanation, as named tuples."""
        every = self.every
        return list(every[every["note"].fillna("") != ""].itertuples(index=False))


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
        study: its name, as in `python report.py study=...`, or the path of its folder or file.
        output_dir: the folder that holds studies.
        name: the study's name in the report; by default its name, or that of its folder or file.
        now: the time to judge heartbeats by, with its zone; the present by default.

    Raises:
        UserError: if there is no such study, with the nearest that there is; if its file is damaged.
    """
    own_name, path = find_study(study, Path(output_dir))
    with archive.opened(path) if path.is_file() else nullcontext(path) as folder:
        records = _Records(folder, now or datetime.now(UTC))
    in_tables, remarks = places(list(records.configs.values()))
    table = _table(records, dict(zip(records.configs, in_tables, strict=True)))
    place = table[_PLACE]
    return Study(
        name=name or own_name,
        folder=path,
        runs=table,
        evaluations=tidy(records.evaluations, place, ["run", "epoch"]),
        probes={
            probe: tidy(rows, place, ["run", "step", "layer"])
            for probe, rows in records.probes.items()
            if any(rows.values())
        },
        configs=records.configs,
        provenance=records.provenance,
        remarks=remarks,
        notes=records.notes,
        warnings=[*records.warnings(), *_imported(table, records.configs, records.provenance)],
        unchecked=records.unchecked,
        correct=records.correct,
    )


class _Records:
    """The files of a study's runs as they were read; everything by the name of a run's folder.

    Attributes:
        rows: one per run, without its place.
        probes: by probe and run.
        faults: by kind (of `_SEVERAL`) the run, and the sentence about it alone.
    """

    def __init__(self, folder: RecordPath, now: datetime) -> None:
        self.rows: list[dict[str, Any]] = []
        self.configs: dict[str, dict[str, Any]] = {}
        self.evaluations: dict[str, Columns] = {}
        self.probes: dict[str, dict[str, Columns]] = defaultdict(dict)
        self.provenance: dict[str, dict[str, Any]] = {}
        self.correct: dict[str, Correct] = {}
        self.faults: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self.notes = _notes(folder)
        self.unchecked: list[str] = []
        self._now = now
        index = Index(folder)
        for path, why in runs.scan(folder):
            name = shown(path.name)
            row: dict[str, Any] = {"run": name, "state": "missing", "note": ""}
            try:
                if why:
                    raise damaged(path, why)
                self._read_twice(path, row, index)
            except UserError as error:
                self.correct.pop(name, None)
                for found in (self.configs, self.provenance, self.evaluations, *self.probes.values()):
                    found.pop(name, None)
                self.faults["unreadable"].append((name, str(error)))
                row |= {"state": State.UNREADABLE, "note": first_line(error)}
            self.rows.append(row)
        index.write()
        for found in (self.evaluations, *self.probes.values()):
            self._leave_out_rare_columns(found)

    def _leave_out_rare_columns(self, found: dict[str, Columns]) -> None:
        """Keep the columns that most runs have: every column costs memory in every run's rows."""
        runs_with = Counter(itertools.chain.from_iterable(found.values()))
        kept = {name for name, _ in runs_with.most_common(MOST_COLUMNS)}
        for run, columns in found.items() if len(runs_with) > len(kept) else ():
            left = {name: values for name, values in columns.items() if name in kept}
            if len(left) < len(columns):
                found[run] = left
                left_out = count(len(columns) - len(left), "column")
                sentence = f"{shown(run)}: {left_out} left out, as the study's files have more than {MOST_COLUMNS}"
                self.faults["columns"].append((run, f"{sentence}."))

    def _read_twice(self, path: RecordPath, row: dict[str, Any], index: Index) -> None:
        """Read a run and complete its row: again if it cannot be read, as its files may just have been written.

        Raises:
            UserError: if one of its files is damaged, or not what the run wrote.
        """
        try:
            self._read(path, row, index)
        except UserError:
            if not isinstance(path, Path):
                raise
            self._read(path, row, index)

    def _read(self, path: RecordPath, row: dict[str, Any], index: Index) -> None:
        run = path.name
        record = runs.read_record(path)
        self.configs[run] = record.config
        self.provenance[run] = record.provenance
        row["epochs"] = record.config["epochs"]
        lines: list[tuple[str, str]] = []

        def columns(file: str) -> Columns:
            found, warnings = index.read(run, file, record)
            lines.extend((f"{run}/{file}", warning) for warning in warnings)
            return found

        for file in record.probes:
            probe = file.removeprefix(f"{runs.PROBES_FOLDER}/").removesuffix(".jsonl")
            self.probes[probe][run] = columns(file)
        self.evaluations[run] = {}
        status = record.status
        if status is not None:
            self.evaluations[run] = columns(runs.METRICS_FILE)
            row |= {key: status.get(key) for key in ("state", *_NUMBERS[1:])}
            row["note"] = _note(path, status, self._now)
            self._check(path, row)
            if record.sums is None and isinstance(path, Path):  # a packed study has digests of all its files
                self.unchecked.append(run)
        self.faults["lines"] += lines
        if record.correct and row["state"] == State.DONE:
            self._take_correct(path, record.correct)
        for file, why in record.damage.items():
            self.faults["provenance" if file == runs.PROVENANCE else "correct"].append((run, why))

    def _take_correct(self, path: RecordPath, correct: Correct) -> None:
        """Keep which images a run got right, if they come to the accuracy of its last evaluation."""
        accuracy = self.evaluations[path.name].get("test_accuracy")
        if accuracy is not None and abs(accuracy[-1] * correct.images - correct.number) < 0.01:
            self.correct[path.name] = correct
        else:
            why = f"{path / CORRECT} does not come to the accuracy of the run's last evaluation."
            self.faults["correct"].append((path.name, why))

    def _check(self, path: RecordPath, row: dict[str, Any]) -> None:
        """Mark a run of an unknown state, and one whose last evaluation is missing."""
        measured = self.evaluations[path.name]
        if row["state"] not in RECORDED:
            raise damaged(path / "status.json", f"it has the unknown state {shown(row['state'])!r}")
        if length(measured) and measured["epoch"][-1] > row["epochs"]:
            raise damaged(path / runs.METRICS_FILE, f"it has an epoch {measured['epoch'][-1]:.0f} of {row['epochs']}")
        if row["state"] == "done" and (not length(measured) or measured["epoch"][-1] != row["epochs"]):
            # An earlier epoch's accuracy must not pass for the final one.
            row["state"], row["note"] = State.UNREADABLE, "done, but its last evaluation cannot be read"
            sentence = (
                f"{path / 'metrics.jsonl'} lacks the evaluation after epoch {row['epochs']}, so the run is"
                " left out of the tables. Delete the run's folder and start the run again."
            )
            self.faults["unfinished"].append((path.name, sentence))

    def warnings(self) -> Iterator[str]:
        """Yield a sentence for each kind of fault, with the first runs that have it."""
        for kind, found in self.faults.items():
            names = list(dict.fromkeys(name for name, _ in found))
            if len(found) == 1:
                yield found[0][1]
            elif found:
                yield _SEVERAL[kind].format(number=len(found), names=listed(names, 3), first=first_line(found[0][1]))


def _notes(folder: RecordPath) -> str:
    try:
        return reading.read(folder / archive.NOTES).decode(errors="replace").strip()
    except OSError:
        return ""


def _note(path: RecordPath, status: Mapping[str, Any], now: datetime) -> str:
    state = status.get("state")
    if state == "failed":
        return one_line(status.get("error") or "no error was recorded")
    if state == "diverged" and status.get("diverged_step") is not None:
        return f"at step {status['diverged_step']}"
    if state == "running" and isinstance(path, Path):
        by = lock.holder(path)
        if by and by.gone:
            return "lost: its process is gone; the same command goes on from its checkpoint"
        silent = seconds_since(status.get("heartbeat") or status.get("started"), now)
        return f"no sign of life for {silent / 60:.0f} min" if silent > STALE_SECONDS else ""
    return ""


def seconds_since(time: object, now: datetime) -> float:
    """Return the seconds from an ISO 8601 time (UTC where it has no zone) to `now`; 0 for what is no time."""
    try:
        then = datetime.fromisoformat(str(time))
    except ValueError:
        return 0.0
    return (now - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()


def _table(records: _Records, where: Mapping[str, Place]) -> pd.DataFrame:
    """Return one row per run and per gap of the grid."""
    rows = _without_copies(records, where)
    rows = [row | where[row["run"]]._asdict() if row["run"] in where else row for row in rows]
    rows += [{**gap._asdict(), "run": "", "state": State.MISSING, "note": ""} for gap in gaps(where.values())]
    table = pd.DataFrame(rows, columns=[*_PLACE, "note", *_NUMBERS]).astype({"batch": "Int64", "seed": "Int64"})
    table[_NUMBERS] = table[_NUMBERS].apply(pd.to_numeric, errors="coerce").astype(float)
    return table


def _without_copies(records: _Records, where: Mapping[str, Place]) -> list[dict[str, Any]]:
    """Leave out copies of a run, the unfinished ones first, then those with fewer probes: one seed must count once."""

    def preference(row: Mapping[str, Any]) -> tuple[bool, int]:
        return row["state"] not in FINISHED, -len(records.configs[row["run"]].get("probe") or ())

    chosen: dict[Place, str] = {}
    for row in sorted((row for row in records.rows if row["run"] in where), key=preference):
        chosen.setdefault(where[row["run"]], row["run"])
    copies = {run: chosen[place] for run, place in where.items() if chosen[place] != run}
    records.faults["copies"] += [
        (run, f"{run} is the same run as {other} and is left out.") for run, other in copies.items()
    ]
    return [row for row in records.rows if row["run"] not in copies]


def gaps(have: Collection[Place]) -> Iterator[Place]:
    """Yield the runs that would complete each setting's grid of arms, batch sizes and seeds."""
    by_setting: dict[str, set[Place]] = defaultdict(set)
    for place in have:
        by_setting[place.setting].add(place)
    for setting, here in by_setting.items():
        arms, batches, seeds = zip(*(place[1:] for place in here), strict=True)
        grid = itertools.product({setting}, set(arms), set(batches), set(seeds))
        yield from sorted(set(itertools.starmap(Place, grid)) - here)


def _imported(
    table: pd.DataFrame, configs: Mapping[str, Mapping[str, Any]], provenance: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Yield a sentence per source that is not of our own training."""
    sources: dict[str, Counter[str]] = defaultdict(Counter)
    for run, arm in zip(table["run"], table["arm"], strict=True):
        if run in configs and configs[run]["norm"].get("imported"):
            imported = provenance[run].get("imported")
            source = imported.get("source") if isinstance(imported, Mapping) else None
            sources[str(source or "an unknown source")][arm] += 1
    for source, arms in sources.items():
        who, number = f"Arm{'s' * (len(arms) > 1)} {listed(in_order(arms), 3)}", arms.total()
        yield (
            f"{who}: {number} run{'s were' if number > 1 else ' was'} made elsewhere and imported from {source}."
            " Their initial weights and batches are not paired with others', their settings are not checked, and no"
            " verdict uses them."
        )
