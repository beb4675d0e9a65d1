"""Several processes that train one run, each on its share of every batch: a run's record does not show how many.

Process r has the images r, r + world, r + 2 world, ... of a batch. Its loss is its share of the batch's, and gradients
are added up, so that all processes hold the same network, and the same as a single process would. Decisions by the
clock or by a signal are taken together (`Consensus`). The first process alone reads and writes the run's folder.
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
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from normlab.common.errors import InterruptedRunError, UserError, first_line
from normlab.training.distributed.processes import Processes

T = TypeVar("T")
JOIN_SECONDS = 300.0  # for all processes to start: file servers are slow when many import torch at once
LISTEN_SECONDS = 1.0  # between looks for the failure of another process
GRACE_SECONDS = 10.0  # from the failure of another process until this one must have noticed by itself


class Consensus:
    """Decides what a process does after a batch; alone, its own decision."""

    def decide(self, heartbeat: bool, checkpoint: bool, stop: str | None) -> tuple[bool, bool, str | None]:
        """Return what all processes do now: a heartbeat, a checkpoint, a stop by that signal."""
        return heartbeat, checkpoint, stop


class ProcessGroup(Protocol):
    """The processes that train a run together; its methods are called by all of them.

    Attributes:
        rank: number of this process, of `world`.
        device: of this process, e.g. "cuda:1", if the run may use GPUs.
    """

    rank: int
    world: int
    device: str | None

    @property
    def is_main(self) -> bool:
        """Return whether this process reads and writes the run's folder."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """Return the first process's value."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over processes."""

    def all_reduce_max(self, value: int) -> int:
        """Return the largest of all processes' values."""

    def broadcast_network(self, network: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""

    def data_parallel(self, network: nn.Module) -> nn.Module:
        """Return `network` for training: its gradients will be sums over processes."""

    def consensus(self, pause_seconds: float, at_most: int | None = None) -> Consensus:
        """Return the consensus about a sequence of batches, `at_most` of which all processes have."""

    def barrier(self) -> None:
        """Wait for all processes."""

    def shared_errors(self) -> AbstractContextManager[None]:
        """Return a context in which an error that ends one process ends all, with the same error if it is known."""

    def on_hang(self, report: Callable[[str], object]) -> None:
        """Call `report` with the reason before this process is ended because it waits for one that failed."""


class SingleProcess(ProcessGroup):
    """The only process of a run, with nothing to add up and nobody to wait for."""

    rank, world, device = 0, 1, None

    def broadcast(self, value: T) -> T:
        """Return `value`."""
        return value

    def all_reduce(self, tensor: Tensor) -> None:
        """Leave `tensor` as it is."""

    def all_reduce_max(self, value: int) -> int:
        """Return `value`."""
        return value

    def broadcast_network(self, network: nn.Module) -> None:
        """Leave `network` as it is."""

    def data_parallel(self, network: nn.Module) -> nn.Module:
        """Return `network`."""
        return network

    def consensus(self, pause_seconds: float, at_most: int | None = None) -> Consensus:
        """Return one for a process alone."""
        return Consensus()

    def barrier(self) -> None:
        """Do nothing."""

    def on_hang(self, report: Callable[[str], object]) -> None:
        """Do nothing."""

    def shared_errors(self) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()


_number = itertools.count()  # of the runs that the processes have met for: all count alike


@contextmanager
def join(processes: Processes, device: str) -> Iterator[ProcessGroup]:
    """Join the other processes of the run, and leave them in the end.

    Args:
        device: the run's setting.

    Raises:
        UserError: if they do not find each other; inside, for an error that ended another process.
    """
    if processes.world == 1:
        yield SingleProcess()
        return
    try:
        group = TorchProcessGroup(processes, cuda=device != "cpu" and torch.cuda.is_available())
    except RuntimeError as error:
        raise UserError(
            f"The {processes.world} processes of this run do not find each other at {processes.host}, port"
            f" {processes.port}:\n{first_line(error)}\n"
            "Check that all were started, and that the port is free; MASTER_ADDR and MASTER_PORT name another place."
        ) from error
    try:
        with group.shared_errors():
            yield group
    finally:
        group.leave()


@functools.cache
def _store(purpose: str, processes: Processes) -> Store:
    """Return a connection, for good, to the store that torchrun or the first process keeps for all."""
    os.environ |= {"MASTER_ADDR": processes.host, "MASTER_PORT": str(processes.port)}
    timeout = timedelta(seconds=JOIN_SECONDS)
    store: Store = next(rendezvous("env://", processes.rank, processes.world, timeout=timeout))[0]
    return store


class TorchProcessGroup(ProcessGroup):
    """This process among several, by torch.distributed. Tensors on a GPU go by NCCL, all else by gloo."""

    def __init__(self, processes: Processes, cuda: bool) -> None:
        self.rank, self.world, self.device = processes.rank, processes.world, None
        number = str(next(_number))
        # Of its own, so that it can be read while the main thread waits for the other processes.
        self._failures = PrefixStore(number, _store("failures", processes))
        self._failures.set(f"here/{self.rank}", "")
        self._failures.wait([f"here/{rank}" for rank in range(self.world)], timedelta(seconds=JOIN_SECONDS))
        if cuda:
            self.device = f"cuda:{processes.local_rank % torch.cuda.device_count()}"  # srun may show each only its own
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        store = PrefixStore(f"group/{number}", _store("group", processes))
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)
        self._failed, self._left = False, threading.Event()
        self._report_hang: Callable[[str], object] = lambda why: None
        threading.Thread(target=self._listen, name="failures", daemon=True).start()

    def leave(self) -> None:
        """Leave the others, who find their connections broken if they are not leaving as well."""
        with contextlib.suppress(RuntimeError):
            if self._failed and self.device and dist.group.WORLD:  # NCCL would wait for those that have gone
                dist.group.WORLD.abort()
            dist.destroy_process_group()
        self._left.set()

    def broadcast(self, value: T) -> T:
        """Return the first process's value."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over processes, on any device."""
        if tensor.numel():
            total = tensor.cpu()  # itself, if it is there
            dist.all_reduce(total)
            tensor.copy_(total)

    def all_reduce_max(self, value: int) -> int:
        """Return the largest of all processes' values."""
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def broadcast_network(self, network: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""
        for tensor in network.state_dict().values():
            if tensor.numel():
                dist.broadcast(tensor, 0)

    def data_parallel(self, network: nn.Module) -> nn.Module:
        """Return `network` wrapped by DistributedDataParallel, with sums in place of means."""
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its new name is unknown to PyTorch 2.9
            parallel = DistributedDataParallel(network, broadcast_buffers=False)  # equal as they are
        parallel.register_comm_hook(None, _sum)
        return parallel

    def consensus(self, pause_seconds: float, at_most: int | None = None) -> Consensus:
        """Return a consensus that is sought about every `pause_seconds`."""
        return _Vote(pause_seconds, at_most)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.all_reduce_max(0)

    @contextmanager
    def shared_errors(self) -> Iterator[None]:
        """Raise, in place of an error that another process caused, the other's; and publish an error of this one."""
        try:
            yield
        except InterruptedRunError:  # decided together
            raise
        except (Exception, KeyboardInterrupt) as error:
            cause = self._cause(error)
            if cause is error:
                raise
            raise cause from cause.__cause__

    def on_hang(self, report: Callable[[str], object]) -> None:
        """See `ProcessGroup`."""
        self._report_hang = report

    def _cause(self, error: BaseException) -> BaseException:
        """Return the cause of the end of this process: `error`, or that of another one, of which it is a consequence.

        The first process to fail publishes why before it goes; the others find their connections broken.
        """
        self._failed = True
        mine = _sentence(error)
        with contextlib.suppress(RuntimeError):  # where the process that keeps the store has gone
            first = json.loads(self._failures.compare_set("failure", "", _as_json(mine, self.rank)))
            if isinstance(error, RuntimeError) and first["rank"] != self.rank:
                return _from_json(first)
        return mine

    def _listen(self) -> None:
        """End this process if it waits for one that has failed, in a place that does not notice (as NCCL's)."""
        while not self._left.wait(LISTEN_SECONDS):
            why = "Another process of this run ended without reporting an error."
            try:
                if not self._failures.check(["failure"]):
                    continue
                why = str(_from_json(json.loads(self._failures.get("failure"))))
            except RuntimeError:  # the process that keeps the store has gone
                pass
            if not self._left.wait(GRACE_SECONDS):
                self._report_hang(why)
                os._exit(1)


class _Vote(Consensus):
    """Takes decisions after batches that all processes know beforehand, so that no other batch waits for anyone.

    That is about every `pause_seconds`, by the slowest process. Any process's request applies to all.
    """

    def __init__(self, pause_seconds: float, at_most: int | None) -> None:
        self.pause_seconds = pause_seconds
        self.left = math.inf if at_most is None else at_most
        self.every = self.to_go = 1
        self.last = time.monotonic()

    def decide(self, heartbeat: bool, checkpoint: bool, stop: str | None) -> tuple[bool, bool, str | None]:
        self.left -= 1
        self.to_go -= 1
        if self.to_go or self.left < 0:
            return False, False, None
        number = signal.Signals[stop].value if stop else 0
        batch_seconds = (time.monotonic() - self.last) / self.every
        requests = torch.tensor([heartbeat, checkpoint, number, batch_seconds], dtype=torch.float64)
        dist.all_reduce(requests, dist.ReduceOp.MAX)
        any_heartbeat, any_checkpoint, any_number, slowest = requests.tolist()
        # At most twice as many as last time: the first step of all is a slow one, and the next may be slower.
        self.every = self.to_go = max(1, min(2 * self.every, int(self.pause_seconds / max(slowest, 1e-6))))
        self.last = time.monotonic()
        return bool(any_heartbeat), bool(any_checkpoint), signal.Signals(any_number).name if any_number else None


def _sum(
    _: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # PyTorch exports it conditionally
) -> torch.futures.Future[Tensor]:
    """Add up gradients, in place of the mean over processes that DistributedDataParallel takes by itself.

    So what a layer sees of the gradient in its backward pass is what it sees in a single process.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def _sentence(error: BaseException) -> BaseException:
    """Return `error`, or a sentence for the user where it is one of torch.distributed."""
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
            "Another process of this run ended without reporting an error: killed, or its machine is lost.\n"
            "The output of torchrun or srun may say more. The same command goes on from the last checkpoint."
        )
    return error


def _as_json(error: BaseException, rank: int) -> str:
    kind = UserError if isinstance(error, UserError) else type(error)
    trace = "".join(traceback.format_exception(error))
    return json.dumps({"rank": rank, "kind": kind.__name__, "text": str(error), "trace": trace})


def _from_json(failure: dict[str, str]) -> BaseException:
    kind, text = failure["kind"], failure["text"]
    if kind == "UserError":
        return UserError(text)
    if kind == "KeyboardInterrupt":
        return InterruptedRunError("SIGINT")
    if kind in ("OutOfMemoryError", "MemoryError"):
        return MemoryError(text)
    error = UserError(f"Process {failure['rank']} of this run failed: {kind}: {text}")
    error.__cause__ = RuntimeError(failure["trace"])
    return error
