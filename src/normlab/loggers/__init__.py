"""A run told to TensorBoard, MLflow or Weights & Biases as it goes on, beside its own record.

A tool is told what the run's folder holds; nothing is read back from it. It works in a thread of its own, so neither
what goes wrong there nor how long it takes is of any consequence to the run.
"""

import importlib
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from queue import SimpleQueue
from typing import Any, Protocol

from normlab import runs
from normlab.config.schema import LoggerConfig

Row = Mapping[str, Any]
END_SECONDS = 30.0  # that a run waits at its end for what its tool still has to do
STOP_SECONDS = 10.0  # and when asked to stop, perhaps by a scheduler that is about to kill
AT_END = ("state", "error", "diverged_step", "weights_sha256", "parameters", "peak_memory_bytes")


class Tool(Protocol):
    """A run in a tool, `normlab.loggers.<name>.Tool(run, settings)`: new there, or found again. All of it may raise."""

    def log(self, row: Row) -> None:
        """Note an evaluation at its training step. A run that goes on gives those before once more."""

    def end(self, facts: Mapping[str, Any]) -> None:
        """Note how the run ended (`AT_END`), and write down what is still to be written."""


def numbers(row: Row) -> dict[str, float]:
    """What a tool is told of an evaluation; a number that is not finite is left out, as metrics.jsonl has null."""
    return {k: v for k, v in row.items() if k != "step" and v is not None and math.isfinite(v)}


def started(run: runs.Run) -> float:
    """When the run began, in seconds since 1970; with a row's `wall_seconds` the time of an evaluation."""
    return datetime.fromisoformat((runs.read_status(run.folder) or {})["started"]).timestamp()


class Logger:
    """What a run talks to. This one tells nobody."""

    def begin(self, rows: Iterable[Row]) -> None:
        """The run trains from here on, and its record has the evaluations `rows`."""

    def record(self, row: Row) -> None:
        """There is one more."""

    def end(self) -> None:
        """The run has ended as its folder says. Waits for the tool, but not for long."""


def follow(settings: LoggerConfig, run: runs.Run, warn: Callable[[str], None]) -> Logger:
    """What passes on to the tool of `settings` all that it is told of `run`.

    None of its methods raises, and neither does this: the first error is given to `warn` and is the last.
    """
    if settings.name == "none":
        return Logger()
    try:
        with warnings.catch_warnings(action="ignore"):  # about other libraries
            module = importlib.import_module(f"normlab.loggers.{settings.name}")
    except Exception as error:
        warn(_off(settings, error))
        return Logger()
    return _Thread(lambda: module.Tool(run, settings), settings, run, warn)


class _Thread(Logger):
    def __init__(
        self, connect: Callable[[], Tool], settings: LoggerConfig, run: runs.Run, warn: Callable[[str], None]
    ) -> None:
        self._settings, self._run, self._warn = settings, run, warn
        self._orders: SimpleQueue[Callable[[Tool], None] | None] = SimpleQueue()
        self._given_up = False
        # Not waited for when the process ends: a tool may hang.
        self._thread = threading.Thread(target=self._work, args=(connect,), name="logger", daemon=True)
        self._thread.start()

    def begin(self, rows: Iterable[Row]) -> None:
        self._orders.put(lambda tool: None)  # the tool is to have the run from its start
        for row in rows:
            self.record(row)

    def record(self, row: Row) -> None:
        self._orders.put(lambda tool: tool.log(row))

    def end(self) -> None:
        state = self._run.state
        if state != "running":  # else another process has taken the run over, and speaks for it
            self._orders.put(self._tell_end)
        self._orders.put(None)
        seconds = STOP_SECONDS if state == "interrupted" else END_SECONDS
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._given_up = True
            self._warn(f"logger={self._settings.name} did not finish within {seconds:.0f} s and was left behind.")

    def _tell_end(self, tool: Tool) -> None:
        status = runs.read_status(self._run.folder) or {}
        tool.end({key: status[key] for key in AT_END if status.get(key) is not None})

    def _work(self, connect: Callable[[], Tool]) -> None:
        try:
            order = self._orders.get()  # by then the run's folder says when it began
            tool = connect()
            while order:
                order(tool)
                order = self._orders.get()
        except BaseException as error:  # wandb raises KeyboardInterrupt of its own, for one
            if not self._given_up:
                self._warn(_off(self._settings, error))


def _off(settings: LoggerConfig, error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"logger={settings.name} is off for the rest of this run: {type(error).__name__}: {text}"
