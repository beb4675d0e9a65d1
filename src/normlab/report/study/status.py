"""Show how far a study is: its runs by state, from status.json and claims alone, so that ten thousand take seconds."""

import os
import re
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from normlab.common.console import Console
from normlab.common.errors import UserError, as_typed, first_line
from normlab.common.progress import COLORS, Display, Progress, headline, one_line, span
from normlab.report.study.find import find_study, find_to_watch
from normlab.report.study.load import seconds_since
from normlab.runs import archive, schema
from normlab.runs.lock import Holder, holder
from normlab.runs.naming import run_names
from normlab.runs.reading import RecordPath, is_there, shown
from normlab.runs.record import CONFIG, STATUS, find, read_config, read_status, scan
from normlab.runs.rows import METRICS_FILE
from normlab.runs.states import FINISHED, UNFINISHED, State, recorded_state

ROWS = 20  # runs listed of a state; finished runs only in a study of no more than these
POLL_SECONDS = 2.0
_ENDED = (State.FAILED, State.LOST, State.UNREADABLE, State.INTERRUPTED, *FINISHED)


@dataclass(frozen=True)
class RunStatus:
    """One run: its state and facts by status.json, why it is in a bad state, and who holds it while it runs.

    Attributes:
        name: of its folder; title: what it is called in its study.
    """

    name: str
    state: State
    facts: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    holder: Holder | None = None
    title: str = ""

    @property
    def progress(self) -> Progress:
        """The progress by the facts."""
        return Progress(self.facts)

    @property
    def total_seconds(self) -> float | None:
        """The time of the whole run, or None while it is unknown."""
        return self.progress.total_seconds if self.state in (State.RUNNING, State.DONE) else None

    @property
    def cell(self) -> str:
        """The name without seed and identity: runs of one cell take about as long."""
        return re.sub(r"-s\d+-[0-9a-f]{10}$", "", self.name)

    def columns(self, now: datetime) -> dict[str, str]:
        """Return what a table shows of the run, by column."""
        progress, beat = self.progress, self.facts.get("heartbeat")
        begun = progress.number("epoch") is not None and progress.number("epochs")
        waiting = progress.epoch if self.state == State.RUNNING else "not begun"
        host, job, process = (
            getattr(self.holder, at_holder) if self.holder else self.facts.get(recorded)
            for at_holder, recorded in (("host", "host"), ("job", "job"), ("pid", "pid"))
        )
        seconds, left = progress.number("wall_seconds"), self.total_seconds and progress.seconds_left
        return {
            "id": self.name.rpartition("-")[2] if self.title != self.name else "",
            "progress": f"{progress.epoch}, {progress.share:.0%}" if begun else waiting,
            "time left": span(left) if left is not None else "",
            "accuracy": progress.accuracy,
            "speed": progress.speed,
            "heartbeat": f"{span(max(0.0, seconds_since(beat, now)))} ago" if beat else "",
            "where": f"{host or ''} {f'job {job}' if job else f'process {process}' if process else ''}".strip(),
            "wall time": span(seconds) if seconds is not None else "",
            "error": one_line(self.note),
            "why": one_line(self.note),
        }


def read_packed(path: Path) -> list[RunStatus]:
    """Return the runs of a study in one file, by name. None of them goes on.

    Raises:
        UserError: if the file is damaged.
    """
    with archive.opened(path) as folder:
        found = find(folder)
        titles = _titles({run.name: _settings_of(run) for run in found})
        return [_titled(_read(run), titles) for run in found]


def _settings_of(folder: RecordPath) -> dict[str, Any] | None:
    """Return the configuration of a run, None if it cannot be read."""
    try:
        config = read_config(folder)
    except UserError:
        return None
    return None if schema.fault(schema.Config, config) else config


def _titles(configs: Mapping[str, dict[str, Any] | None]) -> dict[str, str]:
    """Return what runs are called, by folder; one without settings by the name of that."""
    known = {name: config for name, config in configs.items() if config is not None}
    return {name: name for name in configs} | dict(zip(known, run_names(list(known.values())), strict=True))


def _titled(run: RunStatus, titles: Mapping[str, str]) -> RunStatus:
    return replace(run, title=titles.get(run.name, run.name))


