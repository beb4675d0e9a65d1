"""The default launcher: train the runs of a sweep in worker processes of this machine."""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, TypeVar

from normlab import runs
from normlab.common import bugs
from normlab.common.cpu import cores
from normlab.common.download import DOWNLOADING
from normlab.common.errors import InterruptedRunError, OutOfMemoryError, RunBusyError, UserError, as_typed
from normlab.common.installation import command_name, study_words
from normlab.common.progress import Display, one_line
from normlab.common.terminal import say
from normlab.config import schema
from normlab.launchers import preflight, sharing
from normlab.launchers.sweep import Job, Sweep, list_failures
from normlab.runs import State
from normlab.training.interrupt import SIGNALS, StopRequest

if TYPE_CHECKING:
    from normlab.training.run import Resources

POLL_SECONDS = 0.5
DYING_SECONDS = 10.0  # until a killed process has released the lock of its run
ELSEWHERE = "left alone"  # another process trains the run
Status = dict[str, Any]
T = TypeVar("T")


def launch(sweep: Sweep, slots: int | None, per_gpu: int | None, pack: int | None, mps: bool) -> list[float | None]:
    """Train what is left of a sweep, several runs at a time; return every run's result.

    Raises:
        UserError: for a number out of range; at the end, if any run failed, or is not finished because another process
            trains it.
    """
    sweep.report_known()
    failed, elsewhere = train_jobs(sweep.jobs, slots, per_gpu, pack, mps=mps, check=True) if sweep.jobs else ([], [])
    if failed:
        raise UserError(f"{len(failed)} of {len(sweep)} runs failed. The same command tries them again.")
    if elsewhere:
        raise UserError(
            f"{len(elsewhere)} of {len(sweep)} runs are not finished: other processes train them, and they were left"
            f" alone.\nTo see how far they are: {command_name('report')} status"
            f" {study_words(elsewhere[0].config.study, elsewhere[0].config.output_dir)}"
        )
    return sweep.results()


class Worker:
    """A process with a device and a part of the cores, which trains one run (or pack of runs) after the other.

    Args:
        device: cpu or cuda:N.
        threads: CPU threads of each run.
        pack: runs that it trains at a time.
        output: where its stdout and stderr go; None: where those of this process go.
    """

    def __init__(self, device: str, threads: int, pack: int = 1, output: Connection | None = None) -> None:
        self.device, self.threads, self.pack, self.output = device, threads, pack, output
        self._executor: ProcessPoolExecutor | None = None

    def submit(self, function: Callable[..., T], *arguments: object) -> "Future[T]":
        """Call `function` in the process, which is started if there is none."""
        # A process inherits that signals are blocked, until it has handlers for them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        resource_tracker.ensure_running()  # of multiprocessing, and now: starting it unblocks TERM until Python 3.12
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            if self._executor is None:
                spawn = multiprocessing.get_context("spawn")  # a forked CUDA or OpenMP state does not work
                given = (self.threads, self.pack, self.output)
                self._executor = ProcessPoolExecutor(1, mp_context=spawn, initializer=_start_worker, initargs=given)
            return self._executor.submit(function, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self, *, wait: bool = True) -> None:
        """End the process when it has nothing left to do; another one is started when needed."""
        if self._executor:
            self._executor.shutdown(wait=wait, cancel_futures=wait)
        self._executor = None


_stop = StopRequest()  # of a worker: for its run under way and all that might follow


def _start_worker(threads: int, pack: int, output: Connection | None) -> None:
    """Prepare a process, before it imports torch."""
    if output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        output.close()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # also for libraries that take no argument
    if pack > 1:  # each run has a stream, and streams beyond the connections to a GPU wait for each other
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    threading.Thread(target=_exit_with_launcher, daemon=True).start()
    _stop.__enter__()  # SLURM sends signals to workers as well as to the launcher
    for number in (signal.SIGINT, signal.SIGHUP):  # from a terminal, to all: the launcher passes them on
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _exit_with_launcher() -> None:
    """End this process when its launcher is killed: the run goes on from its last checkpoint."""
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        launcher.join()
        os._exit(1)


