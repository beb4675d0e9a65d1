"""The default launcher: the runs of a sweep in worker processes of this machine."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from normlab import runs
from normlab.common.cpu import cores
from normlab.common.errors import InterruptedRunError, OutOfMemoryError, RunBusyError, UserError
from normlab.common.progress import Display, one_line, span
from normlab.config import schema
from normlab.launchers import preflight
from normlab.launchers.sweep import Job, Sweep
from normlab.training.interrupt import StopRequest

if TYPE_CHECKING:
    from normlab.training.run import Resources

POLL_SECONDS = 0.5
PACK = 8  # runs that a process trains at a time on a GPU
DYING_SECONDS = 10.0  # a process dies piece by piece, and lets go of its run last
ELSEWHERE = "left alone"  # another process trains the run
STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # as Ctrl-C: workers must not outlive us


def launch(sweep: Sweep, slots: int | None, per_gpu: int, pack: int | None = None) -> list[float | None]:
    """Train what is left of a sweep, several runs at a time; returns every run's result.

    Raises:
        UserError: at the end, if any run failed.
    """
    sweep.say_what_is_skipped()
    for job in sweep.jobs:
        job.run.freeze()
    failed = carry_out(sweep.jobs, slots, per_gpu, pack) if sweep.jobs else []
    if failed:
        raise UserError(f"{len(failed)} of {sweep.number} runs failed. The same command tries them again.")
    return sweep.results()


class Slot:
    """A worker process with a device and a share of the cores, for one run after the other, `pack` at a time."""

    def __init__(self, device: str, threads: int, pack: int = 1) -> None:
        self.device, self.threads, self.pack = device, threads, pack
        self.voice: Connection | None = None  # for what the worker prints, where it must not print by itself
        self.executor: ProcessPoolExecutor | None = None

    def submit(self, jobs: Sequence[Job]) -> "Future[list[dict[str, Any]]]":
        if self.executor is None:
            spawn = multiprocessing.get_context("spawn")  # a forked CUDA or OpenMP state does not work
            given = (self.threads, self.voice)
            self.executor = ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin, initargs=given)
        # A worker inherits that requests to stop have to wait, until `_begin` is prepared for them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, *STOPS))
        try:
            settings = [job.config.as_dict() for job in jobs]
            return self.executor.submit(_work, settings, self.device, self.threads, self.pack)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def replace_worker(self) -> None:
        if self.executor:
            self.executor.shutdown(wait=False)
        self.executor = None


def begin(threads: int) -> None:
    """In a worker, before torch is imported: its share of the cores, also for libraries that ask nobody."""
    os.environ["OMP_NUM_THREADS"] = str(threads)

    def wait() -> None:  # leave none behind a launcher that was killed: its run goes on from its last checkpoint
        launcher = multiprocessing.parent_process()
        if launcher is not None:
            launcher.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


_stop = StopRequest()  # a worker's; of its run under way and of all that might follow


def _begin(threads: int, voice: Connection | None) -> None:
    """In a worker of the pool: ready for requests to stop, which SLURM sends to it as well as to the launcher."""
    if voice:
        for stream in (1, 2):
            os.dup2(voice.fileno(), stream)
        voice.close()
    begin(threads)
    _stop.__enter__()
    for number in (signal.SIGINT, signal.SIGHUP):  # from a terminal, to all: the launcher passes them on
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, *STOPS))


def _work(settings: list[dict[str, Any]], device: str, threads: int, pack: int) -> list[dict[str, Any]]:
    """In a worker: runs from settings that were checked. Torch is imported here, by the worker's first run."""
    from normlab.training import packing
    from normlab.training.device import choose
    from normlab.training.run import Resources

    configs = [schema.parse(one) for one in settings]
    if len(configs) == 1:
        return [_carry_out(configs[0], Resources(device, threads))]
    loaded: dict[object, Any] = {}
    return packing.train_packed(
        configs,
        pack,
        choose(configs[0].device, device),
        lambda config, interleaver: _carry_out(config, Resources(device, threads, interleaver, loaded)),
    )