class Survey:
    """The runs of a study, read again and again; a status that was not written since is not read again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._configs: dict[str, dict[str, Any] | None] = {}
        self._titles: dict[str, str] = {}
        self._seen: dict[str, tuple[int, RunStatus]] = {}

    def read(self) -> list[RunStatus]:
        """Return every run as it is now, by name.

        Raises:
            UserError: if the study's folder cannot be read.
        """
        try:
            found = scan(self.folder)
        except OSError as error:
            raise UserError(f"The folder {self.folder} cannot be read: {error.strerror}.") from None
        configs = {
            path.name: self._configs.get(path.name) or (None if why else _settings_of(path)) for path, why in found
        }
        if {name for name, each in configs.items() if each} != {name for name, each in self._configs.items() if each}:
            self._titles = _titles(configs)
        self._configs = configs
        return [_titled(self._read_run(path, why), self._titles) for path, why in found]

    def _read_run(self, folder: Path, why: str) -> RunStatus:
        if why:
            return RunStatus(shown(folder.name), State.UNREADABLE, note=why)
        try:
            written = os.lstat(f"{folder}/{STATUS}").st_mtime_ns  # half the time of a Path's
        except OSError:
            return _read(folder)
        seen, run = self._seen.get(folder.name, (None, None))
        if run is None or seen != written:
            run = _read(folder)
            self._seen[folder.name] = (written, run)
        return _held(run, folder) if run.state == State.RUNNING else run


def _read(folder: RecordPath) -> RunStatus:
    try:
        facts = read_status(folder)
    except UserError as error:
        return RunStatus(folder.name, State.UNREADABLE, note=first_line(error).removeprefix(f"{folder}/"))
    if facts is None:
        missing = is_there(folder / METRICS_FILE) and f"{STATUS} is missing, and rows are there"
        return RunStatus(folder.name, State.UNREADABLE if missing else State.PLANNED, note=missing or "")
    if not is_there(folder / CONFIG):
        return RunStatus(folder.name, State.UNREADABLE, note=f"{CONFIG} is missing")
    state = recorded_state(facts)
    if state is None:
        return RunStatus(
            folder.name, State.UNREADABLE, note=f"{STATUS} has the unknown state {shown(facts['state'])!r}"
        )
    return RunStatus(folder.name, state, facts, one_line(facts.get("error") or ""))


def _held(run: RunStatus, folder: Path) -> RunStatus:
    """Return a run whose status is running as its claim shows it."""
    by = holder(folder)
    if by and not by.gone:
        return RunStatus(run.name, State.RUNNING, run.facts, holder=by)
    again = _read(folder)  # it may have ended in between, and a claim goes with its process
    if again.state != State.RUNNING:
        return again
    return RunStatus(run.name, State.LOST, again.facts, "its process is gone", by)


def time_left(runs: Sequence[RunStatus]) -> float | None:
    """Return the seconds until the unfinished runs are done, as many at a time as run now; None if that is unknown.

    A run that has not begun takes as long as those of its cell did, or as all did. Failed runs are not counted.
    """
    known: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        if run.total_seconds:
            known[run.cell].append(run.total_seconds)
    running = [run for run in runs if run.state == State.RUNNING]
    if not running or not known:
        return None
    by_cell = {cell: fmean(seconds) for cell, seconds in known.items()}
    typical = fmean(by_cell.values())

    def left(run: RunStatus) -> float:
        return (run.total_seconds or by_cell.get(run.cell, typical)) * (1 - run.progress.share)

    work = sum(left(run) for run in runs if run.state in UNFINISHED)
    return max(work / len(running), *map(left, running))


def summary(study: str, runs: Sequence[RunStatus]) -> Text:
    """Return the study on one line: how many runs are in which state, and the time left."""
    return headline(f"Study {study}", [run.state for run in runs], time_left(runs))


def view(study: str, runs: Sequence[RunStatus], now: datetime | None = None) -> Group:
    """Return the summary, a table for each state, and what to do if nothing goes on."""
    now = now or datetime.now(UTC)
    parts: list[RenderableType] = [summary(study, runs)]
    by_state: dict[State, list[RunStatus]] = defaultdict(list)
    for run in runs:
        by_state[run.state].append(run)
    for state, color in zip(map(State, COLORS), COLORS.values(), strict=True):
        if by_state[state] and (state not in FINISHED or len(runs) <= ROWS):
            parts += [Text(), *_section(state, color, by_state[state], now)]
    if not by_state[State.RUNNING] and any(by_state[state] for state in (*UNFINISHED, State.FAILED)):
        advice = "Nothing runs. The command that started the study goes on where it stopped, when given again."
        parts += [Text(), Text(advice)]
    elif by_state[State.LOST]:
        advice = "The process of a lost run is gone: the same command, given again, goes on from its checkpoint."
        parts += [Text(), Text(advice)]
    return Group(*parts)


def _section(state: State, color: str, runs: Sequence[RunStatus], now: datetime) -> Iterator[RenderableType]:
    columns = _COLUMNS[state]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(Text(state, f"not dim {color}"), overflow="fold")  # a name that is whole can be copied
    for column in columns:
        long = column in ("error", "why")
        table.add_column(column, overflow="fold", no_wrap=not long, min_width=20 if long else None)
    for run in runs[:ROWS]:
        cells = run.columns(now)
        table.add_row(Text(run.title or run.name), *(Text(cells[column]) for column in columns))
    yield table
    if len(runs) > ROWS:
        yield Text(f"and {len(runs) - ROWS} more", "dim")


_COLUMNS = {
    State.RUNNING: ("id", "progress", "time left", "accuracy", "speed", "heartbeat", "where"),
    State.LOST: ("id", "progress", "accuracy", "heartbeat", "where"),
    State.INTERRUPTED: ("id", "progress", "accuracy", "heartbeat", "where"),
    State.FAILED: ("id", "where", "heartbeat", "error"),
    State.UNREADABLE: ("id", "why"),
    State.PLANNED: ("id",),
    State.DIVERGED: ("id", "progress", "wall time", "why"),
    State.DONE: ("id", "accuracy", "wall time"),
}


def study_status(study: str, output_dir: str | Path, *, watch: bool, quiet: bool = False) -> None:
    """Print how far the runs of `output_dir`/`study` are; `watch`: until they are done; `quiet`: on one line.

    Raises:
        UserError: for a study that does not exist and a folder that cannot be read.
    """
    if not isinstance(watch, bool):
        raise UserError(f"watch={as_typed(watch)} is not valid: expected true or false.")
    if not isinstance(output_dir, str | Path):
        raise UserError(f"output_dir={as_typed(output_dir)} is not valid: expected a path.")
    name, path = (find_to_watch if watch else find_study)(str(study), Path(output_dir))
    show_status(name, path, watch=watch, quiet=quiet)


def show_status(study: str, path: Path, *, watch: bool, quiet: bool = False, console: Console | None = None) -> None:
    """Print how far a study is; with `watch`, again and again until no run is left that a sweep takes further.

    If `quiet`, print the summary alone; with `watch` only once that is so.

    In a terminal the runs under way are shown in place; elsewhere there is a line whenever a state has changed. A line
    stays of each run that ends or fails meanwhile; at the end there are the tables. Ctrl-C ends it. A study without a
    run is waited for, as a sweep checks its runs before it writes the first record.

    Raises:
        UserError: if the study's folder or file cannot be read.
    """
    console = console or _console()
    packed, survey = path.is_file(), Survey(path)
    if packed or not watch:
        runs = read_packed(path) if packed else survey.read()
        console.print(summary(study, runs) if quiet else view(study, runs), soft_wrap=quiet)
        return
    try:
        if quiet:
            [runs] = deque(_poll(survey), maxlen=1)  # the last; a week has many
            console.print(summary(study, runs), soft_wrap=True)
        else:
            _watch(study, survey, console)
    except KeyboardInterrupt:
        pass


def _watch(study: str, survey: Survey, console: Console) -> None:
    """Show runs under way, and a line about each that ends; where lines cannot be redrawn, one for each change, too."""
    runs: list[RunStatus] = []
    left: float | None = None
    with Display({}, console=console, of=f"Study {study}", time_left=lambda: left) as display:
        try:
            for look, latest in enumerate(_poll(survey)):
                runs, left = latest, time_left(latest)
                if not look and not latest:
                    display.say(f"{datetime.now():%H:%M:%S} Study {study} has no run yet: waiting for the first.")
                if _tell(display, latest, first=not look) and not display.live:
                    display.say(f"{datetime.now():%H:%M:%S} {summary(study, latest)}")
        except KeyboardInterrupt:
            if not display.live:
                raise
    console.print(view(study, runs))


def _tell(display: Display, runs: Sequence[RunStatus], *, first: bool) -> bool:
    """Show runs as they are now; return whether a state has changed. At the first look none has ended meanwhile."""
    changed = [run for run in runs if display.states.get(run.name) != run.state]
    for run in runs:
        display.know(run.name, run.title, run.state)
        if run.state == State.RUNNING:
            display.news(run.name, run.facts)
    ended = [run for run in changed if run.state in _ENDED and not first]
    for run in ended[:ROWS]:
        display.ended(run.name, {**run.facts, "error": run.note, "state": run.state})
    if len(ended) > ROWS:
        display.say(f"and {len(ended) - ROWS} more")
    return bool(changed)


def _poll(survey: Survey) -> Iterator[list[RunStatus]]:
    while True:
        begun = time.monotonic()
        runs = survey.read()
        if not runs and not survey.folder.is_dir():
            raise UserError(f"The folder {survey.folder} is not there any more, so its study is not watched.")
        yield runs
        if runs and not any(run.state in UNFINISHED for run in runs):
            return
        time.sleep(max(POLL_SECONDS, time.monotonic() - begun))  # on a slow file system, not all of the time


def _console() -> Console:
    """Wide where nobody's terminal sets the width, so that a log's lines are whole."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 200
    return console