def _train_pack(
    configs: list[schema.RunConfig], titles: list[str], device: str, threads: int, pack: int
) -> list[Status]:
    """Train runs, in a worker; return their statuses."""
    from normlab.training import packing  # imports torch, here by the worker's first run
    from normlab.training.device import choose, release_memory
    from normlab.training.run import Resources

    if len(configs) == 1:
        status = _train(configs[0], Resources(device, threads, title=titles[0]))
        with contextlib.suppress(RuntimeError):  # of CUDA, which the next run will tell
            release_memory(choose(configs[0].device, device))  # for other processes of the device
        return [status]
    loaded: dict[object, Any] = {}
    of_run = {id(config): title for config, title in zip(configs, titles, strict=True)}
    return packing.train_packed(
        configs,
        pack,
        choose(configs[0].device, device),
        lambda config, interleaver: _train(config, Resources(device, threads, interleaver, loaded, of_run[id(config)])),
    )


def _train(config: schema.RunConfig, resources: "Resources") -> Status:
    from normlab.training.packing import crashed
    from normlab.training.run import train_run

    if _stop.requested:
        return {"state": State.INTERRUPTED, "error": f"by {_stop.requested}"}
    try:
        return train_run(config, stop=_stop, resources=resources)
    except RunBusyError as error:
        return {"state": ELSEWHERE, "error": str(error)}
    except InterruptedRunError as error:
        return {"state": State.INTERRUPTED, "error": f"by {error}"}
    except UserError as error:
        return {"state": State.FAILED, "error": str(error), "out_of_memory": isinstance(error, OutOfMemoryError)}
    except (Exception, SystemExit) as error:  # with its traceback in run.log
        return crashed(error)


def check_networks(jobs: Sequence[Job], here: bool = True) -> list[str]:
    """Check that the networks of runs take their batches, in a worker; return sentences about how they will start.

    Args:
        jobs: the runs.
        here: whether they will be on this machine.

    Raises:
        UserError: for the first that does not.
    """
    from normlab.training import device, shapes  # imports torch, as the runs will

    said: list[str] = []

    def note(sentence: str) -> None:
        if not sentence.startswith(DOWNLOADING):
            said.append(sentence)
        elif not all(job.config.quiet for job in jobs):
            say(sentence, file=sys.stderr, flush=True)  # at once, as it takes a while

    if here and any(job.config.device == "auto" for job in jobs) and (idle := device.left_idle()):
        note(idle)
    shapes.check_sweep([(job.config, job.data) for job in jobs], note)
    return said


check_elsewhere = functools.partial(check_networks, here=False)  # for runs on another machine, or on none


def print_once(jobs: Sequence[Job], sentences: Iterable[str]) -> None:
    """Print each sentence once, unless all runs are quiet."""
    if not all(job.config.quiet for job in jobs):
        for sentence in dict.fromkeys(sentences):
            say(sentence, flush=True)


def check_in_worker(jobs: Sequence[Job], check: Callable[[Sequence[Job]], T]) -> T | None:
    """Check the networks of runs by `check`, such as `check_networks`, in a process of its own: torch imports slowly.

    Returns:
        What `check` does; None if its process was killed.

    Raises:
        UserError: for the first network that does not take its batches.
    """
    worker = Worker("cpu", cores())
    try:
        with contextlib.suppress(BrokenProcessPool):  # for want of memory, say: the runs will tell
            return worker.submit(check, jobs).result()
    finally:
        worker.close()
    return None