def _carry_out(config: schema.RunConfig, resources: "Resources") -> dict[str, Any]:
    from normlab.training.run import train_run

    if _stop.requested:
        return {"state": "interrupted", "error": f"by {_stop.requested}"}
    try:
        return train_run(config, stop=_stop, resources=resources)
    except RunBusyError as error:
        return {"state": ELSEWHERE, "error": str(error)}
    except InterruptedRunError as error:
        return {"state": "interrupted", "error": f"by {error}"}
    except OutOfMemoryError as error:
        return {"state": "failed", "error": str(error), "out_of_memory": True}
    except UserError as error:
        return {"state": "failed", "error": str(error)}
    except Exception as error:  # with its traceback in run.log
        return {"state": "failed", "error": f"{type(error).__name__}: {error}", "crashed": True}


def slots_for(jobs: Sequence[Job], wanted: int | None, per_gpu: int, pack: int | None = None) -> list[Slot]:
    """`wanted` slots, or `per_gpu` for each GPU, or one per CPU core; no more than jobs, and the cores shared.

    Raises:
        UserError: for a number out of range.
    """
    for setting, value in (("slots", wanted), ("per_gpu", per_gpu), ("pack", pack)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"hydra.launcher.{setting}={value} is out of range: expected 1 or more.")
    gpus = 0 if all(job.config.device == "cpu" for job in jobs) else preflight.gpu_count()
    number = min(wanted or gpus * per_gpu or cores(), len(jobs))
    devices = [f"cuda:{slot % gpus}" if gpus else "cpu" for slot in range(number)]
    return [Slot(device, max(1, cores() // number), pack or (PACK if gpus else 1)) for device in devices]


def packs(jobs: Sequence[Job], slots: Sequence[Slot]) -> list[list[Job]]:
    """What the slots are given, one list after the other, the longest first: a short one at the end leaves fewer of
    them idle. Runs of one list are trained by one process, and have the settings in common that are a process's.
    """
    jobs = sorted(jobs, key=lambda job: -job.work)
    if not slots or slots[0].pack == 1:
        return [[job] for job in jobs]
    alike: dict[Hashable, list[Job]] = defaultdict(list)
    for job in jobs:
        config = job.config
        alike[_alone(job), config.device, config.precision, config.deterministic, config.threads].append(job)
    dealt = [group[first :: len(slots)] for group in alike.values() for first in range(len(slots))]
    return sorted(filter(None, dealt), key=lambda pack: -sum(job.work for job in pack))


def _alone(job: Job) -> str:
    """The name of a run that keeps a device busy by itself, or would keep others waiting; else nothing."""
    dataset = job.config.dataset
    streamed = isinstance(dataset, schema.FolderDataset) and dataset.storage != "memory"
    return job.run.name if streamed or job.config.engine == "compile" else ""


def carry_out(
    jobs: Sequence[Job], wanted: int | None = None, per_gpu: int = 1, pack: int | None = None
) -> list[tuple[Job, str]]:
    """Train all jobs, several at a time; returns those that were not finished, with the reason, once it has told them.

    What runs out of memory beside others is tried again with its device to itself.

    Raises:
        KeyboardInterrupt: when asked to stop (by Ctrl-C or one of `STOPS`), after the runs under way wrote their
            checkpoints; at once when asked twice.
    """
    slots = slots_for(jobs, wanted, per_gpu, pack)
    work, quiet = {job.run.name: job.work for job in jobs}, all(job.config.quiet for job in jobs)
    with Display(work, quiet=quiet) as display, display.hearing() as voice, _stops():
        where = "GPU" if slots[0].device != "cpu" else "CPU"
        threads = jobs[0].config.threads or slots[0].threads
        number = min(len(jobs), sum(slot.pack for slot in slots))
        display.say(
            f"Runs to train: {len(jobs)}, {number} at a time ({where}, threads of each: {threads})."
            " Ctrl-C stops after a checkpoint."
        )
        pool = _Pool(slots, display, voice)
        failed, crowded = pool.carry_out(jobs)
        if crowded:
            alone = slots_for(crowded, len({slot.device for slot in slots}), 1, 1)
            display.say(f"Tried again with a device of their own: {len(crowded)}")
            more, _ = _Pool(alone, display, voice).carry_out(crowded)
            failed += more
        finished = sum(job.run.state in runs.FINISHED for job in jobs)
        display.say(f"{finished} of {len(jobs)} runs finished in {span(display.elapsed)}.")
        if failed:
            display.warn("Failed:")
        for job, why in failed:
            display.warn(f"  {job.run.folder / runs.LOG}: {why}")
    return failed


@contextmanager
def _stops() -> Iterator[None]:
    """Inside, a request to stop from a scheduler or a closed terminal is as one from the keyboard."""
    before = {number: signal.getsignal(number) for number in STOPS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup has its reasons
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Pool:
    """Slots, and the jobs that they have under way."""

    def __init__(self, slots: list[Slot], display: Display, voice: Connection | None) -> None:
        self.slots, self.display = slots, display
        for slot in slots:
            slot.voice = voice
        self.active: dict[Future[list[dict[str, Any]]], tuple[Slot, list[Job]]] = {}
        several = Counter(slot.device for slot in slots for _ in range(slot.pack))
        self.shared = {device for device, number in several.items() if number > 1}

    def carry_out(self, jobs: Sequence[Job]) -> tuple[list[tuple[Job, str]], list[Job]]:
        """Train all jobs; returns those that failed, with the reason, and those that might not fail alone: that ran out
        of a shared memory, say.
        """
        queue, free = deque(packs(jobs, self.slots)), list(self.slots)
        failed: list[tuple[Job, str]] = []
        crowded: list[Job] = []
        told: set[str] = set()

        def end(job: Job, status: dict[str, Any], slot: Slot) -> None:
            if job.run.name in told:
                return
            told.add(job.run.name)
            beside_others = status.get("out_of_memory") or (status.get("crashed") and slot.pack > 1)
            if status["state"] == "failed" and beside_others and slot.device in self.shared:
                crowded.append(job)
                self.display.put_off(job.run.name, f"{one_line(status['error'])} Tried again alone, later.")
                return
            self.display.ended(job.run.name, status)
            if status["state"] not in (*runs.FINISHED, ELSEWHERE):
                failed.append((job, one_line(status.get("error"))))

        try:
            while queue or self.active:
                while queue and free:
                    slot, pack = free.pop(), queue.popleft()
                    self.active[slot.submit(pack)] = (slot, pack)
                finished, _ = wait(self.active, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in finished:
                    slot, pack = self.active.pop(future)
                    free.append(slot)
                    statuses = self._statuses_of(future, slot, pack)
                    if any(status.get("crashed") for status in statuses):  # a CUDA error, say, spoils its process
                        slot.replace_worker()
                    for job, status in zip(pack, statuses, strict=True):
                        end(job, status, slot)
                for slot, pack in self.active.values():
                    for job in pack:
                        with contextlib.suppress(UserError):
                            latest = runs.read_status(job.run.folder) if job.run.name not in told else None
                            if latest and latest["state"] == "running":
                                self.display.news(latest)
                            elif latest and latest["state"] in runs.FINISHED and len(pack) > 1:
                                end(job, latest, slot)
        except KeyboardInterrupt:
            self._stop()
            raise
        finally:
            for slot in self.slots:
                if slot.executor:
                    slot.executor.shutdown(wait=True, cancel_futures=True)
        return failed, crowded

    def _stop(self) -> None:
        """Let the runs under way write a checkpoint; a second request in the meantime ends them at once."""
        self.display.say("Stopping: the runs under way write a checkpoint. Once more stops at once.")
        try:
            for worker in multiprocessing.active_children():
                worker.terminate()  # TERM: a run writes its checkpoint first
            wait(self.active)
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.kill()
            for job in (job for _, pack in self.active.values() for job in pack):
                with contextlib.suppress(UserError), job.run.lock(wait_seconds=DYING_SECONDS):
                    if job.run.state == "running":
                        job.run.write_status("interrupted", ended=runs.now(), error="stopped at once")

    def _statuses_of(self, future: "Future[list[dict[str, Any]]]", slot: Slot, pack: list[Job]) -> list[dict[str, Any]]:
        try:
            return future.result()
        except BrokenProcessPool:
            slot.replace_worker()
            return [self._killed(job) for job in pack]

    def _killed(self, job: Job) -> dict[str, Any]:
        """The status of a run whose process is not there any more."""
        failed: dict[str, Any] = {
            "state": "failed",
            "error": "its process was killed, perhaps for want of memory",
        }
        with contextlib.suppress(UserError), job.run.lock(wait_seconds=DYING_SECONDS):
            if job.run.state in runs.FINISHED:  # and killed after that
                return runs.read_status(job.run.folder) or failed
            failed = job.run.write_status(ended=runs.now(), **failed)
        return failed | {"out_of_memory": True}
