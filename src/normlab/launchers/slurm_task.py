"""Train the runs of one job of the SLURM launcher's array: `python -m normlab.launchers.slurm_task order.json`.

In a snapshot of code, `python start.py order.json` does it. Runs that are finished are left alone. When SLURM sends it
a signal to stop, because the time limit is near or another job goes first, the runs under way write their checkpoints,
and it ends with `REQUEUE_STATUS`.
"""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from normlab import runs
from normlab.common import bugs, frozen
from normlab.common.errors import InterruptedRunError, UserError, described
from normlab.common.terminal import say
from normlab.config import schema
from normlab.launchers import pool, preflight, single
from normlab.launchers.slurm import REQUEUE_STATUS, Entry, Order, read_order
from normlab.launchers.sweep import Job
from normlab.runs import State
from normlab.training.distributed.processes import find
from normlab.training.interrupt import SIGNALS


def main(order: Path) -> int:
    """Train the runs of this task; return the exit status: 1 if one is left, `REQUEUE_STATUS` if it was stopped."""
    array, index = (os.environ.get(name, "") for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"))
    code = f", code {place.name}" if (place := frozen.folder()) else ""
    say(f"{runs.now()} job {array}_{index} on {socket.gethostname()}, process {os.getpid()}{code}", flush=True)
    try:
        _handle_signals(_interrupt)
        todo = read_order(order)
        entries = _entries(order, todo, index)
        say(f"Runs of this job: {', '.join(each.name for each in entries)}", flush=True)
        train = _train_together if find().world > 1 else _train_with_pool
        failed = train(entries, todo.slots)
        _handle_signals(signal.SIG_IGN)  # nothing is left to stop
        return 1 if failed else 0
    except (KeyboardInterrupt, InterruptedRunError):
        _handle_signals(signal.SIG_IGN)  # SLURM repeats TERM, and a run that ended has brought the handlers back
        # The job's status is the highest of its processes.
        return REQUEUE_STATUS if os.environ.get("SLURM_PROCID", "0") == "0" else 0
    except UserError as error:
        _handle_signals(signal.SIG_IGN)
        say(error, file=sys.stderr, flush=True)
        return 1
    except Exception as error:
        _handle_signals(signal.SIG_IGN)
        traceback.print_exception(error)
        say(bugs.report(error), file=sys.stderr, flush=True)
        return 1


def _entries(order: Path, todo: Order, index: str) -> list[Entry]:
    """Return the runs of task number `index`, with all settings that there are now, and with names.

    Raises:
        UserError: if there is no such task, or its runs have no settings of runs.
    """
    if not index.isdecimal() or int(index) >= len(todo.tasks):
        raise UserError(
            f"SLURM_ARRAY_TASK_ID={index} is none of the {len(todo.tasks)} tasks in {order}.\n"
            "This command is for the jobs of hydra/launcher=slurm, in which SLURM sets that variable."
        )
    try:
        settings = [runs.completed(entry.settings) for entry in todo.tasks[int(index)]]
        titles = runs.run_names(settings)  # of orders before version 0.5
        entries = [
            Entry(folder=entry.folder, name=entry.name or title, settings=each)
            for entry, title, each in zip(todo.tasks[int(index)], titles, settings, strict=True)
        ]
        names = [(Path(entry.folder).name, runs.run_name(entry.settings)) for entry in entries]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{order} is damaged: task {index} has no settings of runs ({described(error)}).") from None
    for named, own in names:
        if named not in ("", own):
            raise UserError(f"{order} was changed: it names the run {named} and has the settings of another one.")
    return entries


def _interrupt(number: int, _: object) -> NoReturn:
    """Make the first of SLURM's signals a Ctrl-C to this process, and the others nothing: it repeats TERM."""
    # Not by print, which may be at work in the code that the signal interrupts.
    os.write(1, f"{runs.now()} SLURM sends {signal.Signals(number).name}\n".encode())
    _handle_signals(signal.SIG_IGN)
    raise KeyboardInterrupt


def _handle_signals(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _train_with_pool(entries: Sequence[Entry], slots: int) -> bool:
    """Train the runs that are not finished, `slots` at a time; return whether any failed or is trained elsewhere."""
    jobs, failed = [], False
    for each in entries:
        run = runs.Run(each.settings, each.name)
        if run.over:
            continue
        try:
            config = schema.parse(each.settings)
            jobs.append(Job(config, run, preflight.check(config)))
        except UserError as error:  # of this node, as the launcher has checked the rest
            failed = True
            say(f"{run.title}: {error}", file=sys.stderr, flush=True)
            pool.record_end(run, State.FAILED, str(error))
    return any(pool.train_jobs(jobs, slots) if jobs else ()) or failed


def _train_together(entries: Sequence[Entry], slots: int) -> bool:
    """Train the runs that are not finished, each in all processes of this job; return whether any failed."""
    failed = False
    for each in entries:
        try:
            single.train_config(schema.parse(each.settings), title=each.name)
        except UserError as error:
            failed = True
            say(f"{each.name}: {error}", file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
