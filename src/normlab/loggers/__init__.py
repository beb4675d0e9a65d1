"""Log a run to TensorBoard, MLflow or Weights & Biases as it goes on, beside its own record.

A backend gets what the run's folder holds, and nothing is read back from it. It works in a thread of its own, so that
neither its errors nor the time that it takes are of any consequence to the run.
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
from normlab.common.errors import first_line
from normlab.config.schema import LoggerConfig
from normlab.runs import State

Row = Mapping[str, Any]
BACKENDS = {"tensorboard": "TensorBoard", "mlflow": "MLflow", "wandb": "WeightsAndBiases"}  # classes by their modules
END_SECONDS = 30.0  # for which a run waits at its end until its backend has logged the rest
STOP_SECONDS = 10.0  # and after a request to stop, perhaps of a scheduler that is about to kill
AT_END = ("state", "error", "diverged_step", "weights_sha256", "parameters", "peak_memory_bytes")


class Backend(Protocol):
    """A run in a library, made from the run and the logger's settings: new there, or resumed. All of it may raise."""

    def log(self, row: Row) -> None:
        """Log an evaluation at its training step. A run that goes on logs the earlier ones once more."""

    def end(self, facts: Mapping[str, Any]) -> None:
        """Log how the run ended (`AT_END`), and write what is buffered."""


def finite_values(row: Row) -> dict[str, float]:
    """Return the values of an evaluation that a backend logs: without the step, and finite."""
    return {k: v for k, v in row.items() if k != "step" and v is not None and math.isfinite(v)}


def start_time(run: runs.Run) -> float:
    """Return when the run began, in seconds since 1970; a row's `wall_seconds` are to be added for its time."""
    return datetime.fromisoformat((runs.read_status(run.folder) or {})["started"]).timestamp()


class Logger:
    """The logger of a run that has no backend: it does nothing."""

    def begin(self, rows: Iterable[Row]) -> None:
        """Begin with the evaluations that the run's record has already."""

    def record(self, row: Row) -> None:
        """Log one more evaluation."""

    def end(self) -> None:
        """Log the end of the run as its folder has it. Waits for the backend, but not for long."""


def start_logger(settings: LoggerConfig, run: runs.Run, warn: Callable[[str], None]) -> Logger:
    """Return a logger of `run` to the backend of `settings`.

    None of its methods raises, and neither does this: `warn` is called with the first error, after which it is off.
    """
    if settings.name == "none":
        return Logger()
    try:
        with warnings.catch_warnings(action="ignore"):  # about other libraries
            module = importlib.import_module(f"normlab.loggers.{settings.name}")
    except Exception as error:
        warn(_off_message(settings, error))
        return Logger()
    backend = getattr(module, BACKENDS[settings.name])
    return _ThreadedLogger(lambda: backend(run, settings), settings, run, warn)


def _off_message(settings: LoggerConfig, error: BaseException) -> str:
    return f"logger={settings.name} is off for the rest of this run: {type(error).__name__}: {first_line(error)}"


class _ThreadedLogger(Logger):
    """A logger to a backend that works in a thread."""

    def __init__(
        self, connect: Callable[[], Backend], settings: LoggerConfig, run: runs.Run, warn: Callable[[str], None]
    ) -> None:
        self._settings, self._run, self._warn = settings, run, warn
        self._calls: SimpleQueue[Callable[[Backend], None] | None] = SimpleQueue()
        self._abandoned = False
        # Not waited for when the process ends: a backend may hang.
        self._thread = threading.Thread(target=self._work, args=(connect,), name="logger", daemon=True)
        self._thread.start()

    def begin(self, rows: Iterable[Row]) -> None:
        self._calls.put(lambda backend: None)  # makes the backend, so that it has the run from its start
        for row in rows:
            self.record(row)

    def record(self, row: Row) -> None:
        self._calls.put(lambda backend: backend.log(row))

    def end(self) -> None:
        state = self._run.state
        if state != State.RUNNING:  # else another process has taken the run over, and logs it
            self._calls.put(self._log_end)
        self._calls.put(None)
        seconds = STOP_SECONDS if state == State.INTERRUPTED else END_SECONDS
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._abandoned = True
            self._warn(f"logger={self._settings.name} did not finish within {seconds:.0f} s and was left behind.")

    def _log_end(self, backend: Backend) -> None:
        status = runs.read_status(self._run.folder) or {}
        backend.end({key: status[key] for key in AT_END if status.get(key) is not None})

    def _work(self, connect: Callable[[], Backend]) -> None:
        try:
            call = self._calls.get()  # by then the run's folder holds its start
            backend = connect()
            while call:
                call(backend)
                call = self._calls.get()
        except BaseException as error:  # wandb raises KeyboardInterrupt of its own, for one
            if not self._abandoned:
                self._warn(_off_message(self._settings, error))
