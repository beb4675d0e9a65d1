"""Read and write a run's folder, which is the database.

config.yaml      the frozen configuration, written before the run starts
status.json      state, host, process, heartbeat, progress, error; no file: planned, not started
metrics.jsonl    one row per evaluation
probes/*.jsonl   one row per measurement of a probe and layer (docs/probes.md)
provenance.json  versions, code, device, command
checkpoint.pt, checkpoint.previous.pt, run.log
run.lock, run.claim   while a process trains it (runs/lock.py)
"""

import json
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from normlab.common.errors import UserError, storage_error
from normlab.runs import files, lock
from normlab.runs.files import RecordPath
from normlab.runs.identity import FORMAT, completed, run_id, run_name
from normlab.runs.inside import make_own_folder
from normlab.runs.states import FINISHED, State, recorded_state

CONFIG, STATUS, METRICS_FILE, PROVENANCE = "config.yaml", "status.json", "metrics.jsonl", "provenance.json"
LOG = "run.log"
P = TypeVar("P", bound=RecordPath)
PROBES_FOLDER = "probes"
_SEED = re.compile(r"^seed: (0|[1-9]\d*)$", re.MULTILINE)  # of the outermost mapping: others are indented


class FormatError(UserError):
    """The record was written by a version of normlab that is newer than this one."""


def now() -> str:
    """Return the present in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def find(study_folder: P) -> list[P]:
    """Return the run folders of a study, by name; none of a folder that does not exist."""
    try:
        found = [path for path in study_folder.iterdir() if (path / CONFIG).exists()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=attrgetter("name"))


def read_config(folder: RecordPath) -> dict[str, Any]:
    """Return the frozen configuration, with the settings that records of its format did not have yet.

    Runs share the groups that they have in common: these are to be read only.

    Raises:
        FormatError: if it is of a format that this version does not know.
        UserError: if the file is damaged.
    """
    path = folder / CONFIG
    config = files.read_yaml(path, _config)
    found = config.get("format", FORMAT)
    if found not in range(1, FORMAT + 1):
        raise FormatError(
            f"{path} is a record of format {found}, and this version of normlab reads up to format {FORMAT}.\n"
            "Use the version that wrote it, or a newer one: pip install --upgrade normlab."
        )
    return {key: value for key, value in config.items() if key != "format"}


def _config(text: str) -> Any:
    """Parse runs that differ in nothing but their seed once: a study has far fewer cells than runs."""
    seed = _SEED.search(text)
    if seed:
        config = _parsed(f"{text[: seed.start(1)]}0{text[seed.end(1) :]}")
        if isinstance(config, dict) and config.get("seed") == 0:
            return config | {"seed": int(seed[1])}
    return _parsed(text)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Any:
    value = files.parse_yaml(text)
    return completed(value) if isinstance(value, dict) else value


def read_status(folder: RecordPath) -> dict[str, Any] | None:
    """Return the status, or None for a run that was planned and has not started.

    A run that was running when its study was packed into one file is interrupted there.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / STATUS
    try:
        status = files.read_json(path)
    except UserError:  # rather than to look for it first, which would cost a report of ten thousand runs as much again
        if path.exists():
            raise
        return None
    if status.get("state") == State.RUNNING and not isinstance(folder, Path):
        status["state"] = State.INTERRUPTED
    return status


