"""Read a run's folder (runs/folder.py): every file checked by its schema, and against the checksums of its status.

What cannot be read, or is not what the run wrote, is a `UserError` that names file and value, and costs that run.
"""

import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from normlab.common.errors import UserError, first_line
from normlab.runs import reading, sums
from normlab.runs.identity import FORMAT, completed
from normlab.runs.reading import P, RecordPath
from normlab.runs.states import FINISHED, State

CONFIG, STATUS, METRICS_FILE, PROVENANCE = "config.yaml", "status.json", "metrics.jsonl", "provenance.json"
PROBES_FOLDER, REPORT = "probes", "report"
_OF_A_RUN = (CONFIG, STATUS, METRICS_FILE)
MOST_PROBES = 100  # files of rows of a run
MOST_ROWS = 1_000_000  # of a file
MOST_NESTED = 2_000_000  # lists and mappings in it, each of which costs memory
MOST_FAULTS = 100  # lines of a file that cannot be read, after which the rest of it is not
_RUN_ID = re.compile(r"\Aformat: \d+\nrun_id: ('?([0-9a-f]{10})'?)$", re.MULTILINE)
_SEED = re.compile(r"^seed: (0|[1-9]\d*)$", re.MULTILINE)  # of the outermost mapping: others are indented


class FormatError(UserError):
    """The record was written by a version of normlab that is newer than this one."""


def find(study_folder: P) -> list[P]:
    """Return the run folders of a study, by name; none of a folder that does not exist."""
    return [path for path, why in scan(study_folder) if not why]


def scan(study_folder: P) -> list[tuple[P, str]]:
    """Return what looks like a run's folder, by name, each with why it is not read ("" if it is).

    Whatever has a file of a record is one, and so is a link: it is not followed. Hidden folders are none.
    """
    found = []
    for path, is_link in _folders(study_folder):
        why = "it is a link, and links are not followed" if is_link else ""
        if not path.name.isprintable():
            why = "its name has characters that cannot be shown"
        if is_link or any(reading.is_there(path / name) for name in _OF_A_RUN):
            found.append((path, why))
    return sorted(found, key=lambda each: each[0].name)


