"""Train the runs of one job of the SLURM launcher's array: `python -m normlab.launchers.slurm_task order.json`.

Runs that are finished are left alone. When SLURM sends it a signal to stop, because the time limit is near or another
job goes first, the runs under way write their checkpoints, and it ends with `REQUEUE_STATUS`.
"""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from normlab import runs
from normlab.common import bugs
from normlab.common.errors import InterruptedRunError, UserError
from normlab.config import schema
from normlab.launchers import pool, preflight, single
from normlab.launchers.slurm import REQUEUE_STATUS
from normlab.launchers.sweep import Job
from normlab.runs import State, files
from normlab.training.distributed.processes import find, number_in
from normlab.training.interrupt import SIGNALS


def main(order: Path) -> int:
    """Train the runs of this task; return the exit status: 1 if one is left, `REQUEUE_STATUS` if it was stopped."""
    index = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    task = f"{os.environ.get('SLURM_ARRAY_JOB_ID', '')}_{index}"
    print(f"{runs.now()} job {task} on {socket.gethostname()}, process {os.getpid()}", flush=True)
    try:
        _handle_signals(_interrupt)
        todo = files.read_json(order)
        chosen = todo["tasks"][number_in("SLURM_ARRAY_TASK_ID", os.environ, range(len(todo["tasks"])))]
        settings = [runs.completed(entry["settings"]) for entry in chosen]
        train = _train_together if find().world > 1 else _train_with_pool
        failed = train(settings, todo["slots"])
        _handle_signals(signal.SIG_IGN)  # nothing is left to stop
        return 1 if failed else 0
    except (KeyboardInterrupt, InterruptedRunError):
        _handle_signals(signal.SIG_IGN)  # SLURM repeats TERM, and a run that ended has brought the handlers back
        # The job's status is the highest of its processes.
        return REQUEUE_STATUS if os.environ.get("SLURM_PROCID", "0") == "0" else 0
    except UserError as error:
        _handle_signals(signal.SIG_IGN)
        print(error, file=sys.stderr, flush=True)
        return 1
    except Exception as error:
        _handle_signals(signal.SIG_IGN)
        traceback.print_exception(error)
        print(bugs.report(error), file=sys.stderr, flush=True)
        return 1


def _interrupt(number: int, _: object) -> NoReturn:
    """Make the first of SLURM's signals a Ctrl-C to this process, and the others nothing: it repeats TERM."""
    # Not by print, which may be at work in the code that the signal interrupts.
    os.write(1, f"{runs.now()} SLURM sends {signal.Signals(number).name}\n".encode())
    _handle_signals(signal.SIG_IGN)
    raise KeyboardInterrupt


def _handle_signals(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _train_with_pool(settings: Sequence[Mapping[str, Any]], slots: int) -> bool:
    """Train the runs that are not finished, `slots` at a time; return whether any failed or is trained elsewhere."""
    jobs, failed = [], False
    for each in settings:
        run = runs.Run(each)
        if run.over:
            continue
        try:
            config = schema.parse(each)
            jobs.append(Job(config, run, preflight.check(config)))
        except UserError as error:  # of this node, as the launcher has checked the rest
            failed = True
            print(f"{run.name}: {error}", file=sys.stderr, flush=True)
            pool.record_end(run, State.FAILED, str(error))
    return any(pool.train_jobs(jobs, slots) if jobs else ()) or failed


def _train_together(settings: Sequence[Mapping[str, Any]], slots: int) -> bool:
    """Train the runs that are not finished, each in all processes of this job; return whether any failed."""
    failed = False
    for each in settings:
        try:
            single.train_config(schema.parse(each))
        except UserError as error:
            failed = True
            print(error, file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
