"""Read a run's folder (runs/folder.py): every file checked by its schema, and against the checksums of its status.

What cannot be read, or is not what the run wrote, is a `UserError` that names file and value, and costs that run.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from normlab.common.errors import UserError, first_line
from normlab.runs import correct, reading, sums
from normlab.runs.correct import CORRECT, Correct
from normlab.runs.identity import FORMAT, canonical, completed, digest
from normlab.runs.reading import P, RecordPath
from normlab.runs.rows import METRICS_FILE, read_rows
from normlab.runs.states import FINISHED, State

CONFIG, STATUS, PROVENANCE = "config.yaml", "status.json", "provenance.json"
PROBES_FOLDER, REPORT = "probes", "report"
_OF_A_RUN = (CONFIG, STATUS, METRICS_FILE)
MOST_PROBES = 100  # files of rows of a run
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
        found.append((path, why))
    return sorted(found, key=lambda each: each[0].name)


def _folders(study_folder: P) -> Iterator[tuple[P, bool]]:
    """Yield the folders that have a file of a record, and the links that are none to a file."""
    if not isinstance(study_folder, Path):
        for path in study_folder.iterdir():
            if any((path / name).exists() for name in _OF_A_RUN):
                yield path, False
        return
    try:
        entries = list(os.scandir(study_folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name == REPORT:
            continue
        if entry.is_dir(follow_symlinks=False):
            if any(os.path.lexists(f"{entry.path}/{name}") for name in _OF_A_RUN):
                yield study_folder / entry.name, False
        elif entry.is_symlink() and not os.path.isfile(entry.path):  # noqa: PTH113  # of a loop of links: False
            yield study_folder / entry.name, True


def read_config(folder: RecordPath) -> dict[str, Any]:
    """Return the frozen configuration, with the settings that records of its format did not have yet.

    Runs share the groups that they have in common: these are to be read only.

    Raises:
        FormatError: if it is of a format that this version does not know.
        UserError: if the file is damaged.
    """
    path = folder / CONFIG
    return _as_config(path, reading.contents(path)).settings


class _Cell(NamedTuple):
    """Configurations that differ in nothing but their seed and the run's id.

    Attributes:
        value: what their text stands for, completed, the seed being 0.
        identity: what stands before and after the seed in the text that is hashed; None if they identify no run.
        fault: why the report cannot use them; "" if it can.
    """

    value: Any
    identity: tuple[str, str] | None
    fault: str


class _Config(NamedTuple):
    """A configuration, the id that its file names (None: none), and the id that it describes.

    The second is None where the file names no format: records of 0.1.0, whose ids were other digests.
    """

    settings: dict[str, Any]
    named: object
    described: str | None
    fault: str


def _as_config(path: RecordPath, content: bytes) -> _Config:
    try:
        cell, seed, named = _parsed(content.decode())
    except reading.FAULTS as error:
        raise reading.damaged(path, error) from None
    if not isinstance(cell.value, dict):
        raise reading.damaged(path, "it holds no settings")
    found = cell.value.get("format", FORMAT)
    if type(found) is not int or found not in range(1, FORMAT + 1):
        raise FormatError(
            f"{reading.shown(path)} is a record of format {reading.shown(found)}, and this version of normlab reads up"
            f" to format {FORMAT}.\n"
            "Use the version that wrote it, or a newer one: pip install --upgrade normlab."
        )
    settings = {key: value for key, value in cell.value.items() if key not in ("format", "run_id")}
    if seed is not None:
        settings["seed"] = seed
    described = digest(f"{settings['seed']}".join(cell.identity)) if cell.identity else ""
    formatted = "format" in cell.value
    return _Config(settings, named or cell.value.get("run_id"), described if formatted else None, cell.fault)


def _parsed(text: str) -> tuple[_Cell, int | None, str | None]:
    """Parse runs that differ in nothing but their seed and their id once: a study has far fewer cells than runs.

    Returns:
        The cell, and seed and id where they stand in the text as in every other one.
    """
    named, seed = _RUN_ID.match(text), _SEED.search(text)
    if named and seed:
        rest = f"{text[: named.start(1)]}{text[named.end(1) : seed.start(1)]}0{text[seed.end(1) :]}"
    elif seed:
        rest = f"{text[: seed.start(1)]}0{text[seed.end(1) :]}"
    else:
        return _cell(text), None, None
    cell = _cell(rest)
    if isinstance(cell.value, dict) and cell.value.get("seed") == 0 and cell.value.get("run_id") is None:
        return cell, int(seed[1]), named[2] if named else None
    return _cell(text), None, None


def _cell(text: str) -> _Cell:
    return _kept_cell(text) if len(text) <= reading.MOST_KEPT else _read_cell(text)


def _read_cell(text: str) -> _Cell:
    from normlab.runs import schema  # pydantic is slow to import, and most commands read no record

    value = reading.parse_yaml(text)
    try:
        value = completed(value) if isinstance(value, dict) else value
    except (AttributeError, TypeError):
        raise ValueError("a group of settings is none") from None
    fault = schema.fault(schema.Config, value)
    try:
        own = {key: each for key, each in value.items() if key not in ("format", "run_id")}
        before, after = canonical({**own, "seed": _ANY_SEED}).split(json.dumps(_ANY_SEED))
    except (LookupError, AttributeError, TypeError, ValueError):  # it has no data set, ...
        return _Cell(value, None, fault)
    return _Cell(value, (before, after) if type(value.get("seed")) is int else None, fault)


_ANY_SEED = "\0 the seed"
_kept_cell = lru_cache(maxsize=1024)(_read_cell)


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
    return _as_status(path, content, folder)


def _as_status(path: RecordPath, content: bytes, folder: RecordPath) -> dict[str, Any]:
    from normlab.runs import schema  # pydantic is slow to import, and most commands read no record

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
    return UserError(f"{reading.shown(path)} {why}.\n{reading.remedy(path)}")


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
        probes: the names of its files of probes: `probes/ics.jsonl`.
        correct: which test images it got right at its end; None where that was not recorded or cannot be read.
        damage: by the name of a file that cannot be read, and that a run goes on without, why.
    """

    config: dict[str, Any]
    status: dict[str, Any] | None
    provenance: dict[str, Any]
    sums: Mapping[str, sums.Sum] | None
    probes: list[str]
    correct: Correct | None
    damage: Mapping[str, str]

    @property
    def over(self) -> bool:
        """Return whether the run is finished: all of its files are as they will stay."""
        return self.status is not None and self.status["state"] in FINISHED

    def row_fault(self, path: RecordPath, file: str, content: bytes | None) -> UserError | None:
        """Return the error for a file of rows (`probes/ics.jsonl`) that is not what the run wrote; None if it is.

        Args:
            path: the file.
            file: its name in the folder of the run.
            content: what it holds; None if there is no such file.
        """
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
    config = _as_config(path, content)
    own = sums.id_of(folder.name)
    if config.named is not None and config.named != own:
        raise changed(path, f"is of the run {reading.shown(config.named)}, and lies in the folder of another")
    if config.fault:
        raise changed(path, f"lacks a setting of a run, or has an odd one: {config.fault}")
    if own and config.described not in (own, None):
        raise changed(path, "describes another run than the name of its folder says")
    status = read_status(folder)
    probes = [f"{PROBES_FOLDER}/{path.name}" for path in probe_files(folder)]
    if status is None and (probes or reading.is_there(folder / METRICS_FILE)):
        raise changed(folder / STATUS, "is missing, and rows are there")
    recorded, over = sums.recorded(status), status is not None and status["state"] in FINISHED
    if recorded is not None and (why := sums.fault(recorded.get(CONFIG), content, own, whole=True)):
        raise changed(path, why)
    if recorded is not None and config.described is None:
        raise changed(path, "lacks its format, and checksums are there")
    damage: dict[str, str] = {}
    made, bits = (
        _read_part(folder / name, parse, recorded, own, over=over, damage=damage)
        for name, parse in ((PROVENANCE, _as_provenance), (CORRECT, correct.parse))
    )
    record = Record(config.settings, status, made or {}, recorded, probes, bits, damage)
    if recorded is not None:
        _check_list(folder, record, recorded)
    return record


