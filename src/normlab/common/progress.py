"""Show runs under way: live lines in a terminal, plain lines now and then elsewhere."""

import contextlib
import itertools
import multiprocessing
import re
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import PurePath
from typing import Any, Self

from rich.console import RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from normlab.common.console import Console
from normlab.common.terminal import say

LINE_SECONDS = 60.0  # between two lines about runs under way in a log
BAR = 20  # columns
LEAST_LABEL = 16  # columns that a run's name keeps before the bar has to go


def span(seconds: float) -> str:
    """Return a duration in words: 48 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds // 60 % 60:02d} min"


def outcome(status: Mapping[str, Any]) -> str:
    """Return how a run ended, in a few words."""
    if status["state"] == "done":
        result = (
            f"test accuracy {status['test_accuracy']:.1%}"
            if status.get("test_accuracy") is not None
            else f"test loss {status.get('test_loss') or float('nan'):.4g}"
        )
        return f"{result} ({span(status['wall_seconds'])})"
    if status["state"] == "diverged":
        return f"diverged at step {status.get('diverged_step')}"
    return f"{status['state']}: {one_line(status.get('error'))}"


def one_line(error: object) -> str:
    """Return a text or an error on one line, shortened to 240 characters."""
    return textwrap.shorten(str(error), 240, placeholder=" ...")


@dataclass(frozen=True)
class Progress:
    """The progress of a run by its status, whose values may be damaged."""

    status: Mapping[str, Any]

    def number(self, key: str) -> float | None:
        """Return a number of the status, or None where there is none."""
        value = self.status.get(key)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    @property
    def share(self) -> float:
        """The fraction of the steps that are made, 0 to 1."""
        steps = self.number("steps")
        return min(1.0, (self.number("step") or 0.0) / steps) if steps else 0.0

    @property
    def total_seconds(self) -> float | None:
        """The time of the whole run, scaled from the steps that are made; None before the first."""
        return (self.number("wall_seconds") or 0.0) / self.share if self.share else None

    @property
    def seconds_left(self) -> float | None:
        """The rest of `total_seconds`."""
        return self.total_seconds * (1 - self.share) if self.total_seconds is not None else None

    @property
    def epoch(self) -> str:
        """The epoch under way, e.g. epoch 3/10; before the first step, what the run does instead."""
        epoch, epochs = self.number("epoch"), self.number("epochs")
        if epoch is None or not epochs:
            return one_line(self.status.get("doing") or "starting")
        return f"epoch {min(epoch + 1, epochs):.0f}/{epochs:.0f}"

    @property
    def accuracy(self) -> str:
        """The last test accuracy, e.g. 91.2%; of a run without one, its loss."""
        accuracy, loss = self.number("test_accuracy"), self.number("test_loss")
        return f"{accuracy:.1%}" if accuracy is not None else f"loss {loss:.4g}" if loss is not None else ""


def live_view(console: Console, render: Callable[[], RenderableType], **options: Any) -> Live | None:
    """Return a view of what `render` makes, redrawn in place once started; None where lines cannot be redrawn."""
    return Live(console=console, get_renderable=render, **options) if redraws(console) else None


class Display:
    """Shows the progress of a set of runs, given each run's status whenever it changes.

    In a terminal that can redraw its lines there is one for each run under way and, of several runs, one for all.
    Elsewhere (a log, a pipe, TERM=dumb) there are lines only: one for each run that ends, and now and then one about
    a run under way. All goes to stderr.

    The time left is the time so far, scaled by work.

    Args:
        work: each run's cost in any unit, by its folder or name.
        quiet: warnings and failures only.
    """

    def __init__(self, work: Mapping[str, float], *, quiet: bool = False) -> None:
        self.work = dict(work)
        self.quiet = quiet
        self.done: dict[str, float] = {}  # share of each run that is over
        self.first: dict[str, float] = {}  # share that was over when a run began here
        self.under_way: dict[str, str] = {}  # the text shown for each
        self.noted: dict[str, tuple[float, object]] = {}  # in a log: when a run had its last line, and its epoch then
        self.begun = time.monotonic()
        self.finished = 0
        self.names = distinct_names(self.work)
        self.labels = _labels(self.names)
        self.console = Console(stderr=True)
        to_terminal = sys.stdout.isatty()  # what goes to a file must get there
        options = {"transient": True, "redirect_stdout": to_terminal, "vertical_overflow": "crop"}
        self.live = None if quiet else live_view(self.console, self._lines, **options)

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        """Print a line that stays, above the live ones or in the log; nothing if quiet."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Print such a line also if quiet."""
        if self.live:
            self.console.print(Text(text), soft_wrap=True)
        else:
            say(text, file=sys.stderr, flush=True)

    def news(self, key: str, status: Mapping[str, Any]) -> None:
        """Show a run that is under way."""
        progress = Progress(status)
        self.done[key] = progress.share
        self.first.setdefault(key, progress.share)
        self.under_way[key] = text = _under_way(progress)
        if self.live:
            return
        last, epoch = self.noted.setdefault(key, (time.monotonic(), status.get("epoch")))
        waited = (time.monotonic() - last) / len(self.under_way)  # many runs make no more lines than one
        if waited >= LINE_SECONDS * (1 if epoch != status.get("epoch") else 10):
            self.noted[key] = time.monotonic(), status.get("epoch")
            self.say(f"{self.names[key]}: {text}")

    def ended(self, key: str, status: Mapping[str, Any]) -> None:
        """Take a run off the live lines and leave a line about how it ended."""
        self.finished += 1
        self.done[key] = 1.0
        self.first.setdefault(key, 0.0)
        self.under_way.pop(key, None)
        left = self.time_left()
        tail = f"; about {span(left)} left" if left and self.finished < len(self.work) else ""
        show = self.say if status["state"] in ("done", "diverged") else self.warn
        show(f"[{self.finished}/{len(self.work)}] {self.names[key]}: {outcome(status)}{tail}")

    def put_off(self, key: str, why: str) -> None:
        """Take a run off the live lines that is tried again later."""
        self.under_way.pop(key, None)
        self.warn(f"{self.names[key]}: {why}")

    @contextmanager
    def hearing(self) -> Iterator[Connection | None]:
        """Open a pipe for the output of other processes, which would land amid the live lines; None without these."""
        if not self.live:
            yield None
            return
        reader, writer = multiprocessing.Pipe(duplex=False)
        listener = threading.Thread(target=self._repeat, args=(reader,), daemon=True)
        listener.start()
        try:
            yield writer
        finally:
            writer.close()
            listener.join(timeout=1.0)  # until all have closed their ends; one may have left a process behind

    def _repeat(self, reader: Connection) -> None:
        with contextlib.suppress(OSError), open(reader.fileno(), "rb", closefd=False) as lines:
            for line in lines:
                self.warn(Text.from_ansi(line.decode(errors="replace")).plain.rstrip())

    @property
    def elapsed(self) -> float:
        """Seconds since the display was made."""
        return time.monotonic() - self.begun

    def time_left(self) -> float | None:
        """Return the seconds until all runs are over, or None before any of the work is done."""
        over = sum(self.work[key] * (share - self.first[key]) for key, share in list(self.done.items()))
        left = sum(work * (1 - self.done.get(key, 0.0)) for key, work in self.work.items())
        return self.elapsed * left / over if over > 0 and self.elapsed > 2 else None

    def _lines(self) -> Table:
        """Return the live lines, as wide and as high as the terminal is at this moment."""
        lines = [(self.labels[key], self.done[key], text) for key, text in list(self.under_way.items())]
        if len(self.work) == 1:
            return _fitted(lines, self.console.width)
        total = sum(self.work.values()) or 1.0
        over = sum(self.work[key] * share for key, share in list(self.done.items()))
        left = self.time_left()
        text = f"{self.finished} finished" + (f", about {span(left)} left" if left else "")
        room = max(0, self.console.height - 3)  # a line each for all runs, for those without one, for a new line
        hidden = len(lines) - room
        if hidden > 0:
            text += f"; {hidden} under way not shown"
        return _fitted([*lines[:room], (f"{len(self.work)} runs", over / total, text)], self.console.width)


