"""Show runs under way: live lines in a terminal, plain lines now and then elsewhere."""

import contextlib
import multiprocessing
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from normlab.common.console import Console
from normlab.common.errors import count, cut

REFRESH_SECONDS = 0.25  # between two drawings of the live lines
LINE_SECONDS = 60.0  # between two lines about runs under way in a log
BAR = 20  # columns
LEAST_NAME = 32  # columns that a run's name keeps before words about it have to go
MOST_OF_ERROR = 240  # characters
COLORS = {  # of states (runs.states.State), the order in which they are told
    "running": "cyan",
    "lost": "red",
    "failed": "red",
    "unreadable": "red",
    "interrupted": "yellow",
    "planned": "",
    "diverged": "magenta",
    "done": "green",
}


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
        result, seconds = Progress(status).accuracy or "n/a", Progress(status).number("wall_seconds")
        result = f"test {result}" if "loss" in result else f"test accuracy {result}"
        return result + (f" ({span(seconds)})" if seconds is not None else "")
    if status["state"] == "diverged":
        return f"diverged at step {status.get('diverged_step')}"
    return f"{status['state']}: {one_line(status.get('error')).removeprefix('interrupted ')}"  # as before version 0.5


def one_line(error: object) -> str:
    """Return a text or an error on one line, cut to 240 characters: a last line of up to 160 is left whole."""
    lines = [" ".join(line.split()) for line in str(error).strip().splitlines()]
    text = " ".join(filter(None, lines))
    if len(text) <= MOST_OF_ERROR or len(lines) == 1:
        return cut(text, MOST_OF_ERROR)
    last = cut(lines[-1], MOST_OF_ERROR * 2 // 3)
    return f"{cut(text.removesuffix(lines[-1]).rstrip(), MOST_OF_ERROR - len(last) - 1)} {last}"


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
    def words(self) -> tuple[str, ...]:
        """Epoch, accuracy, speed and time left, "" for what is unknown; before the first step what it does instead."""
        if not self.status.get("steps"):
            return (cut(one_line(self.status.get("doing") or "starting"), 60),)
        left = f"{span(self.seconds_left or 0.0)} left" if 0 < self.share < 1 else ""
        return self.epoch, self.accuracy and f"test {self.accuracy}", self.speed, left

    @property
    def speed(self) -> str:
        """The images per second of training, e.g. 1,234 images/s."""
        speed = self.number("images_per_second")
        return f"{speed:,.0f} images/s" if speed and speed >= 10 else f"{speed:.2g} images/s" if speed else ""

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


class Display:
    """Shows how far a set of runs is, given each run's status whenever it changes: of a sweep, or of a study.

    In a terminal that can redraw its lines there is one for each run under way and, of several runs, one above them
    for all. Elsewhere (a log, a pipe, TERM=dumb) there are lines only: one for each run that ends, and now and then one
    about a run under way.

    Args:
        names: what to call each run, by its folder or another key.
        work: each run's cost in any unit, by which the time so far is scaled to the time left; else all cost the same.
        quiet: warnings and failures only.
        console: where all goes; stderr by default.
        of: begins the line for all runs: `Study default`.
        time_left: the seconds until all runs are over, where the time so far does not tell.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        work: Mapping[str, float] | None = None,
        *,
        quiet: bool = False,
        console: Console | None = None,
        of: str = "",
        time_left: Callable[[], float | None] | None = None,
    ) -> None:
        self.names: dict[str, str] = {}
        self.work = dict(work or {})
        self.quiet = quiet
        self.states: dict[str, str] = {}
        self.done: dict[str, float] = {}  # share of each run that is over
        self.first: dict[str, float] = {}  # share that was over when a run began here
        self.under_way: dict[str, Progress] = {}
        self.noted: dict[str, tuple[float, object]] = {}  # in a log: when a run had its last line, and its epoch then
        self.begun = time.monotonic()
        self.console = console or Console(stderr=True)
        self._of, self._time_left = of, time_left
        for key, name in names.items():
            self.know(key, name)
        to_terminal = sys.stdout.isatty()  # what goes to a file must get there
        options: dict[str, Any] = {"transient": True, "redirect_stdout": to_terminal, "vertical_overflow": "crop"}
        options["auto_refresh"] = False  # Live's thread may draw between another one's count of lines and its lines
        can = not quiet and redraws(self.console)
        self.live = Live(console=self.console, get_renderable=self._lines, **options) if can else None
        self._printing, self._over = threading.RLock(), threading.Event()
        self._refresher = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> Self:
        if self.live:
            self.live.start(refresh=True)
            self._refresher.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live:
            self._over.set()
            self._refresher.join()
            self.live.stop()

    def _refresh(self) -> None:
        while self.live and not self._over.wait(REFRESH_SECONDS):
            with self._printing:
                self.live.refresh()

    def say(self, text: str) -> None:
        """Print a line that stays, above the live ones or in the log; nothing if quiet."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Print such a line also if quiet."""
        with self._printing:
            self.console.print(Text(text), soft_wrap=True)

    def know(self, key: str, name: str, state: str = "planned") -> None:
        """Take a run in, or note its state by what others did."""
        self.names[key], self.states[key] = name, state
        self.work.setdefault(key, 1.0)
        if state != "running":
            self.under_way.pop(key, None)

    def news(self, key: str, status: Mapping[str, Any]) -> None:
        """Show a run that is under way."""
        self.under_way[key] = progress = Progress(status)
        self.states[key] = "running"
        self.first.setdefault(key, progress.share)  # before `done`, which the refresher's `time_left` goes through
        self.done[key] = progress.share
        if self.live:
            return
        last, epoch = self.noted.setdefault(key, (time.monotonic(), status.get("epoch")))
        waited = (time.monotonic() - last) / len(self.under_way)  # many runs make no more lines than one
        if waited >= LINE_SECONDS * (1 if epoch != status.get("epoch") else 10):
            self.noted[key] = time.monotonic(), status.get("epoch")
            self.say(f"{self.names[key]}: {', '.join(filter(None, progress.words))}")

    def ended(self, key: str, status: Mapping[str, Any]) -> None:
        """Take a run off the live lines and leave a line about how it ended."""
        self.states[key] = status["state"]
        self.first.setdefault(key, 0.0)
        self.done[key] = 1.0
        self.under_way.pop(key, None)
        line = f"[{self.finished}/{len(self.names)}] {self.names[key]}: {outcome(status)}"
        if status["state"] not in ("done", "diverged"):
            self.warn(line)
            return
        left = self.time_left()
        self.say(line + (f"; about {span(left)} left" if left and self.finished < len(self.names) else ""))

    def put_off(self, key: str, why: str) -> None:
        """Take a run off the live lines that is tried again later."""
        self.states[key] = "planned"
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

    @property
    def finished(self) -> int:
        """The number of runs that have ended, in whatever way."""
        return sum(state not in ("planned", "running") for state in list(self.states.values()))

    def time_left(self) -> float | None:
        """Return the seconds until all runs are over, or None before a hundredth of the work is done."""
        if self._time_left:
            return self._time_left()
        over = sum(self.work[key] * (share - self.first[key]) for key, share in list(self.done.items()))
        left = sum(work * (1 - self.done.get(key, 0.0)) for key, work in self.work.items())
        return self.elapsed * left / over if 100 * over > left and self.elapsed > 2 else None

    def _lines(self) -> RenderableType:
        """Return the live lines, as wide and as high as the terminal is at this moment."""
        lines, width = [(self.names[key], each) for key, each in list(self.under_way.items())], self.console.width
        if not self.names or (len(self.names) == 1 and not self._of):
            return _fitted(lines, width)
        header = headline(self._of, list(self.states.values()), self.time_left())
        room = max(0, self.console.height - 2)  # beside the header, and a new line below
        if len(lines) > room:
            header.append(f"; {len(lines) - room} under way not shown")
        header.truncate(width, overflow="ellipsis")
        return Group(header, _fitted(lines[:room], width))


def redraws(console: Console) -> bool:
    """Return whether lines may be redrawn: in a terminal that can, and not by processes that share it (joblib's, say).

    FORCE_COLOR makes no terminal of a file.
    """
    alone = multiprocessing.current_process().name == "MainProcess"
    return alone and console.is_interactive and console.file.isatty()


def headline(of: str, states: Sequence[str], left: float | None) -> Text:
    """Return how many runs are in which state, those that go on or went wrong first, and the time left of all."""
    counts = Counter(states)
    line = Text(f"{of}, {count(len(states), 'run')}: " if of else f"{count(len(states), 'run')}: ")
    order = [*COLORS, *(state for state in counts if state not in COLORS)]
    parts = (Text(f"{counts[state]} {state}", COLORS.get(state, "")) for state in order if counts[state])
    line.append_text(Text(", ").join(parts))
    return line.append(f"; about {span(left)} left" if left else "")


_COLUMNS = ((0, 1, 2, 3), (0, 1, 3), (0, 3), (0,), ())  # of `Progress.words`: as many as there is room for


def _fitted(lines: Sequence[tuple[str, Progress]], width: int) -> Table:
    """Return a table with name, bar and words of each run, none wider than the terminal."""
    longest = max((len(name) for name, _ in lines), default=0)
    words = [progress.words for _, progress in lines]
    widths = [max(map(len, column)) for column in zip(*(each for each in words if len(each) > 1), strict=True)]
    wide = [(each, sum(widths[i] + 2 for i in each if widths and widths[i])) for each in _COLUMNS]
    shown, taken = next((each for each in wide if width - each[1] >= min(longest, LEAST_NAME)), wide[-1])
    names = min(longest, width - taken)
    doing = max((len(each[0]) + 1 for each in words if len(each) == 1), default=0)
    bar = width - max(taken, doing) - longest > BAR + 1
    table = Table.grid(padding=(0, 1, 0, 0))
    for (name, progress), each in zip(lines, words, strict=True):
        texts = [f"{each[i]:<{widths[i]}}" for i in shown if widths[i]] if len(each) > 1 else [each[0]]
        room = max(0, width - names - 1 - (BAR + 1) * bar)
        bars = [ProgressBar(1.0, progress.share, BAR)] if bar else []
        table.add_row(Text(cut(name, names)), *bars, Text("  ".join(texts).rstrip()[:room]))
    for column in table.columns:
        column.no_wrap, column.overflow = True, "crop"
    return table
