"""What a person sees while runs go on: live bars in a terminal, a plain line per finished run elsewhere."""

import sys
import textwrap
import time
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


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

    The time left is the time so far, scaled by work: `work` maps a run's name to its cost in any unit.
    """

    def __init__(self, work: Mapping[str, float]) -> None:
        self.work = dict(work)
        self.done: dict[str, float] = {}  # share of each run that is over
        self.begun = time.monotonic()
        self.finished = 0
        self.console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.total = self.bars.add_task("runs", total=1.0, text="starting")
        self.tasks: dict[str, TaskID] = {}
        self.first: dict[str, float] = {}  # share that was over when a run began here

    def __enter__(self) -> Self:
        self.bars.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bars.__exit__(*error)

    def say(self, text: str) -> None:
        """A line that stays, above the bars or in the log."""
        if self.console.is_terminal:
            self.bars.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def news(self, status: Mapping[str, Any]) -> None:
        """Show a run that is under way."""
        name, steps = status["name"], status.get("steps") or 0
        share = min(1.0, status.get("step", 0) / steps) if steps else 0.0
        self.done[name] = share
        self.first.setdefault(name, share)
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=1.0, text="")
        accuracy = status.get("test_accuracy")
        text = "starting"
        if steps:
            text = f"epoch {min(status['epoch'] + 1, status['epochs'])}/{status['epochs']}"
            text += f", {accuracy:.1%}" if accuracy is not None else ""
            text += f", {span(status['wall_seconds'] * (1 - share) / share)} left" if 0 < share < 1 else ""
        self.bars.update(self.tasks[name], completed=share, text=text)
        self._refresh()

    def ended(self, name: str, text: str) -> None:
        """Take a run off the bars and leave a line about it."""
        self.finished += 1
        self.done[name] = 1.0
        self.first.setdefault(name, 0.0)
        if name in self.tasks:
            self.bars.remove_task(self.tasks.pop(name))
        left = self.time_left()
        tail = f"; about {span(left)} left" if left and self.finished < len(self.work) else ""
        self.say(f"[{self.finished}/{len(self.work)}] {name}: {text}{tail}")
        self._refresh()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begun

    def time_left(self) -> float | None:
        """Seconds, or None before there is anything to go by."""
        over = sum(self.work[name] * (share - self.first[name]) for name, share in self.done.items())
        left = sum(work * (1 - self.done.get(name, 0.0)) for name, work in self.work.items())
        return self.elapsed * left / over if over > 0 and self.elapsed > 2 else None

    def _refresh(self) -> None:
        total = sum(self.work.values()) or 1.0
        over = sum(self.work[name] * share for name, share in self.done.items())
        left = self.time_left()
        text = f"{self.finished} of {len(self.work)} finished"
        self.bars.update(self.total, completed=over / total, text=text + (f", about {span(left)} left" if left else ""))