def read_provenance(folder: RecordPath) -> dict[str, Any]:
    """Return what is recorded of how a run was made; nothing if it cannot be read: the record can do without.

    Equal ones share their parts: they are to be read only.
    """
    try:
        return _provenance((folder / PROVENANCE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}


@lru_cache(maxsize=256)
def _provenance(text: bytes) -> dict[str, Any]:
    value = json.loads(text)
    return value if isinstance(value, dict) else {}


def read_metrics(folder: RecordPath) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the evaluations that can be read, and a sentence about each line that cannot."""
    return read_rows(folder / METRICS_FILE)


def read_probes(folder: RecordPath) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Return the rows that can be read by probe, and a sentence about each line that cannot."""
    found, warnings = {}, []
    for path in probe_files(folder):
        found[path.stem], complaints = read_rows(path)
        warnings += complaints
    return found, warnings


def probe_files(folder: P) -> list[P]:
    """Return the files of rows of a run's probes, by name."""
    try:
        found = list((folder / PROBES_FOLDER).iterdir())  # of ten thousand runs: a glob takes five times as long
    except OSError:
        return []
    return sorted((path for path in found if path.name.endswith(".jsonl")), key=attrgetter("name"))


def read_rows(path: RecordPath) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of a file of metrics or of a probe, and a sentence about each line that cannot be read."""
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return [], []
    needed = ("epoch", "step") if path.name == METRICS_FILE else ("step",)
    lines = text.removesuffix("\n")
    try:  # all lines at once, which takes half the time
        rows = json.loads(f"[{lines.replace(chr(10), ',')}]")
    except (ValueError, RecursionError):
        rows = []
    if len(rows) == lines.count("\n") + 1 and _are_rows(rows, needed):
        return rows, []
    rows, warnings = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line)
            if not _are_rows([row], needed):
                raise ValueError(f"not a row of {path.stem}")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            warnings.append(f"{path}, line {number} cannot be read and is left out: {error}.")
    return rows, warnings


def _are_rows(values: Sequence[Any], needed: Sequence[str]) -> bool:
    """Return whether all are mappings with whole numbers where they are needed."""
    return set(map(type, values)) <= {dict} and all(
        {type(value.get(key)) for value in values} <= {int, bool} for key in needed
    )


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(files.to_json(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise storage_error(path, error) from error


def _rewrite(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(files.to_json(row) + "\n" for row in rows)
    files.write_atomically(path, lambda file: file.write(text.encode()))


class Run:
    """One run on disk. Reading needs no lock; writing is for the process that holds `lock()`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self.run_id = run_id(config)
        self.name = run_name(config)
        self.folder = Path(config["output_dir"]) / config["study"] / self.name
        self._claim: lock.RunClaim | None = None

    @property
    def state(self) -> State:
        """The state that status.json records: planned where there is none, failed where it is damaged."""
        try:
            status = read_status(self.folder)
        except UserError:
            return State.FAILED
        return recorded_state(status) or State.FAILED if status is not None else State.PLANNED

    @property
    def over(self) -> bool:
        """Return whether nothing is left to do, not even the removal of a killed process's claim."""
        return self.state in FINISHED and not (self.folder / lock.CLAIM).exists()

    def freeze(self) -> None:
        """Write the configuration, so that later edits of YAML cannot leak into this run.

        One that is there and describes this run stays as it is; a damaged one is replaced.

        Raises:
            FormatError: if there is one of a format that this version does not know.
            UserError: if the folder cannot be written.
        """
        make_own_folder(self.folder, self.folder.parent)
        try:
            written = run_id(read_config(self.folder))
        except FormatError:
            raise
        except (UserError, KeyError, AttributeError, TypeError, ValueError):  # not there, or not of a run
            written = ""
        if written != self.run_id:
            files.write_yaml(self.folder / CONFIG, {"format": FORMAT, **self.config})

    @contextmanager
    def lock(self, wait_seconds: float = 0) -> Iterator[None]:
        """Hold the run for this process (see `runs.lock`); nothing is written once it is lost.

        Raises:
            RunBusyError: if another process holds it; from a write, if another one has taken it over.
            UserError: if the folder cannot be written.
        """
        make_own_folder(self.folder, self.folder.parent)
        with lock.held(self.folder, wait_seconds) as self._claim:
            try:
                yield
            finally:
                self._claim = None

    def _verify(self) -> None:
        if self._claim:
            self._claim.verify()

    def write_status(self, state: str, *, durable: bool = True, **facts: Any) -> dict[str, Any]:
        """Replace status.json and return it; every fact not given again is kept."""
        self._verify()
        try:
            before = read_status(self.folder) or {}
        except UserError:
            before = {}
        status = {
            "state": state,
            "run_id": self.run_id,
            "name": self.name,
            "started": None,
            "ended": None,
            "error": None,
            **before,
            **facts,
            "heartbeat": now(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        status["state"] = state
        files.write_json(self.folder / STATUS, status, durable=durable)
        return status

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one evaluation to metrics.jsonl."""
        self._verify()
        _append(self.folder / METRICS_FILE, [row])

    def append_probe(self, probe: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append the rows of one measurement to a probe's file."""
        self._verify()
        files.make_folder(self.folder / PROBES_FOLDER)
        _append(self.folder / PROBES_FOLDER / f"{probe}.jsonl", rows)

    def keep_rows_until(self, evaluated: int, step: int) -> list[str]:
        """Drop the rows that a resumed run measures again, and lines that cannot be read.

        Args:
            evaluated: evaluations after this step are dropped.
            step: rows of probes from this step (0-based) on are dropped.

        Returns:
            A sentence about each damaged line.
        """
        rows, warnings = read_metrics(self.folder)
        kept = [row for row in rows if row["step"] <= evaluated]
        if warnings or rows:  # if all are kept, too: the last may lack the end of its line
            _rewrite(self.folder / METRICS_FILE, kept)
        probes, complaints = read_probes(self.folder)
        for probe, rows in probes.items():
            kept = [row for row in rows if row["step"] < step]
            _rewrite(self.folder / PROBES_FOLDER / f"{probe}.jsonl", kept)
        return warnings + complaints