def _read_part(
    path: RecordPath,
    parse: Callable[[RecordPath, bytes], Any],
    recorded: Mapping[str, sums.Sum] | None,
    own: str,
    *,
    over: bool,
    damage: dict[str, str],
) -> Any:
    """Return what a file holds that a run goes on without, None if it is not there; add to `damage` if it is damaged.

    Raises:
        UserError: if it is not what the run wrote.
    """
    try:
        content = reading.read(path)
    except FileNotFoundError:
        content = None
    except OSError as error:
        damage[path.name] = str(reading.damaged(path, error))
        return None
    if recorded is not None:
        sum = recorded.get(path.name)
        if why := sums.fault(sum, content, own, whole=over or sum not in (None, sums.nothing(own))):
            raise changed(path, why)
    try:
        return None if content is None else parse(path, content)
    except UserError as error:
        damage[path.name] = str(error)
        return None


def _check_list(folder: RecordPath, record: Record, recorded: Mapping[str, sums.Sum]) -> None:
    """Check that the files of rows that are there are those that the run wrote.

    Raises:
        UserError: if one is missing, or one more is there.
    """
    recorded = {name: sum for name, sum in recorded.items() if name != CORRECT}  # which was compared when it was read
    if {CONFIG, PROVENANCE, METRICS_FILE, *record.probes} == recorded.keys():  # as most are; rows that are missing are
        return  # seen when they are read
    there = {CONFIG, PROVENANCE, *record.probes}
    if reading.is_there(folder / METRICS_FILE):
        there.add(METRICS_FILE)
    for name in sorted(recorded.keys() - there):
        if recorded[name][0] or record.over:
            raise changed(folder / name, sums.MISSING)
    for name in sorted(there - recorded.keys() - {CONFIG, PROVENANCE}):
        raise changed(folder / name, sums.ADDED)


def check(folder: RecordPath) -> str:
    """Return a sentence about the first file of a run that is not what the run wrote; "" if all are, or none tells."""
    try:
        record = read_record(folder)
        for file in record.sums or ():
            if file.endswith(".jsonl"):
                path = folder / file
                content = reading.contents(path) if reading.is_there(path) else None
                if fault := record.row_fault(path, file, content):
                    return first_line(fault)
    except UserError as error:
        return first_line(error)
    return ""


def read_metrics(folder: RecordPath) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the evaluations that can be read, and a sentence about each line that cannot.

    Raises:
        UserError: if the file cannot be read.
    """
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
        # Hidden ones are of systems: `._gradients.jsonl` of macOS.
        found = [each for each in reading.listed(path) if each.name.endswith(".jsonl") and each.name[0] != "."]
    except OSError as error:
        raise reading.damaged(path, error) from None
    if len(found) > MOST_PROBES or not all(each.name.isprintable() for each in found):
        raise reading.damaged(path, f"it has more than {MOST_PROBES} files of rows, or one of an odd name")
    return sorted(found, key=attrgetter("name"))
