"""Write a run's folder, which is the database; runs/record.py reads it.

config.yaml      the frozen configuration, written before the run starts
status.json      state, host, process, heartbeat, progress, error; no file: planned, not started
metrics.jsonl    one row per evaluation
probes/*.jsonl   one row per measurement of a probe and layer (docs/probes.md)
correct.json     which test images a run that is done got right (runs/correct.py)
provenance.json  versions, code, device, command
checkpoint.pt, checkpoint.previous.pt, run.log
run.lock, run.claim   while a process trains it (runs/lock.py)
"""

import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from normlab.common.errors import UserError, storage_error
from normlab.runs import files, lock, reading, sums
from normlab.runs.correct import CORRECT
from normlab.runs.identity import FORMAT, run_id, run_name
from normlab.runs.inside import make_own_folder
from normlab.runs.naming import run_names
from normlab.runs.record import (
    CONFIG,
    PROBES_FOLDER,
    PROVENANCE,
    STATUS,
    FormatError,
    check,
    probe_files,
    read_config,
    read_metrics,
    read_probes,
    read_status,
)
from normlab.runs.rows import METRICS_FILE
from normlab.runs.states import FINISHED, State, recorded_state

LOG = "run.log"


def now() -> str:
    """Return the present in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _append(path: Path, text: str) -> None:
    try:
        with files.open_to_append(path) as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise storage_error(path, error) from error


def _as_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(files.to_json(row) + "\n" for row in rows)


def write_record(
    folder: Path, config: Mapping[str, Any], status: Mapping[str, Any], provenance: Mapping[str, Any], metrics: bytes
) -> None:
    """Write the record of a run that was carried out elsewhere; its status has the run's id.

    Raises:
        UserError: if the folder cannot be written.
    """
    files.make_folder(folder)
    own = str(status["run_id"])
    files.write_yaml(folder / CONFIG, {"format": FORMAT, "run_id": own, **config})
    files.write_json(folder / PROVENANCE, provenance)
    files.write_atomically(folder / METRICS_FILE, lambda file: file.write(metrics))
    written = {name: sums.sum_of(reading.contents(folder / name), own) for name in (CONFIG, PROVENANCE, METRICS_FILE)}
    content = sums.sealed({**status, "files": written}, own)
    files.write_atomically(folder / STATUS, lambda file: file.write(content))


class Run:
    """One run on disk. Reading needs no lock; writing is for the process that holds `lock()`.

    Attributes:
        name: of its folder.
    """

    def __init__(self, config: Mapping[str, Any], title: str = "") -> None:
        self.config = dict(config)
        self._title = title
        self.run_id = run_id(config)
        self.name = run_name(config)
        self.folder = Path(config["output_dir"]) / config["study"] / self.name
        self._claim: lock.RunClaim | None = None
        self._sums: dict[str, sums.Sum] | None = None  # of its files, while this process writes them

    @property
    def title(self) -> str:
        """What to call the run beside the others of its sweep; by default what a run by itself is called."""
        return self._title or run_names([self.config])[0]

    @title.setter
    def title(self, title: str) -> None:
        self._title = title

    @property
    def state(self) -> State:
        """The state that status.json records: planned where there is none, failed where it is damaged.

        A finished run whose files are not what it wrote has failed, too: a sweep carries it out again.
        """
        try:
            status = read_status(self.folder)
        except UserError:
            return State.FAILED
        if status is None:
            return State.PLANNED
        state = recorded_state(status) or State.FAILED
        return State.FAILED if state in FINISHED and check(self.folder) else state

    @property
    def over(self) -> bool:
        """Return whether nothing is left to do, not even the removal of a killed process's claim."""
        return self.state in FINISHED and not reading.is_there(self.folder / lock.CLAIM)

    def freeze(self) -> None:
        """Write the configuration, so that later edits of YAML cannot leak into this run.

        One that is there and describes this run stays as it is; one that is damaged, or that the run's checksums say
        was changed, is replaced.

        Raises:
            FormatError: if there is one of a format that this version does not know.
            UserError: if the folder cannot be written, or it leads elsewhere (`runs.inside`).
        """
        make_own_folder(self.folder, self.folder.parent)
        try:
            written = run_id(read_config(self.folder)) == self.run_id and not self._config_fault()
        except FormatError:
            raise
        except (UserError, KeyError, AttributeError, TypeError, ValueError):  # not there, or not of a run
            written = False
        if not written:
            files.write_yaml(self.folder / CONFIG, {"format": FORMAT, "run_id": self.run_id, **self.config})

    def _config_fault(self) -> str:
        """Return what is wrong with the configuration by the run's checksums; "" if there are none."""
        try:
            recorded = sums.recorded(read_status(self.folder))
        except UserError:
            return ""
        content = reading.contents(self.folder / CONFIG)
        return sums.fault(recorded.get(CONFIG), content, self.run_id, whole=True) if recorded is not None else ""

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
                self._claim = self._sums = None

    def _verify(self) -> None:
        if self._claim:
            self._claim.verify()

    def write_status(self, state: str, *, durable: bool = True, **facts: Any) -> dict[str, Any]:
        """Replace status.json and return it; every fact not given again is kept.

        Its checksums are those of the files that this process has written, else those that the status had.
        """
        self._verify()
        try:
            before = read_status(self.folder) or {}
        except UserError:
            before = {}
        if self._sums is None:
            own = {name: each for name, each in (sums.recorded(before) or {}).items() if name != CONFIG}
            written = {CONFIG: self._sum_now(CONFIG), **own} if own or not before else self._sums_now()
        else:
            written = self._sums
        named = {"state": state, "run_id": self.run_id, "name": self.name}
        status = named | {"started": None, "ended": None, "error": None} | before | facts | named
        status |= {"heartbeat": now(), "host": socket.gethostname(), "pid": os.getpid()}
        for name in ("files", "checksum"):  # they come last
            status.pop(name, None)
        status["files"] = {name: [*each] for name, each in written.items()}
        content = sums.sealed(status, self.run_id)
        files.write_atomically(self.folder / STATUS, lambda file: file.write(content), durable=durable)
        return dict(reading.parse_json(content.decode()))

    def _sum_now(self, name: str) -> sums.Sum:
        """Return the sum of a file as it is now."""
        try:
            return sums.sum_of(reading.read(self.folder / name), self.run_id)
        except OSError:
            return sums.nothing(self.run_id)

    def _sums_now(self) -> dict[str, sums.Sum]:
        """Return the sums of all files of the record as they are now."""
        probes = [f"{PROBES_FOLDER}/{path.name}" for path in probe_files(self.folder)]
        names = [
            name
            for name in (CONFIG, PROVENANCE, METRICS_FILE, CORRECT, *probes)
            if reading.is_there(self.folder / name)
        ]
        return {name: self._sum_now(name) for name in names}

    def write_provenance(self, made: Mapping[str, Any]) -> None:
        """Replace provenance.json."""
        self._replace(PROVENANCE, (files.to_json(made, indent=1) + "\n").encode())

    def write_correct(self, content: bytes) -> None:
        """Replace correct.json (`correct.as_json`)."""
        self._replace(CORRECT, content)

    def _replace(self, name: str, content: bytes) -> None:
        self._verify()
        self._list([name])
        self._rewrite(name, content)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one evaluation to metrics.jsonl."""
        self._append(METRICS_FILE, _as_lines([row]))

    def append_probe(self, probe: str, rows: Iterable[Mapping[str, Any]]) -> bool:
        """Append the rows of one measurement to a probe's file; return whether it has room for them."""
        self._verify()  # first: a folder that was deleted must not come back
        make_own_folder(self.folder / PROBES_FOLDER, self.folder.parent)
        name, text = f"{PROBES_FOLDER}/{probe}.jsonl", _as_lines(rows)
        length, _ = self._known().get(name, (0, ""))
        if length + len(text) > reading.most_bytes(name):  # it could not be read again
            return False
        self._append(name, text)
        return True

    def _append(self, name: str, text: str) -> None:
        self._verify()
        known = self._known()
        if name not in known:
            self._list([name])
        _append(self.folder / name, text)
        known[name] = sums.extended(known[name], text.encode())
        self._restate(durable=False)  # so that a process that is killed next leaves no row without a sum

    def _list(self, names: Iterable[str]) -> None:
        """Write a status that names files which are about to be written, with the sums of no bytes.

        A process that is killed before its next status leaves files that are named, and none that is wrong by its sum.
        """
        self._known().update(dict.fromkeys(names, sums.nothing(self.run_id)))
        self._restate()

    def _restate(self, *, durable: bool = True) -> None:
        """Write the status again, if there is one, with the sums as they are now."""
        try:
            status = read_status(self.folder)
        except UserError:
            return
        if status is not None:
            self.write_status(str(status["state"]), durable=durable)

    def _known(self) -> dict[str, sums.Sum]:
        """Return the sums of what this process writes, which begin with what is there."""
        if self._sums is None:
            self._sums = self._sums_now()
        return self._sums

    def keep_rows_until(self, evaluated: int, step: int) -> list[str]:
        """Drop what a resumed run measures again: rows, and its last evaluation by image; and lines that are damaged.

        Args:
            evaluated: evaluations after this step are dropped.
            step: rows of probes from this step (0-based) on are dropped.

        Returns:
            A sentence about each damaged line, and about a file that is not what the run wrote.
        """
        changes = check(self.folder)
        rows, warnings = read_metrics(self.folder)
        probes, complaints = read_probes(self.folder)
        others = [name for name in (CONFIG, PROVENANCE) if reading.is_there(self.folder / name)]
        self._sums = {name: self._sum_now(name) for name in others}
        kept = {
            f"{PROBES_FOLDER}/{probe}.jsonl": [r for r in rows if r["step"] < step] for probe, rows in probes.items()
        }
        if warnings or rows:  # if all are kept, too: the last may lack the end of its line
            kept[METRICS_FILE] = [row for row in rows if row["step"] <= evaluated]
        dropped = [CORRECT] if reading.is_there(self.folder / CORRECT) else []
        if kept or dropped:
            self._list([*kept, *dropped])
        for name in dropped:
            self._remove(name)
        for name, of_file in kept.items():
            self._rewrite(name, _as_lines(of_file).encode())
        return [*([changes] if changes else []), *warnings, *complaints]

    def _remove(self, name: str) -> None:
        """Remove a file that the status names with the sum of no bytes."""
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(self.folder / name, error) from error
        del self._known()[name]

    def _rewrite(self, name: str, content: bytes) -> None:
        files.write_atomically(self.folder / name, lambda file: file.write(content))
        self._known()[name] = sums.sum_of(content, self.run_id)
