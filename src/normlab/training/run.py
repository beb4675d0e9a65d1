"""One run from its configuration to its record: set up, resumed, trained, and its end recorded."""

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from normlab import loggers, runs
from normlab.common import bugs
from normlab.common.errors import (
    FolderGoneError,
    InterruptedRunError,
    OutOfMemoryError,
    RunBusyError,
    UserError,
    described,
)
from normlab.common.terminal import say
from normlab.config.schema import RunConfig
from normlab.runs.shorter import spread_over_epochs
from normlab.training import checkpoint, device, resume
from normlab.training.checkpoint import weights_sha256
from normlab.training.distributed import checks
from normlab.training.distributed.process_group import ProcessGroup, SingleProcess
from normlab.training.interrupt import StopRequest
from normlab.training.loop import train
from normlab.training.record import OnStatus, Recorder, open_log
from normlab.training.setup import Resources
from normlab.training.supervision import DivergedError

__all__ = ["Resources", "train_run", "weights_sha256"]
_NO_MEMORY = ("not enough memory", "can't allocate memory")  # in errors of PyTorch's allocator for the CPU


def train_run(
    config: RunConfig,
    *,
    stop: StopRequest | None = None,
    resources: Resources = Resources(),  # noqa: B008  # frozen
    on_status: OnStatus = lambda status: None,
    group: ProcessGroup = SingleProcess(),  # noqa: B008  # it has no state
) -> dict[str, Any]:
    """Train a run, or go on with it; return its status.

    A finished run is left alone. However it ends, the run's folder has the outcome. Every process of a `group` calls
    this with the same configuration; the first one writes the run's folder, and all end alike.

    Args:
        stop: may have been entered by the caller, so that a request made while torch was being imported counts.
        on_status: called with the status about once a second, in the first process.

    Raises:
        RunBusyError: if another process is training it.
        UserError: for what the user can mend; any other exception is an error of ours. Both are recorded.
        InterruptedRunError: when a stop was requested; the run can go on later.
    """
    run = (runs.Run if group.is_main else _UnwrittenRun)(config.as_dict(), resources.title)
    run.freeze()
    with run.lock(), contextlib.nullcontext(stop) if stop else StopRequest() as stop:
        if group.broadcast(run.run_id) != run.run_id:
            raise UserError("The processes of this run have different settings.\nStart all with the same command.")
        finished = run.state in runs.FINISHED  # by another process, since the caller looked
        status = group.broadcast((runs.read_status(run.folder) or {}) if finished else None)
        if status is not None:
            if group.is_main:
                checkpoint.remove(run.folder)  # the process that finished it may have been killed before it did
            return status
        checks.check_settings(config, group.world)
        with _open_record(config, run, group, on_status) as recorder:
            started = (runs.read_status(run.folder) or {}).get("started") if run.state != "failed" else None
            on_status(run.write_status("running", started=started or runs.now(), ended=None, error=None))
            with group.shared_errors(), device.stream_for(config, resources.device):
                return _train(config, recorder, stop, resources, group)


@contextlib.contextmanager
def _open_record(config: RunConfig, run: runs.Run, group: ProcessGroup, on_status: OnStatus) -> Iterator[Recorder]:
    """Open the record of a run; an error that ends the run is recorded before the record is closed."""
    log = open_log(run.folder, write=group.is_main)
    logger = loggers.start_logger(config.logger, run, log.warning) if group.is_main else loggers.Logger()
    try:
        if group.is_main:
            group.on_hang(lambda why: say(_recorded(UserError(why), run, log), file=sys.stderr, flush=True))
        yield Recorder(run, log, logger, on_status)
    except RunBusyError as error:  # taken over: the record is another process's now
        log.info("%s", error)
        raise
    except InterruptedRunError as error:
        log.info("interrupted by %s", error)
        run.write_status("interrupted", ended=runs.now(), error=f"by {error}")
        group.barrier()  # torchrun ends the others when the first has ended: only once all is written
        raise
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if group.is_main and not run.folder.exists():  # whatever failed first for want of it
            raise FolderGoneError(run.folder) from None
        recorded = _recorded(error, run, log)
        if recorded is error:
            raise
        raise recorded from error
    finally:
        group.on_hang(lambda why: None)
        logger.end()
        for handler in log.handlers:
            handler.close()


def _train(
    config: RunConfig, recorder: Recorder, stop: StopRequest, resources: Resources, group: ProcessGroup
) -> dict[str, Any]:
    state, saved = resume.start(config, recorder, resources, group)
    if saved:
        of = f" of {saved.shorter.folder.name}" if saved.shorter else ""
        log, position = recorder.log, state.position
        log.info("going on at epoch %d, batch %d, from %s%s", position.epoch + 1, position.batch, saved.path.name, of)
    recorder.start(state, saved.made if saved else None, saved.shorter if saved else None)
    try:
        train(state, recorder, stop)
    except DivergedError as error:
        recorder.log.info("%s", error)
        return recorder.end(state, "diverged", {"diverged_step": error.step, "error": str(error)})
    step, folder = state.step, recorder.run.folder
    if config.save_weights and group.is_main:
        weights = (step.averaged.module if step.averaged else step.network).state_dict()  # those that were evaluated
        checkpoint.save_weights(folder / "weights.pt", weights)
    extensible = not (spread_over_epochs(config.as_dict()) or resume.follows_progress(step.network))
    recorder.correct(state)
    recorder.keep(state, extensible if config.keep_checkpoint is None else config.keep_checkpoint)
    return recorder.end(state, "done", {"weights_sha256": weights_sha256(step.network)})


def _recorded(error: BaseException, run: runs.Run, log: logging.Logger) -> BaseException:
    """Record the error that ends a run; return it, or the sentence that stands for it where memory was short."""
    log.error("%s", error, exc_info=not isinstance(error, UserError) or error.__cause__ is not None)
    message = described(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in message for sign in _NO_MEMORY):
        message = (
            "The run does not fit into the memory of its device.\n"
            "Use a smaller batch, fewer runs at a time (hydra.launcher.slots=1), or another device."
        )
        error = OutOfMemoryError(message)
    gone = isinstance(error, KeyboardInterrupt | BrokenPipeError)  # who started it, or who read what it printed
    if not gone and not isinstance(error, UserError):
        log.error("%s", bugs.report(error))
    run.write_status("interrupted" if gone else "failed", ended=runs.now(), error=message)
    return error


class _UnwrittenRun(runs.Run):
    """A run as all its processes but the first have it: nothing is written to its folder."""

    def freeze(self) -> None:
        pass

    @contextlib.contextmanager
    def lock(self, wait_seconds: float = 0) -> Iterator[None]:
        yield

    def write_status(self, state: str, *, durable: bool = True, **facts: Any) -> dict[str, Any]:
        return {}

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        pass

    def keep_rows_until(self, evaluated: int, step: int) -> list[str]:
        return []
