"""What a person sees while runs go on: a live line per run in a terminal, plain lines now and then elsewhere."""

import contextlib
import itertools
import multiprocessing
import re
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_SECONDS = 60.0  # between two lines about runs under way in a log
BAR = 20  # columns
LEAST_LABEL = 16  # columns that a run's name keeps before the bar has to go


def span(seconds: float) -> str:
    """A duration as people say it: 48 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds // 60 % 60:02d} min"


def outcome(status: Mapping[str, Any]) -> str:
    """How a run ended, in a few words."""
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
    return textwrap.shorten(str(error), 240, placeholder=" ...")


class Display:
    """Progress of a set of runs, given each run's status whenever there is news.

    In a terminal that can redraw its lines there is one for each run under way and, of several runs, one for all.
    Elsewhere (a log, a pipe, TERM=dumb) there are lines only: one for each run that ends, and now and then one about
    a run under way. All goes to stderr.

    The time left is the time so far, scaled by work.

    Args:
        work: each run's cost in any unit, by its name.
        quiet: warnings and failures only.
    """

    def __init__(self, work: Mapping[str, float], *, quiet: bool = False) -> None:
        self.work = dict(work)
        self.quiet = quiet
        self.done: dict[str, float] = {}  # share of each run that is over
        self.first: dict[str, float] = {}  # share that was over when a run began here
        self.under_way: dict[str, str] = {}  # what there is to say of each
        self.noted: dict[str, tuple[float, object]] = {}  # in a log: when a run had its last line, and its epoch then
        self.begun = time.monotonic()
        self.finished = 0
        self.labels = _labels(self.work)
        self.console = Console(stderr=True, highlight=False)
        self.live: Live | None = None
        if not quiet and redraws(self.console):
            self.live = Live(
                get_renderable=self._lines,
                console=self.console,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # what goes to a file must get there
                vertical_overflow="crop",
            )

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        """A line that stays, above the live ones or in the log; none if quiet."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """The same for what must not be missed: also if quiet."""
        if self.live:
            self.console.print(Text(text), soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def news(self, status: Mapping[str, Any]) -> None:
        """Show a run that is under way."""
        name, steps = status["name"], status.get("steps") or 0
        share = min(1.0, status.get("step", 0) / steps) if steps else 0.0
        self.done[name] = share
        self.first.setdefault(name, share)
        self.under_way[name] = text = _progress(status, share)
        if self.live:
            return
        last, epoch = self.noted.setdefault(name, (time.monotonic(), status.get("epoch")))
        waited = (time.monotonic() - last) / len(self.under_way)  # of many runs a log hears no more than of one
        if waited >= LINE_SECONDS * (1 if epoch != status.get("epoch") else 10):
            self.noted[name] = time.monotonic(), status.get("epoch")
            self.say(f"{name}: {text}")

    def ended(self, name: str, status: Mapping[str, Any]) -> None:
        """Take a run off the live lines and leave a line about how it ended."""
        self.finished += 1
        self.done[name] = 1.0
        self.first.setdefault(name, 0.0)
        self.under_way.pop(name, None)
        left = self.time_left()
        tail = f"; about {span(left)} left" if left and self.finished < len(self.work) else ""
        tell = self.say if status["state"] in ("done", "diverged") else self.warn
        tell(f"[{self.finished}/{len(self.work)}] {name}: {outcome(status)}{tail}")

    def put_off(self, name: str, why: str) -> None:
        """Take a run off the live lines that is tried again later."""
        self.under_way.pop(name, None)
        self.warn(f"{name}: {why}")

    @contextmanager
    def hearing(self) -> Iterator[Connection | None]:
        """Inside, a pipe for what other processes print: in a terminal it would land amid the live lines. Else None."""
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
        return time.monotonic() - self.begun

    def time_left(self) -> float | None:
        """Seconds, or None before there is anything to go by."""
        over = sum(self.work[name] * (share - self.first[name]) for name, share in list(self.done.items()))
        left = sum(work * (1 - self.done.get(name, 0.0)) for name, work in self.work.items())
        return self.elapsed * left / over if over > 0 and self.elapsed > 2 else None

    def _lines(self) -> Table:
        """What the terminal shows now, as wide and as high as it is at this moment."""
        lines = [(self.labels[name], self.done[name], text) for name, text in list(self.under_way.items())]
        if len(self.work) == 1:
            return _fitted(lines, self.console.width)
        total = sum(self.work.values()) or 1.0
        over = sum(self.work[name] * share for name, share in list(self.done.items()))
        left = self.time_left()
        text = f"{self.finished} finished" + (f", about {span(left)} left" if left else "")
        room = max(0, self.console.height - 3)  # a line each for all runs, for those without one, for what is said
        hidden = len(lines) - room
        if hidden > 0:
            text += f"; {hidden} under way not shown"
        return _fitted([*lines[:room], (f"{len(self.work)} runs", over / total, text)], self.console.width)


def redraws(console: Console) -> bool:
    """Whether lines may be redrawn: in a real terminal that can, whatever FORCE_COLOR makes of a file, and not by
    processes that share it (joblib's, say).
    """
    alone = multiprocessing.current_process().name == "MainProcess"
    return alone and console.is_interactive and console.file.isatty()


def _progress(status: Mapping[str, Any], share: float) -> str:
    """E.g. epoch 3/10, test 91.2%, 4 min 10 s left."""
    if not status.get("steps"):
        return textwrap.shorten(str(status.get("doing") or "starting"), 60, placeholder=" ...")
    parts = [f"epoch {min(status['epoch'] + 1, status['epochs'])}/{status['epochs']}"]
    accuracy, loss = status.get("test_accuracy"), status.get("test_loss")
    if accuracy is not None or loss is not None:
        parts.append(f"test {accuracy:.1%}" if accuracy is not None else f"test loss {loss:.4g}")
    if 0 < share < 1:
        parts.append(f"{span(status['wall_seconds'] * (1 - share) / share)} left")
    return ", ".join(parts)


def _labels(names: Mapping[str, float]) -> dict[str, str]:
    """Runs by what tells them apart: without the settings that all begin with, or identities that are not needed."""
    parts = {name: name.split("-") for name in names}
    columns = zip(*parts.values(), strict=False)
    common = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns))) if len(names) > 1 else 0
    labels = {name: "-".join(of_name[common:]) for name, of_name in parts.items()}
    short = {name: re.sub(r"-[0-9a-f]{10}$", "", label) for name, label in labels.items()}
    often = Counter(short.values())
    return {name: label if often[label] == 1 else labels[name] for name, label in short.items()}


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
