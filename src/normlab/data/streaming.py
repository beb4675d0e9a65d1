"""Images that are read from their files batch by batch, for sets that do not fit into memory."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from normlab.common.cpu import cores
from normlab.common.errors import UserError
from normlab.common.rng import key
from normlab.data.images import Decoder

Decoding = tuple[str, int | None]  # a file, and the seed of its random crop


@dataclass(frozen=True)
class Files:
    """The images at `paths`, decoded by `workers` processes (0: by this one) and sent to `device`.

    The random resized crop of an image is drawn from a stream of (seed, epoch, image) of its own, so it
    depends neither on `workers` nor on the batch.
    """

    decoder: Decoder
    paths: tuple[str, ...]
    seed: int
    workers: int
    device: torch.device

    def read(self, rows: Tensor, batch: int, epoch: int | None = None) -> Iterator[Tensor]:
        """Yield uint8 (B, 3, S, S) batches of the images at `rows` (int64, (n,)), randomly cropped if `epoch` is given.

        Raises:
            UserError: naming the file that cannot be decoded.
        """
        parts = torch.split(rows, batch)
        workers = min(self.workers, len(parts), cores())  # more would only wait for each other
        batches: DataLoader[Tensor | str] = DataLoader(
            _DecodedBatches(self.decoder),
            batch_size=None,
            sampler=self._jobs(parts, epoch),
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context=worker_context() if workers else None,
            worker_init_fn=_end_with_the_run,
            generator=torch.Generator(),  # else each iterator draws a number from the global stream
        )
        for images in batches:
            if isinstance(images, str):
                raise UserError(images)
            yield images.to(self.device, non_blocking=True)

    def _jobs(self, parts: tuple[Tensor, ...], epoch: int | None) -> Iterator[list[Decoding]]:
        """Yield the files and seeds of each batch, which travel to the workers in place of all paths of a large set."""
        crops = epoch is not None and self.decoder.crop_scale is not None
        for part in parts:
            yield [(self.paths[row], key(self.seed, "augment", epoch, row) if crops else None) for row in part.tolist()]


class _DecodedBatches(Dataset[Tensor | str]):
    """Jobs -> images, or the text of the error: an exception would arrive wrapped in the worker's traceback."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def __getitem__(self, jobs: list[Decoding]) -> Tensor | str:
        with warnings.catch_warnings(action="ignore"):  # Pillow's remarks on odd files that it does read
            try:
                return torch.stack([torch.from_numpy(self.decoder(*job)) for job in jobs])
            except UserError as error:
                return str(error)


def worker_context() -> multiprocessing.context.BaseContext:
    """Return the context in which workers fork from a clean process: forking this one, with CUDA, may deadlock."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context


def _end_with_the_run(worker: int) -> None:
    """Leave no worker behind a run that was killed.

    torch watches for the death of a worker's parent, but that is the process it was forked from, which in turn waits
    for its workers.
    """
    # A terminal's Ctrl-C and SLURM's signals reach workers, too; the run decides. TERM is how a DataLoader ends them.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    run = multiprocessing.parent_process()
    if run is None:
        return

    def wait() -> None:
        run.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
