"""The default launcher: the runs of a sweep in worker processes of this machine."""

import contextlib
import multiprocessing
import os
import signal
import socket
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
    jobs = [_job(settings) for settings in composed]
    unique = {job.run.name: job for job in jobs}
    waiting = [job for job in unique.values() if job.run.state not in runs.FINISHED]
    if len(waiting) < len(unique):
        print(f"{len(unique) - len(waiting)} of {len(unique)} runs are finished and skipped.", flush=True)
    for job in waiting:
        job.run.freeze()
    failed = _carry_out(waiting, slots) if waiting else []
    if failed:
        lines = [f"  {job.run.folder}/run.log: {why}" for job, why in failed]
        more = [f"  and {len(lines) - 3} more"] if len(lines) > 3 else []
        raise UserError("\n".join([f"{len(failed)} of {len(unique)} runs failed:", *lines[:3], *more]))
    return [job.result() for job in jobs]


@dataclass
class Job:
    """One run of the sweep, as the launcher sees it."""

    config: schema.RunConfig
    run: runs.Run
    train_images: int

    @property
    def work(self) -> float:
        """Estimated cost in arbitrary units: images, and a part of each step that no batch size saves."""
        return self.config.epochs * self.train_images * (1 + 16 / self.config.batch)

    def result(self) -> float | None:
        status = runs.read_status(self.run.folder) or {}
        return status.get("test_accuracy", status.get("test_loss"))


def _job(composed: DictConfig) -> Job:
    with open_dict(composed):
        composed.pop("hydra", None)
    config = schema.parse(settings_of(composed))
    return Job(config, runs.Run(config.as_dict()), preflight.check(config).train_images)


class Slot:
    """A worker process with a device and a share of the cores, used for one run after the other."""

    def __init__(self, device: str, threads: int) -> None:
        self.device, self.threads = device, threads
        self.executor: ProcessPoolExecutor | None = None

    def submit(self, job: Job) -> "Future[dict[str, Any]]":
        if self.executor is None:
            spawn = multiprocessing.get_context("spawn")  # a forked CUDA or OpenMP state does not work
            self.executor = ProcessPoolExecutor(1, mp_context=spawn, initializer=_quiet_worker)
        device = self.device if job.config.device == "auto" else job.config.device
        settings = {**job.run.config, "device": device, "threads": job.config.threads or self.threads}
        return self.executor.submit(_work, settings)

    def replace_worker(self) -> None:
        if self.executor:
            self.executor.shutdown(wait=False)
        self.executor = None


def _quiet_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides; a run takes Ctrl-C while it trains


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """In a worker: one run, from settings that were checked. Torch is imported here."""
    from normlab.training.run import carry_out

    try:
        return carry_out(schema.parse(settings))
    except RunBusyError as error:
        return {"state": ELSEWHERE, "error": str(error)}
    except InterruptedRunError as error:
        return {"state": "interrupted", "error": f"by {error}"}
    except UserError as error:
        return {"state": "failed", "error": str(error)}
    except Exception as error:  # with its traceback in run.log
        return {"state": "failed", "error": f"{type(error).__name__}: {error}"}


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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the workers must not outlive us
    with Display({job.run.name: job.work for job in jobs}) as display:
        kind = "GPU" if slots[0].device != "cpu" else f"CPU, threads of each: {slots[0].threads}"
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
                    display.ended(job.run.name, outcome(status))
                    if status["state"] not in (*runs.FINISHED, ELSEWHERE):
                        failed.append((job, one_line(status.get("error"))))
                for _, job in active.values():
                    with contextlib.suppress(UserError):
                        latest = runs.read_status(job.run.folder)
                        if latest and latest["state"] == "running":
                            display.news(latest)
        except KeyboardInterrupt:
            display.say("Stopping: the runs under way write a checkpoint. The same command goes on from there.")
            _ask_to_stop(active)
            raise
        finally:
            for slot in slots:
                if slot.executor:
                    slot.executor.shutdown(wait=True, cancel_futures=True)
        display.say(f"{len(jobs) - len(failed)} of {len(jobs)} runs finished in {span(display.elapsed)}.")
    return failed


def _status_of(future: "Future[dict[str, Any]]", slot: Slot, job: Job) -> dict[str, Any]:
    try:
        return future.result()
    except BrokenProcessPool:
        slot.replace_worker()
        with contextlib.suppress(UserError), job.run.lock():
            reason = "its process was killed, perhaps for want of memory"
            return job.run.write_status("failed", ended=runs.now(), error=reason)
        return {"state": "failed", "error": "its process was killed"}


def _ask_to_stop(active: dict["Future[dict[str, Any]]", tuple[Slot, Job]]) -> None:
    """TERM, which may come twice without harm, to every run of this machine that is under way."""
    for _, job in active.values():
        with contextlib.suppress(UserError, OSError):
            status = runs.read_status(job.run.folder)
            if status and status["state"] == "running" and status["host"] == socket.gethostname():
                os.kill(status["pid"], signal.SIGTERM)
