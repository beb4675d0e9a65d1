"""Rebuild the report of a study whenever its records change, until all of its runs have ended: `watch=true`.

What costs little is looked at often: statuses, claims, and the size and time of each file of rows. The report is built
only when these say that it would be another one.
"""

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from normlab.common.errors import UserError, as_typed
from normlab.common.terminal import say
from normlab.report.options import Options
from normlab.report.render.html.live import as_still
from normlab.report.study.find import find_to_watch
from normlab.report.study.status import Survey
from normlab.report.write import build, write_report
from normlab.runs import files, reading
from normlab.runs.record import PROBES_FOLDER
from normlab.runs.rows import METRICS_FILE
from normlab.runs.states import FINISHED, UNFINISHED

LOOK_SECONDS = 1.0  # between two looks at the records, and no more than a fifth of the time is spent on looking
PAUSE_SECONDS = 5.0  # between two builds
SHARE = 0.2  # of the time that building takes at most
AGAIN_SECONDS = 30.0  # until a build that failed is tried again with the same records
SETTLE_SECONDS = 10.0  # without a run under way until a study counts as ended: the next may be about to start
_MOST_BYTES_OF_PAGE = 1 << 30


class Records(NamedTuple):
    """What tells whether a report would be another one.

    Attributes:
        runs: of each run its state, why, and the size and time of its files of rows.
        begun: there is something to report.
        under_way: a run has not ended; or there is no run yet.
    """

    runs: Mapping[str, Any]
    begun: bool
    under_way: bool


def watch_study(study: str, output_dir: str | Path, options: Options) -> Path:
    """Build the report of a study, and again whenever its records change, until all runs have ended; return its page.

    An open page of it shows the new state by itself. One line is printed for each build, and at the end what `build`
    prints; if `quiet`, that alone, and what hinders a build on stderr. Ctrl-C ends it: the page then stays as it is.

    Raises:
        UserError: for a study that does not exist or is packed in one file; at the end, as `build`.
    """
    if not isinstance(output_dir, str | Path):
        raise UserError(f"output_dir={as_typed(output_dir)} is not valid: expected a path.")
    watcher = _Watcher(str(study), Path(output_dir), options)
    try:
        return watcher.watch()
    except KeyboardInterrupt:
        watcher.say("Not watched any more: runs go on, and the page stays as it is. The same command watches again.")
        raise
    finally:
        watcher.leave()


class _Watcher:
    def __init__(self, study: str, output_dir: Path, options: Options) -> None:
        self._study, self._output_dir, self._options = study, output_dir, options
        self._survey = Survey(_folder_of(study, output_dir))
        self._built: Records | None = None  # those that the page shows
        self._page: Path | None = None
        self._stamp = ""  # of the page
        self._next_build = 0.0
        self._hindrance = ""  # the last that was printed
        self._under_way: float | None = None  # when a run was last seen under way

    def watch(self) -> Path:
        """Build again and again; return the page of the last time.

        Raises:
            UserError: if the study is not there any more, or cannot be reported when all of its runs have ended.
        """
        while True:
            begun = time.monotonic()
            records = self._look()
            looked = time.monotonic() - begun
            if self._is_over(records, begun):
                page = build(self._study, self._output_dir, self._options)
                self._stamp = ""
                self.say("All runs have ended: the report is complete, and not watched any more.")
                return page
            if not records.begun:
                self._hinder("No run has been evaluated yet. The page is made as soon as one has.")
            elif begun >= self._next_build and records != self._built:
                self._build(records)
            time.sleep(max(LOOK_SECONDS, looked * (1 / SHARE - 1)))

    def leave(self) -> None:
        """Let an open page know that it will not be built again, unless somebody else has built it since."""
        if not self._page or not self._stamp:
            return
        with contextlib.suppress(OSError, UserError):
            live = reading.read(self._page, _MOST_BYTES_OF_PAGE)
            still = as_still(live.decode(), self._stamp).encode()
            if still != live:
                files.write_atomically(self._page, lambda file: file.write(still), durable=False)

    def say(self, sentence: str) -> None:
        """Print a line with the time, unless `quiet`."""
        if not self._options.quiet:
            say(f"{datetime.now():%H:%M:%S} {sentence}", flush=True)

    def _look(self) -> Records:
        folder = self._survey.folder
        runs = self._survey.read()
        if not runs and not folder.is_dir():
            raise UserError(f"The folder {folder} is not there any more, so study {self._study} is not watched.")
        rows = {run.name: _rows(folder / run.name) for run in runs}
        return Records(
            {run.name: (run.state, run.note, rows[run.name]) for run in runs},
            begun=any(run.state in FINISHED or rows[run.name].get(METRICS_FILE, (0,))[0] for run in runs),
            under_way=not runs or any(run.state in UNFINISHED for run in runs),
        )

    def _is_over(self, records: Records, now: float) -> bool:
        """Return whether all runs have ended; if some were under way, for so long that no other one will begin."""
        if records.under_way:
            self._under_way = now
        return not records.under_way and (self._under_way is None or now >= self._under_way + SETTLE_SECONDS)

    def _build(self, records: Records) -> None:
        begun, stamp = time.monotonic(), datetime.now(UTC).isoformat(timespec="microseconds")
        try:
            report = write_report(self._study, self._output_dir, self._options, stamp)
        except UserError as error:  # it may be mended, or mend itself, while runs are under way
            self._hinder(f"The report is not built: {' '.join(str(error).splitlines()[:2])}")
            self._built, wait = None, AGAIN_SECONDS
        else:
            if self._page is None:
                self.say(f"Open {report.page}: it shows each new state by itself. Ctrl-C ends watching, and no run.")
            self._built, self._page, self._stamp, self._hindrance, wait = records, report.page, stamp, "", PAUSE_SECONDS
            self.say(f"Report built: {report.study.counted()}.")
        now = time.monotonic()
        self._next_build = now + max(wait, (now - begun) * (1 / SHARE - 1))

    def _hinder(self, sentence: str) -> None:
        """Print why there is no new page, once; if `quiet`, on stderr."""
        if sentence != self._hindrance:
            self._hindrance = sentence
            say(f"{datetime.now():%H:%M:%S} {sentence}", file=sys.stderr if self._options.quiet else None, flush=True)


def _folder_of(study: str, output_dir: Path) -> Path:
    """Return the folder of a study that may have no run yet.

    Raises:
        UserError: if there is none, or a packed study.
    """
    _, path = find_to_watch(study, output_dir)
    if path.is_file():
        raise UserError(
            f"{path} is a study in one file, in which no run goes on: there is nothing to watch.\nLeave out watch=true."
        )
    return path


def _rows(run: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of a run's files of rows; of none that is not there (any more)."""
    found: dict[str, tuple[int, int]] = {}
    for folder in (run, run / PROBES_FOLDER):
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(".jsonl"):
                    facts = entry.stat(follow_symlinks=False)
                    found[entry.name] = facts.st_size, facts.st_mtime_ns
    return found
