"""Several processes that train one run, each on its share of every batch: a run's record does not show how many.

Process r has the images r, r + world, r + 2 world, ... of a batch. Its loss is its share of the batch's, and gradients
are added up, so that all processes hold the same network, and the same as a single process would. What is decided by
the clock or by a signal is agreed upon (`Looks`). The first process alone reads and writes the run's folder.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normlab.common.errors import InterruptedRunError, UserError
from normlab.training.distributed.processes import Processes

T = TypeVar("T")
JOIN_SECONDS = 300.0  # for all processes to start: file servers are slow when many import torch at once
LISTEN_SECONDS = 1.0
GRACE_SECONDS = 10.0  # from the news that another process failed until this one must have found out by itself


class Looks:
    """When a process looks at its clock, its signals and its losses: here, whenever it wants to."""

    def agree(self, beats: bool, saves: bool, stop: str | None) -> tuple[bool, bool, str | None]:
        """What to do after this step, the same for all processes: a heartbeat, a checkpoint, a stop by that signal."""
        return beats, saves, stop


class Alone:
    """A run's only process: it has nobody to ask."""

    rank, world = 0, 1
    device: str | None = None  # of this process, if the run may use GPUs

    @property
    def leads(self) -> bool:
        """Whether this process reads and writes the run's folder."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """The first process's value."""
        return value

    def add_up(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over processes."""

    def largest(self, value: int) -> int:
        return value

    def equalise(self, network: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""

    def parallel(self, network: nn.Module) -> nn.Module:
        """`network` for training: its gradients will be sums over processes."""
        return network

    def looks(self, pause_seconds: float, at_most: int | None = None) -> Looks:
        """For a sequence of steps that all processes make, `at_most` of them together."""
        return Looks()

    def meet(self) -> None:
        """Wait for all processes."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, what ends one process ends all, with the same error as far as it can be known."""
        yield

    def if_stuck(self, last_words: Callable[[str], object]) -> None:
        """What to do should this process hang because another one has failed: its last deed."""


ALONE = Alone()


_number = itertools.count()  # of the runs that the processes have met for: all count alike


@contextmanager
def join(processes: Processes, device: str) -> Iterator[Alone]:
    """Meet the other processes of the run, stay together inside, and part. `device` is the run's setting.

    Raises:
        UserError: if they do not find each other; inside, for what ended another process.
    """
    if processes.world == 1:
        yield ALONE
        return
    try:
        team = Team(processes, cuda=device != "cpu" and torch.cuda.is_available())
    except RuntimeError as error:
        raise UserError(
            f"The {processes.world} processes of this run do not find each other at {processes.host}, port"
            f" {processes.port}:\n{str(error).splitlines()[0]}\n"
            "Check that all were started, and that the port is free; MASTER_ADDR and MASTER_PORT name another place."
        ) from error
    try:
        with team.together():
            yield team
    finally:
        team.part()


@functools.cache
def _store(purpose: str, processes: Processes) -> dist.Store:
    """A connection, for good, to what torchrun or the first process keeps for all."""
    os.environ |= {"MASTER_ADDR": processes.host, "MASTER_PORT": str(processes.port)}
    patience = timedelta(seconds=JOIN_SECONDS)
    return next(dist.rendezvous("env://", processes.rank, processes.world, timeout=patience))[0]


class Team(Alone):
    """This process among several. Tensors on a GPU go by NCCL, all else by gloo."""

    def __init__(self, processes: Processes, cuda: bool) -> None:
        self.rank, self.world = processes.rank, processes.world
        number = str(next(_number))
        # Of its own, so that it can be heard while the main thread waits for the other processes.
        self._news = dist.PrefixStore(number, _store("news", processes))
        self._news.set(f"here/{self.rank}", "")
        self._news.wait([f"here/{rank}" for rank in range(self.world)], timedelta(seconds=JOIN_SECONDS))
        if cuda:
            self.device = f"cuda:{processes.local_rank % torch.cuda.device_count()}"  # srun may show each only its own
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        store = dist.PrefixStore(f"group/{number}", _store("group", processes))
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)
        self._failed, self._left = False, threading.Event()
        self._last_words: Callable[[str], object] = lambda why: None
        threading.Thread(target=self._listen, name="news", daemon=True).start()

    def part(self) -> None:
        """Leave the others, who find their connections broken if they are not leaving as well."""
        with contextlib.suppress(RuntimeError):
            if self._failed and self.device:  # NCCL would wait for those that have gone
                dist.distributed_c10d._get_default_group().abort()
            dist.destroy_process_group()
        self._left.set()

    def broadcast(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def add_up(self, tensor: Tensor) -> None:
        if tensor.numel():
            total = tensor.cpu()  # itself, if it is there
            dist.all_reduce(total)
            tensor.copy_(total)

    def largest(self, value: int) -> int:
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def equalise(self, network: nn.Module) -> None:
        for tensor in network.state_dict().values():
            if tensor.numel():
                dist.broadcast(tensor, 0)

    def parallel(self, network: nn.Module) -> nn.Module:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its new name is unknown to PyTorch 2.9
            parallel = DistributedDataParallel(network, broadcast_buffers=False)  # equal as they are
        parallel.register_comm_hook(None, _sum)
        return parallel

    def looks(self, pause_seconds: float, at_most: int | None = None) -> Looks:
        return _AgreedLooks(pause_seconds, at_most)

    def meet(self) -> None:
        self.largest(0)

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except InterruptedRunError:  # agreed upon
            raise
        except (Exception, KeyboardInterrupt) as error:
            cause = self._cause(error)
            if cause is error:
                raise
            raise cause from cause.__cause__

    def if_stuck(self, last_words: Callable[[str], object]) -> None:
        self._last_words = last_words

    def _cause(self, error: BaseException) -> BaseException:
        """What ended this process: `error`, or that of another process, of which this one is the consequence.

        The first process to fail says why before it goes; the others find their connections broken.
        """
        self._failed = True
        mine = _sentence(error)
        with contextlib.suppress(RuntimeError):  # where the process that keeps the news has gone
            first = json.loads(self._news.compare_set("failure", "", _words(mine, self.rank)))
            if isinstance(error, RuntimeError) and first["rank"] != self.rank:
                return _error_of(first)
        return mine

    def _listen(self) -> None:
        """End this process should it wait for one that has failed, in a place that does not notice (as NCCL's)."""
        while not self._left.wait(LISTEN_SECONDS):
            why = "Another process of this run ended without a word."
            try:
                if not self._news.check(["failure"]):
                    continue
                why = str(_error_of(json.loads(self._news.get("failure"))))
            except RuntimeError:  # the process that keeps the news has gone
                pass
            if not self._left.wait(GRACE_SECONDS):
                self._last_words(why)
                os._exit(1)


class _AgreedLooks(Looks):
    """At steps that all processes know beforehand, so that no other step waits for anyone: about every
    `pause_seconds`, by the slowest process. What any process wants then, all do.
    """

    def __init__(self, pause_seconds: float, at_most: int | None) -> None:
        self.pause_seconds = pause_seconds
        self.left = math.inf if at_most is None else at_most
        self.every = self.to_go = 1
        self.looked = time.monotonic()

    def agree(self, beats: bool, saves: bool, stop: str | None) -> tuple[bool, bool, str | None]:
        self.left -= 1
        self.to_go -= 1
        if self.to_go or self.left < 0:
            return False, False, None
        now = time.monotonic()
        number = signal.Signals[stop].value if stop else 0
        wishes = torch.tensor([beats, saves, number, (now - self.looked) / self.every], dtype=torch.float64)
        dist.all_reduce(wishes, dist.ReduceOp.MAX)
        beats, saves, number, step_seconds = bool(wishes[0]), bool(wishes[1]), int(wishes[2]), float(wishes[3])
        # At most twice as many as last time: the first step of all is a slow one, and the next may be slower.
        self.every = self.to_go = max(1, min(2 * self.every, int(self.pause_seconds / max(step_seconds, 1e-6))))
        self.looked = time.monotonic()
        return beats, saves, signal.Signals(number).name if number else None


def _sum(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """In place of the mean over processes that DistributedDataParallel takes by itself: what a layer sees of the
    gradient in its backward pass is then what it sees in a single process.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def _sentence(error: BaseException) -> BaseException:
    """`error`, or what it means where it is one of torch.distributed."""
    text = str(error)
    if not isinstance(error, RuntimeError):
        return error
    if "finished reduction in the prior iteration" in text:
        return UserError(
            "This network has parameters that take no part in its loss, which only a single process can train.\n"
            "Use one process, or a network without them."
        )
    if "Duplicate GPU detected" in text:
        return UserError(
            "Several processes of this run were given the same GPU, and each needs its own.\n"
            "Start one process per GPU: torchrun --nproc-per-node=gpu, or srun --gpus-per-task=1."
        )
    if isinstance(error, dist.DistError) or "/gloo/" in text:
        return UserError(
            "Another process of this run ended without a word: killed, or its machine is lost.\n"
            "The output of torchrun or srun may say more. The same command goes on from the last checkpoint."
        )
    return error


def _words(error: BaseException, rank: int) -> str:
    kind = UserError if isinstance(error, UserError) else type(error)
    trace = "".join(traceback.format_exception(error))
    return json.dumps({"rank": rank, "kind": kind.__name__, "text": str(error), "trace": trace})


def _error_of(words: dict[str, str]) -> BaseException:
    kind, text = words["kind"], words["text"]
    if kind == "UserError":
        return UserError(text)
    if kind == "KeyboardInterrupt":
        return InterruptedRunError("SIGINT")
    if kind in ("OutOfMemoryError", "MemoryError"):
        return MemoryError(text)
    error = UserError(f"Process {words['rank']} of this run failed: {kind}: {text}")
    error.__cause__ = RuntimeError(words["trace"])
    return error
