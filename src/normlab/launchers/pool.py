"""The default launcher: the runs of a sweep in worker processes of this machine."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, open_dict

from normlab import config as schema
from normlab import preflight, runs
from normlab.cli import settings_of
from normlab.errors import InterruptedRunError, RunBusyError, UserError
from normlab.progress import Display, one_line, outcome, span
from normlab.training.interrupt import StopRequest

POLL_SECONDS = 0.5
ELSEWHERE = "left alone"  # another process trains the run


def launch(composed: Sequence[DictConfig], slots: int | None) -> list[float | None]:
    """Check every run of the sweep, skip what is finished, and train the rest, several at a time.

    Returns each run's final test accuracy (test loss where there is none).

    Raises:
        UserError: if a run is misconfigured (before any starts), or at the end if any failed.
    """
    if slots is not None and (not isinstance(slots, int) or slots < 1):
        raise UserError(f"hydra.launcher.slots={slots} is out of range: expected 1 or more, or null.")
    planned = [(config, runs.Run(config.as_dict())) for config in map(_parse, composed)]
    unique = {run.name: (config, run) for config, run in planned}
    waiting = [
        Job(config, run, preflight.check(config).train_images)
        for config, run in unique.values()
        if run.state not in runs.FINISHED
    ]
    if len(waiting) < len(unique):
        print(f"{len(unique) - len(waiting)} of {len(unique)} runs are finished and skipped.", flush=True)
    for job in waiting:
        job.run.freeze()
    failed = _carry_out(waiting, slots) if waiting else []
    if failed:
        lines = [f"  {job.run.folder}/run.log: {why}" for job, why in failed]
        more = [f"  and {len(lines) - 3} more"] if len(lines) > 3 else []
        raise UserError("\n".join([f"{len(failed)} of {len(unique)} runs failed:", *lines[:3], *more]))
    return [_result(run) for _, run in planned]


@dataclass
class Job:
    """One run of the sweep, as the launcher sees it."""

    config: schema.RunConfig
    run: runs.Run
    train_images: int

    @property
    def work(self) -> float:
        """Estimated cost in arbitrary units: images, and a part of each step that no batch size saves."""
        return self.config.epochs * self.train_images * (1 + 16 / self.config.batch) * (self.config.depth or 18)


def _parse(composed: DictConfig) -> schema.RunConfig:
    with open_dict(composed):
        composed.pop("hydra", None)
    return schema.parse(settings_of(composed))


def _result(run: runs.Run) -> float | None:
    status = runs.read_status(run.folder) or {}
    return status.get("test_accuracy", status.get("test_loss"))


class Slot:
    """A worker process with a device and a share of the cores, used for one run after the other."""

    def __init__(self, device: str, threads: int) -> None:
        self.device, self.threads = device, threads
        self.executor: ProcessPoolExecutor | None = None

    def submit(self, job: Job) -> "Future[dict[str, Any]]":
        if self.executor is None:
            spawn = multiprocessing.get_context("spawn")  # a forked CUDA or OpenMP state does not work
            self.executor = ProcessPoolExecutor(1, mp_context=spawn, initializer=_end_with_the_launcher)
        # The worker inherits that it ignores Ctrl-C, which a terminal sends to all: the launcher passes it on.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return self.executor.submit(_work, job.run.config, self.device, self.threads)
        finally:
            signal.signal(signal.SIGINT, before)

    def replace_worker(self) -> None:
        if self.executor:
            self.executor.shutdown(wait=False)
        self.executor = None


def _end_with_the_launcher() -> None:
    """In a worker: leave none behind a launcher that was killed. Its run goes on from its last checkpoint."""

    def wait() -> None:
        launcher = multiprocessing.parent_process()
        if launcher is not None:
            launcher.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _work(settings: dict[str, Any], device: str, threads: int) -> dict[str, Any]:
    """In a worker: one run, from settings that were checked. Torch is imported here."""
    try:
        with StopRequest() as stop:
            from normlab.training.run import Share, carry_out

            return carry_out(schema.parse(settings), stop=stop, share=Share(device, threads))
    except RunBusyError as error:
        return {"state": ELSEWHERE, "error": str(error)}
    except InterruptedRunError as error:
        return {"state": "interrupted", "error": f"by {error}"}
    except UserError as error:
        return {"state": "failed", "error": str(error)}
    except Exception as error:  # with its traceback in run.log
        return {"state": "failed", "error": f"{type(error).__name__}: {error}", "crashed": True}


def _slots(wanted: int | None, jobs: Sequence[Job]) -> list[Slot]:
    """One slot per GPU, or per CPU core; no more than runs, and the cores shared among them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = 0 if all(job.config.device == "cpu" for job in jobs) else preflight.gpu_count()
    number = min(wanted or gpus or cores, len(jobs))
    devices = [f"cuda:{slot % gpus}" if gpus else "cpu" for slot in range(number)]
    return [Slot(device, max(1, cores // number)) for device in devices]


def _carry_out(jobs: Sequence[Job], wanted: int | None) -> list[tuple[Job, str]]:
    """Train all jobs; returns those that were not finished, with the reason."""
    slots = _slots(wanted, jobs)
    queue = deque(jobs)
    active: dict[Future[dict[str, Any]], tuple[Slot, Job]] = {}
    failed: list[tuple[Job, str]] = []
    finished_here = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the workers must not outlive us
    with Display({job.run.name: job.work for job in jobs}) as display:
        kind = (
            "GPU" if slots[0].device != "cpu" else f"CPU, threads of each: {jobs[0].config.threads or slots[0].threads}"
        )
        display.say(f"Runs to train: {len(jobs)}, {len(slots)} at a time ({kind}). Ctrl-C stops after a checkpoint.")
        try:
            free = list(slots)
            while queue or active:
                while queue and free:
                    slot, job = free.pop(), queue.popleft()
                    active[slot.submit(job)] = (slot, job)
                finished, _ = wait(active, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in finished:
                    slot, job = active.pop(future)
                    free.append(slot)
                    status = _status_of(future, slot, job)
                    if status.get("crashed"):  # a CUDA error, say, spoils its process for the next run
                        slot.replace_worker()
                    display.ended(job.run.name, outcome(status))
                    finished_here += status["state"] in runs.FINISHED
                    if status["state"] not in (*runs.FINISHED, ELSEWHERE):
                        failed.append((job, one_line(status.get("error"))))
                for _, job in active.values():
                    with contextlib.suppress(UserError):
                        latest = runs.read_status(job.run.folder)
                        if latest and latest["state"] == "running":
                            display.news(latest)
        except KeyboardInterrupt:
            display.say("Stopping: the runs under way write a checkpoint. The same command goes on from there.")
            for worker in multiprocessing.active_children():
                worker.terminate()  # TERM: a run writes its checkpoint first
            raise
        finally:
            for slot in slots:
                if slot.executor:
                    slot.executor.shutdown(wait=True, cancel_futures=True)
        display.say(f"{finished_here} of {len(jobs)} runs finished in {span(display.elapsed)}.")
    return failed


def _status_of(future: "Future[dict[str, Any]]", slot: Slot, job: Job) -> dict[str, Any]:
    try:
        return future.result()
    except BrokenProcessPool:
        slot.replace_worker()
        with contextlib.suppress(UserError), job.run.lock(wait_seconds=10):  # a process dies piece by piece
            reason = "its process was killed, perhaps for want of memory"
            return job.run.write_status("failed", ended=runs.now(), error=reason)
        return {"state": "failed", "error": "its process was killed"}
