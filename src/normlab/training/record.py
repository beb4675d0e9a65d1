"""The record of a run while it trains: status, metrics, checkpoints and log."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from normlab import loggers, runs
from normlab.common import source
from normlab.common.errors import UserError
from normlab.common.terminal import PlainFormatter
from normlab.data.recorded import image_files
from normlab.models import pretrained
from normlab.runs import correct, files, provenance, reading
from normlab.runs.reading import MOST_BYTES_OF_ROWS
from normlab.runs.shorter import KEPT, Shorter
from normlab.training import checkpoint, device
from normlab.training.state import TrainingState

OnStatus = Callable[[Mapping[str, Any]], None]
_SHOWN = ("train_loss", "test_loss", "test_accuracy", "images_per_second")  # of the last evaluation, by the status


class Recorder:
    """Writes the record of a run, by the first of its processes.

    Args:
        on_status: called with the status whenever it has been written, about once a second.
    """

    def __init__(self, run: runs.Run, log: logging.Logger, logger: loggers.Logger, on_status: OnStatus) -> None:
        self.run, self.log = run, log
        self._logger, self._on_status = logger, on_status
        self._latest: dict[str, Any] = {}
        self._live: list[str] = []  # modules from outside of the snapshot of code that were told
        self._full: set[str] = set()  # probes whose files hold no more

    def preparing(self, text: str) -> None:
        """Report work that takes a while before the first step."""
        self.log.info("%s", text)
        self._on_status(self.run.write_status("running", durable=False, doing=text))

    def start(self, state: TrainingState, before: Mapping[str, Any] | None, shorter: Shorter | None = None) -> None:
        """Begin to record a run that is set up, or go on; measurements that it will make again are dropped.

        Args:
            before: provenance of the run that it goes on from, which is this one or `shorter`; None: it begins.
        """
        evaluated = state.steps_until(state.position.epoch)
        for warning in self.run.keep_rows_until(evaluated, state.step_number):
            self.log.warning("%s", warning)
        if state.group.is_main:
            self._write_provenance(state, before, shorter)
            rows = runs.read_metrics(self.run.folder)[0]
            for row in rows[-1:]:
                self._note(row)
            self._logger.begin(rows)

    def _write_provenance(
        self, state: TrainingState, before: Mapping[str, Any] | None, shorter: Shorter | None
    ) -> None:
        images = image_files(state.config)
        now: dict[str, Any] = {
            **device.provenance(state.device),
            "own_code": state.config.own_code(),
            "data": images.describe() if images else None,
            "data_fingerprint": state.data.fingerprint,
            "value_range": state.data.values.value_range,
            "processes": state.group.world,
            "memory_format": state.memory_format,
            "packed": state.interleaver.packed,
        }
        now["versions"] |= provenance.versions_of(type(module).__module__ for module in state.step.network.modules())
        before = before or {}
        now["weights"] = before.get("weights") if before else pretrained.recorded(state.config)
        if changed := provenance.differences(before, now):
            self.log.warning(
                "%s goes on under other circumstances than it began with: %s. Its record keeps both.",
                self.run.title,
                "; ".join(changed),
            )
        self._tell_of_live_code()
        of = shorter.folder.name if shorter else ""
        earlier = provenance.earlier_segments(before, now, state.step_number, of) if before or of else []
        self.run.write_provenance(now | ({"earlier": earlier} if earlier else {}))

    def _tell_of_live_code(self) -> None:
        live = [each for each in source.outside_of_snapshot() if each not in self._live]
        self._live += live
        if live:
            self.log.warning("Not in the snapshot of code, so imported as they are now: %s.", "; ".join(live))

    def heartbeat(self, state: TrainingState) -> None:
        """Write that the run is under way, and how far."""
        self._on_status(self.run.write_status("running", durable=False, **self._facts(state)))

    def checkpoint(self, state: TrainingState) -> None:
        """Write a checkpoint; for all processes together."""
        state.update_peak_memory()
        if state.group.is_main:
            checkpoint.save(self.run.folder, {"run_id": self.run.run_id, **state.state_dict()})

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Write down an evaluation."""
        self.run.append_metrics(row)
        self._logger.record(row)
        self._note(row)
        self.log.info("%s", files.to_json(row))

    def measurement(self, probe: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write down a measurement of a probe."""
        if not self.run.append_probe(probe, rows) and probe not in self._full:
            self._full.add(probe)
            self.log.warning(
                "probe=%s has measured more than a file holds (%d MiB); the rest is left out. Measure less often:"
                " probe.%s.times=...",
                probe,
                MOST_BYTES_OF_ROWS >> 20,
                probe,
            )

    def _note(self, row: Mapping[str, Any]) -> None:
        self._latest.update({k: row[k] for k in _SHOWN if k in row})

    def keep(self, state: TrainingState, kept: bool) -> None:
        """Write the checkpoint that a run keeps for more epochs, or see to it that there is none; for all processes."""
        state.update_peak_memory()
        if not state.group.is_main:
            return
        (self.run.folder / KEPT).unlink(missing_ok=True)
        if kept:
            try:
                checkpoint.keep(self.run.folder, {"run_id": self.run.run_id, **state.state_dict()})
            except UserError as error:  # the result is worth more
                self.log.warning("%s keeps no checkpoint for more epochs: %s", self.run.title, error)

    def correct(self, state: TrainingState) -> None:
        """Write which test images were classified correctly at the end, where there are classes."""
        order = state.data.test_order
        if order is None or state.correct is None or not state.group.is_main:
            return
        packed = np.packbits(state.correct[order.positions].numpy()).tobytes()
        content = correct.as_json(order.digest, order.classes, order.counts, packed)
        if len(content) > reading.most_bytes(correct.CORRECT):  # it could not be read again
            self.log.warning(
                "%s keeps no bits of its %d test images: more than %d KiB.",
                self.run.name,
                len(state.correct),
                reading.MOST_BYTES_OF_FILE >> 10,
            )
        else:
            self.run.write_correct(content)

    def end(self, state: TrainingState, outcome: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write how the run ended, remove its checkpoints, and return its status; for all processes together."""
        state.update_peak_memory()
        self._tell_of_live_code()  # once more: a forward pass may have imported some
        status = self.run.write_status(outcome, ended=runs.now(), **self._facts(state), **facts)
        if state.group.is_main:
            with contextlib.suppress(OSError):  # the result is safe: what is left over only takes space
                checkpoint.remove(self.run.folder)
        self._on_status(status)
        return state.group.broadcast(status)  # and so no process leaves before all is written

    def _facts(self, state: TrainingState) -> dict[str, Any]:
        seconds, images = state.position.train_seconds, state.position.train_images
        speed = {"images_per_second": images / seconds} if seconds and images else {}  # since the last evaluation
        return {
            "epoch": state.position.epoch,
            "epochs": state.config.epochs,
            "step": state.step_number,
            "steps": state.total_steps,
            "wall_seconds": state.position.wall_seconds,
            "parameters": state.parameters,
            "classes": len(state.data.classes),
            "processes": state.group.world,
            "doing": None,
            "capture_seconds": state.engine.capture_seconds,
            # The memory of one of several runs in a process is not known.
            "peak_memory_bytes": None if state.interleaver.packed else state.peak_memory(),
            **self._latest,
            **speed,
        }


class _LogFile(logging.FileHandler):
    """A log file that ignores errors of its disk: they end the run where its record is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        with contextlib.suppress(OSError):  # at once: the folder may be another one when there is something to say
            self.stream = self._open()

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            super().emit(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def open_log(folder: Path, *, write: bool) -> logging.Logger:
    """Return a logger of this run alone, into its run.log and for warnings to the terminal; or one that drops all."""
    log = logging.Logger(folder.name, logging.INFO)
    if not write:
        log.addHandler(logging.NullHandler())
        return log
    file = _LogFile(folder / runs.LOG)
    formatter = PlainFormatter("%(asctime)sZ %(levelname)s %(message)s")
    formatter.converter = time.gmtime
    file.setFormatter(formatter)
    terminal = logging.StreamHandler()
    terminal.setFormatter(PlainFormatter())
    terminal.addFilter(lambda record: record.levelno == logging.WARNING)
    log.addHandler(file)
    log.addHandler(terminal)
    return log