def redraws(console: Console) -> bool:
    """Return whether lines may be redrawn: in a terminal that can, and not by processes that share it (joblib's, say).

    FORCE_COLOR makes no terminal of a file.
    """
    alone = multiprocessing.current_process().name == "MainProcess"
    return alone and console.is_interactive and console.file.isatty()


def _under_way(progress: Progress) -> str:
    """E.g. epoch 3/10, test 91.2%, 4 min 10 s left."""
    if not progress.status.get("steps"):
        return textwrap.shorten(str(progress.status.get("doing") or "starting"), 60, placeholder=" ...")
    parts = [progress.epoch]
    if progress.accuracy:
        parts.append(f"test {progress.accuracy}")
    if 0 < progress.share < 1:
        parts.append(f"{span(progress.seconds_left or 0.0)} left")
    return ", ".join(parts)


def distinct_names(folders: Iterable[str]) -> dict[str, str]:
    """Return the name of each run by its folder: the folder's own, or its path where runs of several share it."""
    names = {folder: PurePath(folder).name for folder in folders}
    often = Counter(names.values())
    return {folder: name if often[name] == 1 else folder for folder, name in names.items()}


def _labels(names: Mapping[str, str]) -> dict[str, str]:
    """Label runs by what tells them apart: without the settings that all begin with, and identities where possible."""
    parts = {key: name.split("-") for key, name in names.items()}
    columns = zip(*parts.values(), strict=False)
    common = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns))) if len(names) > 1 else 0
    labels = {key: "-".join(of_name[common:]) for key, of_name in parts.items()}
    short = {key: re.sub(r"-[0-9a-f]{10}$", "", label) for key, label in labels.items()}
    often = Counter(short.values())
    return {key: label if often[label] == 1 else labels[key] for key, label in short.items()}


def _fitted(lines: Sequence[tuple[str, float, str]], width: int) -> Table:
    """Label, bar and text of each line, none wider than the terminal; the end of a name tells runs apart."""
    table = Table.grid(padding=(0, 1, 0, 0))
    texts = max((len(text) for _, _, text in lines), default=0)
    longest = max((len(label) for label, _, _ in lines), default=0)
    room = width - texts - 2
    bar = room - BAR - 1 >= min(longest, LEAST_LABEL)
    room -= (BAR + 1) * bar
    for label, share, text in lines:
        shown = label if len(label) <= room else f"...{label[3 - room :]}" if room > 3 else ""
        bars = [ProgressBar(1.0, share, BAR)] if bar else []
        table.add_row(Text(shown), *bars, Text(text))
    for column in table.columns:
        column.no_wrap, column.overflow = True, "crop"
    return table