def workers_for(
    jobs: Sequence[Job], slots: int | None, per_gpu: int | None = None, pack: int | None = None
) -> list[Worker]:
    """Return `slots` workers, or `per_gpu` for each GPU, or one per CPU core; no more than jobs, and the cores shared.

    What is None is chosen (`sharing.choose`).

    Raises:
        UserError: for a number out of range.
    """
    for setting, value in {"slots": slots, "per_gpu": per_gpu, "pack": pack}.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"hydra.launcher.{setting}={as_typed(value)} is out of range: expected 1 or more.")
    gpus = 0 if all(job.config.device == "cpu" for job in jobs) else preflight.gpu_count()
    per_gpu, pack = sharing.choose(jobs, gpus, slots, per_gpu, pack)
    number = min(slots or gpus * per_gpu or cores(), len(jobs))
    devices = [f"cuda:{index % gpus}" if gpus else "cpu" for index in range(number)]
    return [Worker(device, max(1, cores() // number), pack) for device in devices]


def at_a_time(jobs: Sequence[Job], workers: Sequence[Worker]) -> tuple[int, str]:
    """Return how many of the jobs are trained at a time, and that in words."""
    number = min(len(jobs), sum(worker.pack for worker in workers))
    processes = f" in {len(workers)} processes" if len(workers) > 1 else " in one process"
    return number, f"{number} at a time{processes * (number > len(workers))}"


def packs_for(jobs: Sequence[Job], workers: Sequence[Worker]) -> list[list[Job]]:
    """Divide jobs into packs, each for one process, the most expensive first.

    A short one at the end leaves fewer workers idle. Runs of a pack have the settings in common that are a process's.
    """
    jobs = sorted(jobs, key=lambda job: -job.cost)
    if not workers or workers[0].pack == 1:
        return [[job] for job in jobs]
    alike: dict[Hashable, list[Job]] = defaultdict(list)
    for job in jobs:
        config = job.config
        alone = job.key if sharing.keeps_to_itself(job) else ""
        alike[alone, config.device, config.precision, config.deterministic, config.threads].append(job)
    dealt = [group[first :: len(workers)] for group in alike.values() for first in range(len(workers))]
    return sorted(filter(None, dealt), key=lambda pack: -sum(job.cost for job in pack))


def train_jobs(
    jobs: Sequence[Job],
    slots: int | None = None,
    per_gpu: int | None = None,
    pack: int | None = None,
    *,
    mps: bool = False,
    check: bool = False,
) -> tuple[list[tuple[Job, str]], list[Job]]:
    """Train all jobs, several at a time; list those that were not finished.

    Runs that run out of memory beside others are tried again with a device to themselves.

    Args:
        jobs: what is left to train.
        slots, per_gpu, pack: how many at a time; None: as `workers_for` chooses.
        mps: whether processes of a GPU share it by NVIDIA's MPS, where that works.
        check: whether to check first that each network takes its batches.

    Returns:
        Those that failed, with the reason; those that another process trains and has not finished.

    Raises:
        UserError: for a number out of range; for a network that does not, before any run has a folder.
        KeyboardInterrupt: after a request to stop (any of `SIGNALS`), once the runs under way wrote their checkpoints;
            at once after a second one.
    """
    workers = workers_for(jobs, slots, per_gpu, pack)
    names, costs = {job.key: job.run.title for job in jobs}, {job.key: job.cost for job in jobs}
    quiet = all(job.config.quiet for job in jobs)
    with Display(names, costs, quiet=quiet) as display, display.hearing() as output, _signals_interrupt():
        where = "GPU" if workers[0].device != "cpu" else "CPU"
        threads = jobs[0].config.threads or workers[0].threads
        shared = len({worker.device for worker in workers}) < len(workers) and where == "GPU"
        with sharing.mps(mps, shared, display.say):
            pool = _Pool(workers, display, output)
            if check:
                pool.check(jobs)
            display.say(
                f"Runs to train: {len(jobs)}, {at_a_time(jobs, workers)[1]} ({where}, threads of each: {threads})."
                " Ctrl-C stops after a checkpoint."
            )
            for job in jobs:
                job.run.freeze()
            pool.train(jobs)
        failed, elsewhere = pool.failed, pool.elsewhere
        if pool.crowded:
            display.say(f"Tried again with a device of their own: {len(pool.crowded)}")
            devices = len({worker.device for worker in workers})
            alone = _Pool(workers_for(pool.crowded, devices), display, output)
            alone.train(pool.crowded)
            failed, elsewhere = failed + alone.failed, elsewhere + alone.elsewhere
        list_failures(display, jobs, "Failed:", failed)
    return failed, [job for job in elsewhere if job.run.state not in runs.FINISHED]


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Treat a request to stop from a scheduler or a closed terminal as Ctrl-C: workers must not outlive this process.

    Signals that are ignored (as with nohup) or handled already are left alone.
    """
    unhandled = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in unhandled:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in unhandled:
            signal.signal(number, signal.SIG_DFL)


class _Pool:
    """Workers, and the runs that they train.

    Attributes:
        failed: runs that were not finished, with the reason.
        elsewhere: runs that another process trains.
        crowded: runs that failed beside others and may not fail alone: for want of memory, say.
    """

    def __init__(self, workers: Sequence[Worker], display: Display, output: Connection | None) -> None:
        self.failed: list[tuple[Job, str]] = []
        self.elsewhere: list[Job] = []
        self.crowded: list[Job] = []
        self._workers, self._display = workers, display
        for worker in workers:
            worker.output = output
        runs_of = Counter(worker.device for worker in workers for _ in range(worker.pack))
        self._shared = {device for device, number in runs_of.items() if number > 1}
        self._active: dict[Future[list[Status]], tuple[Worker, list[Job]]] = {}
        self._ended: set[str] = set()  # keys of jobs

    def check(self, jobs: Sequence[Job]) -> None:
        """Check in all workers that the networks take their batches.

        Raises:
            UserError: for the first that does not.
        """
        share = -(-len(jobs) // len(self._workers))
        try:
            checks = [
                worker.submit(check_networks, jobs[number * share : (number + 1) * share])
                for number, worker in enumerate(self._workers)
            ]
            said: list[str] = []
            for future in checks:
                with contextlib.suppress(BrokenProcessPool):  # for want of memory, say: the runs will tell
                    said += future.result()
            for sentence in dict.fromkeys(said):
                self._display.say(sentence)
        except BaseException:
            for worker in self._workers:
                worker.close(wait=False)
            raise

    def train(self, jobs: Sequence[Job]) -> None:
        """Train all jobs."""
        queue, idle = deque(packs_for(jobs, self._workers)), list(self._workers)
        try:
            while queue or self._active:
                while queue and idle:
                    worker, pack = idle.pop(), queue.popleft()
                    what = [job.config for job in pack], [job.run.title for job in pack]
                    future = worker.submit(_train_pack, *what, worker.device, worker.threads, worker.pack)
                    self._active[future] = worker, pack
                done, _ = wait(self._active, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    idle.append(self._collect(future))
                for worker, pack in self._active.values():
                    self._refresh(worker, pack)
        except KeyboardInterrupt:
            self._stop()
            raise
        finally:
            for worker in self._workers:
                worker.close()

    def _collect(self, future: "Future[list[Status]]") -> Worker:
        """Take the results of a pack; return its worker."""
        worker, pack = self._active.pop(future)
        error = future.exception()
        if error is None:
            statuses = future.result()
        else:  # of the process: it was killed, or ended before a run began
            killed = isinstance(error, BrokenProcessPool)
            why = "its process was killed, perhaps for want of memory" if killed else bugs.told(error)
            facts = {"out_of_memory": killed, "crashed": True}
            statuses = [record_end(job.run, State.FAILED, why, None if killed else error) | facts for job in pack]
        if any(status.get("crashed") for status in statuses):  # a CUDA error, say, spoils its process
            worker.close(wait=False)
        for job, status in zip(pack, statuses, strict=True):
            self._end(job, status, worker)
        return worker

    def _refresh(self, worker: Worker, pack: list[Job]) -> None:
        """Show the progress of a pack, and runs of it that are over before the others."""
        for job in pack:
            if job.key in self._ended:
                continue
            status = job.status()
            if status.get("state") == State.RUNNING:
                self._display.news(job.key, status)
            elif status.get("state") in runs.FINISHED and len(pack) > 1:
                self._end(job, status, worker)

    def _end(self, job: Job, status: Status, worker: Worker) -> None:
        """Note the end of a run, once."""
        if job.key in self._ended:
            return
        self._ended.add(job.key)
        # An error of CUDA reaches all runs of its process, and under MPS all processes of its GPU.
        together = worker.pack > 1 or worker.device != "cpu"
        blame_others = status.get("out_of_memory") or (status.get("crashed") and together)
        if status["state"] == State.FAILED and blame_others and worker.device in self._shared:
            self.crowded.append(job)
            self._display.put_off(job.key, f"{one_line(status['error'])} Tried again alone, later.")
            return
        self._display.ended(job.key, status)
        if status["state"] == ELSEWHERE:
            self.elsewhere.append(job)
        elif status["state"] not in runs.FINISHED:
            self.failed.append((job, one_line(status.get("error"))))

    def _stop(self) -> None:
        """Let the runs under way write a checkpoint; a second request in the meantime ends them at once."""
        try:
            self._display.say("Stopping: the runs under way write a checkpoint. Once more stops at once.")
            for process in multiprocessing.active_children():
                process.terminate()  # TERM: a run writes its checkpoint first
            wait(self._active)
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.kill()
            for _, pack in self._active.values():
                for job in pack:
                    if job.run.state == State.RUNNING:
                        record_end(job.run, State.INTERRUPTED, "stopped at once")


def record_end(run: runs.Run, state: State, error: str, cause: BaseException | None = None) -> Status:
    """Record how a run ended whose process cannot do so any more, unless it is finished; return its status.

    The traceback of `cause` goes to run.log.
    """
    with contextlib.suppress(UserError), run.lock(wait_seconds=DYING_SECONDS):
        if run.state in runs.FINISHED:
            return runs.read_status(run.folder) or {"state": run.state}
        trace = [*traceback.format_exception(cause), bugs.report(cause), "\n"] if cause else []
        with contextlib.suppress(OSError), (run.folder / runs.LOG).open("a", encoding="utf-8") as log:
            log.write(f"{runs.now()} ERROR {error}\n{''.join(trace)}")
        return run.write_status(state, ended=runs.now(), error=error)
    return {"state": state, "error": error}
