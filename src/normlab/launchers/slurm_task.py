"""One job of the SLURM launcher's array, started by SLURM: python -m normlab.launchers.slurm_task order.json

It carries out the runs that the order has for it, but for those that are finished. When SLURM tells it to stop, because
the time limit is near or another job goes first, the runs under way write their checkpoints, and it ends with `AGAIN`.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from normlab import runs
from normlab.common.errors import InterruptedRunError, UserError
from normlab.config import schema
from normlab.launchers import pool, preflight, single
from normlab.launchers.slurm import AGAIN
from normlab.launchers.sweep import NEW, Job
from normlab.runs import files
from normlab.training.distributed.processes import find


def main(order: Path) -> int:
    """Returns the exit status: 1 if a run failed, `AGAIN` if it was told to stop."""
    task = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    print(f"{runs.now()} job {task} on {socket.gethostname()}, process {os.getpid()}", flush=True)
    try:
        _hear_one_request_to_stop()
        todo = files.read_json(order)
        failed = _carry_out(todo["tasks"][int(os.environ["SLURM_ARRAY_TASK_ID"])], todo["slots"])
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop
        return 1 if failed else 0
    except (KeyboardInterrupt, InterruptedRunError):
        return AGAIN if os.environ.get("SLURM_PROCID", "0") == "0" else 0  # the job's status is the highest of all
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return 1


def _hear_one_request_to_stop() -> None:
    """Make the first of SLURM's signals a Ctrl-C to this process, and the others nothing: it sends several, and TERM
    over and over. They are blocked in all threads, so that processes inherit that they wait until they are ready.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, pool.STOPS)
    resource_tracker.ensure_running()  # of multiprocessing, and now: starting it unblocks TERM until Python 3.12
    signal.pthread_sigmask(signal.SIG_BLOCK, pool.STOPS)

    def wait() -> None:
        number = signal.sigwait(pool.STOPS)
        print(f"{runs.now()} SLURM sends {signal.Signals(number).name}", flush=True)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        while True:
            signal.sigwait(pool.STOPS)

    threading.Thread(target=wait, daemon=True).start()


def _carry_out(share: Sequence[dict[str, Any]], slots: int) -> bool:
    """Train the runs of this job that are not finished; returns whether any failed."""
    settings = [runs.completed(entry["settings"]) for entry in share]
    if find().world > 1:
        failures = [_fails(schema.parse(each)) for each in settings]
        return any(failures)
    jobs, failed = [], False
    for each in settings:
        run = runs.Run(each)
        if run.over:
            continue
        try:
            config = schema.parse(each)
            jobs.append(Job(config, run, preflight.check(config), NEW))
        except UserError as error:  # of this node, as the launcher has checked the rest
            failed = True
            print(f"{run.name}: {error}", file=sys.stderr, flush=True)
            with contextlib.suppress(UserError), run.lock():
                run.write_status("failed", ended=runs.now(), error=str(error))
    return bool(pool.carry_out(jobs, slots) if jobs else []) or failed


def _fails(config: schema.RunConfig) -> bool:
    """Train a run in all processes of this job together, if it is not finished; returns whether it failed."""
    try:
        single.train(config)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return True
    return False


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