def _folders(study_folder: P) -> Iterator[tuple[P, bool]]:
    """Yield the folders in a folder, and the links in it that are none to a file."""
    if not isinstance(study_folder, Path):
        yield from ((path, False) for path in study_folder.iterdir())
        return
    try:
        entries = list(os.scandir(study_folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name == REPORT:
            continue
        path = study_folder / entry.name
        if entry.is_dir(follow_symlinks=False):
            yield path, False
        elif entry.is_symlink() and not os.path.isfile(path):  # noqa: PTH113  # of a loop of links: False
            yield path, True


def read_config(folder: RecordPath) -> dict[str, Any]:
    """Return the frozen configuration, with the settings that records of its format did not have yet.

    Runs share the groups that they have in common: these are to be read only.

    Raises:
        FormatError: if it is of a format that this version does not know.
        UserError: if the file is damaged.
    """
    path = folder / CONFIG
    return _as_config(path, reading.contents(path))[0]


def _as_config(path: RecordPath, content: bytes) -> tuple[dict[str, Any], object]:
    """Return the configuration that a file holds, and the run's id in it (None where it has none)."""
    config = reading.yaml_mapping(path, content, _config)
    found = config.get("format", FORMAT)
    if type(found) is not int or found not in range(1, FORMAT + 1):
        raise FormatError(
            f"{reading.shown(path)} is a record of format {reading.shown(found)}, and this version of normlab reads up"
            f" to format {FORMAT}.\n"
            "Use the version that wrote it, or a newer one: pip install --upgrade normlab."
        )
    return {key: value for key, value in config.items() if key not in ("format", "run_id")}, config.get("run_id")


def _config(text: str) -> Any:
    """Parse runs that differ in nothing but their seed and their id once: a study has far fewer cells than runs."""
    known = _RUN_ID.match(text)
    rest = text[: known.start(1)] + text[known.end(1) :] if known else text
    config = _of_cell(rest)
    if known and isinstance(config, dict) and config.get("run_id", "") is None:
        return config | {"run_id": known[2]}
    return _parsed(text) if known else config


def _of_cell(text: str) -> Any:
    seed = _SEED.search(text)
    if seed:
        config = _parsed(f"{text[: seed.start(1)]}0{text[seed.end(1) :]}")
        if isinstance(config, dict) and config.get("seed") == 0:
            return config | {"seed": int(seed[1])}
    return _parsed(text)


def _parsed(text: str) -> Any:
    return _kept(text) if len(text) <= reading.MOST_KEPT else _completed(text)


def _completed(text: str) -> Any:
    value = reading.parse_yaml(text)
    try:
        return completed(value) if isinstance(value, dict) else value
    except (AttributeError, TypeError):
        raise ValueError("a group of settings is none") from None


_kept = lru_cache(maxsize=1024)(_completed)


def read_status(folder: RecordPath) -> dict[str, Any] | None:
    """Return the status, or None for a run that was planned and has not started.

    A run that was running when its study was packed into one file is interrupted there.

    Raises:
        UserError: if the file is damaged, or of another run.
    """
    path = folder / STATUS
    try:
        content = reading.read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise reading.damaged(path, error) from None
    return _as_status(folder, content)


def _as_status(folder: RecordPath, content: bytes) -> dict[str, Any]:
    from normlab.runs import schema  # pydantic is slow to import, and most commands read no record

    path = folder / STATUS
    status = reading.json_object(path, content)
    if why := schema.fault(schema.Status, status):
        raise reading.damaged(path, why)
    if why := sums.status_fault(content, status, sums.id_of(folder.name)):
        raise changed(path, why)
    if status["state"] == State.RUNNING and not isinstance(folder, Path):
        status["state"] = State.INTERRUPTED
    return status


def changed(path: RecordPath, why: str = sums.CHANGED) -> UserError:
    """Return the error for a file of a record that does not go with the rest of it."""
    if isinstance(path, Path):
        fix = f"Move the folder {reading.shown(path.parent)} away and run the same command again to repeat this run."
    else:
        fix = "It was so when the study was packed. Whoever packed it has to repeat this run."
    return UserError(f"{reading.shown(path)} {why}.\n{fix}")


def read_provenance(folder: RecordPath) -> dict[str, Any]:
    """Return what is recorded of how a run was made; nothing if it cannot be read: a run goes on without.

    Equal ones share their parts: they are to be read only.
    """
    path = folder / PROVENANCE
    try:
        return _as_provenance(path, reading.read(path))
    except (UserError, OSError):
        return {}


def _as_provenance(path: RecordPath, content: bytes) -> dict[str, Any]:
    try:
        value = _kept_provenance(content) if len(content) <= reading.MOST_KEPT else _provenance(content)
    except (ValueError, RecursionError) as error:
        raise reading.damaged(path, error) from None
    return value


def _provenance(content: bytes) -> dict[str, Any]:
    from normlab.runs import schema

    value = reading.parse_json(content.decode())
    reading.check_values(value)
    if why := schema.fault(schema.Provenance, value):
        raise ValueError(why)
    return value  # type: ignore[no-any-return]


_kept_provenance = lru_cache(maxsize=256)(_provenance)


class Record(NamedTuple):
    """The files of a run but its rows, checked against each other.

    Attributes:
        config: the frozen configuration.
        status: None for a run that was planned and has not started.
        provenance: how the run was made; nothing where there is no such file.
        sums: by the name of a file of rows, what its first bytes are to come to; None where none were recorded.
        damage: why the provenance cannot be read; "" if it can.
    """

    config: dict[str, Any]
    status: dict[str, Any] | None
    provenance: dict[str, Any]
    sums: Mapping[str, sums.Sum] | None
    damage: str = ""

    @property
    def over(self) -> bool:
        """Return whether the run is finished: all of its files are as they will stay."""
        return self.status is not None and self.status["state"] in FINISHED

    def row_fault(self, path: RecordPath, file: str, content: bytes) -> UserError | None:
        """Return the error for a file of rows (`probes/ics.jsonl`) that is not what the run wrote; None if it is."""
        if self.sums is None:
            return None
        why = sums.fault(self.sums.get(file), content, str((self.status or {}).get("run_id")), whole=self.over)
        return changed(path, why) if why else None


def read_record(folder: RecordPath) -> Record:
    """Read the files of a run but its rows.

    Raises:
        FormatError: if it is of a format that this version does not know.
        UserError: if one is missing or damaged, or is not what the run wrote.
    """
    path = folder / CONFIG
    content = reading.contents(path)
    config, named = _as_config(path, content)
    own = sums.id_of(folder.name)
    if named is not None and named != own:
        raise changed(path, f"is of the run {reading.shown(named)}, and lies in the folder of another")
    status = read_status(folder)
    if status is None and reading.is_there(folder / METRICS_FILE):
        raise changed(folder / STATUS, "is missing, and rows are there")
    recorded = sums.recorded(status)
    if recorded is not None and (why := sums.fault(recorded.get(CONFIG), content, own, whole=True)):
        raise changed(path, why)
    made, damage = _read_made(folder, recorded, own, over=status is not None and status["state"] in FINISHED)
    record = Record(config, status, made, recorded, damage)
    if recorded is not None:
        _check_list(folder, record)
    return record


def _read_made(
    folder: RecordPath, recorded: Mapping[str, sums.Sum] | None, own: str, *, over: bool
) -> tuple[dict[str, Any], str]:
    """Return the provenance, and why it cannot be read."""
    path = folder / PROVENANCE
    try:
        content = reading.read(path)
    except FileNotFoundError:
        content = None
    except OSError as error:
        return {}, str(reading.damaged(path, error))
    if recorded is not None:
        sum = recorded.get(PROVENANCE)
        if why := sums.fault(sum, content, own, whole=over or sum not in (None, sums.nothing(own))):
            raise changed(path, why)
    try:
        return ({} if content is None else _as_provenance(path, content)), ""
    except UserError as error:
        return {}, str(error)


def _check_list(folder: RecordPath, record: Record) -> None:
    """Check that the files of rows that are there are those that the run wrote.

    Raises:
        UserError: if one is missing, or, of a finished run, one more is there.
    """
    listed = {name for name in record.sums or () if name.endswith(".jsonl")}
    there = {f"{PROBES_FOLDER}/{path.name}" for path in probe_files(folder)}
    if reading.is_there(folder / METRICS_FILE):
        there.add(METRICS_FILE)
    for name in sorted(listed - there):
        if (record.sums or {})[name][0]:
            raise changed(folder / name, sums.MISSING)
    for name in sorted(there - listed) if record.over else ():
        raise changed(folder / name, sums.ADDED)


def check(folder: RecordPath) -> str:
    """Return a sentence about the first file of a run that is not what the run wrote; "" if all are, or none tells."""
    try:
        record = read_record(folder)
        for file in record.sums or ():
            if file.endswith(".jsonl"):
                path = folder / file
                if error := record.row_fault(path, file, reading.contents(path)):
                    raise error
    except UserError as error:
        return first_line(error)
    return ""


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
    """Return the files of rows of a run's probes, by name.

    Raises:
        UserError: if the folder of probes cannot be read, or has more files than a run has probes.
    """
    path = folder / PROBES_FOLDER
    try:
        found = [each for each in reading.listed(path) if each.name.endswith(".jsonl")]
    except OSError as error:
        raise reading.damaged(path, error) from None
    if len(found) > MOST_PROBES or not all(each.name.isprintable() for each in found):
        raise reading.damaged(path, f"it has more than {MOST_PROBES} files of rows, or one of an odd name")
    return sorted(found, key=attrgetter("name"))


def read_rows(path: RecordPath) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of a file of metrics or of a probe, and a sentence about each line that cannot be read.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        return as_rows(path, reading.read(path))
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise reading.damaged(path, error) from None


def as_rows(path: RecordPath, content: bytes) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows that a file holds, and a sentence about each line that cannot be read: the first `MOST_FAULTS`.

    Raises:
        UserError: if it has more values than fit into the memory.
    """
    from normlab.runs import schema

    if content.count(b"[") + content.count(b"{") > MOST_NESTED or content.count(b"\n") > MOST_ROWS:
        raise reading.damaged(path, f"it has more than {MOST_ROWS} rows, or too many lists")
    probe = path.name != METRICS_FILE
    text = content.decode(errors="replace")
    lines = text.removesuffix("\n")
    try:  # all lines at once, which takes half the time
        rows = reading.parse_json(f"[{lines.replace(chr(10), ',')}]")
    except (ValueError, RecursionError):
        rows = []
    if len(rows) == lines.count("\n") + 1 and set(map(type, rows)) == {dict} and len(set(map(tuple, rows))) == 1:
        columns = dict(zip(rows[0], zip(*map(dict.values, rows), strict=True), strict=True))
        if schema.columns_fit(columns, probe=probe):
            return rows, []
    return _row_by_row(path, text, probe=probe)


def _row_by_row(path: RecordPath, text: str, *, probe: bool) -> tuple[list[dict[str, Any]], list[str]]:
    from normlab.runs import schema

    rows: list[dict[str, Any]] = []
    warnings: list[str] = []
    names: set[str] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = reading.parse_json(line)
            why = schema.row_fault(row, probe=probe) or schema.order_fault(row, rows[-1] if rows else None, probe=probe)
            if why:
                raise ValueError(why)
            if len(names | row.keys()) > schema.MOST_COLUMNS:
                raise ValueError(f"it brings the file to more than {schema.MOST_COLUMNS} columns")
        except (ValueError, RecursionError) as error:
            if len(warnings) == MOST_FAULTS:
                warnings.append(f"{reading.shown(path)}: line {number} and those after it are left out, too.")
                break
            why = reading.shown(error)
            warnings.append(f"{reading.shown(path)}, line {number} cannot be read and is left out: {why}.")
            continue
        names |= row.keys()
        rows.append(row)
    return rows, warnings
