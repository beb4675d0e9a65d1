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

Job = tuple[str, int | None]  # a file, and the seed of its random crop


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
        """uint8 (B, 3, S, S) batches of the images at `rows`, randomly cropped if `epoch` is given.

        Raises:
            UserError: naming the file that cannot be decoded.
        """
        parts = rows.split(batch)
        workers = min(self.workers, len(parts), cores())  # more would only wait for each other
        batches: DataLoader[Tensor | str] = DataLoader(
            _Jobs(self.decoder),
            batch_sampler=_JobLists(self, parts, epoch),
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context=worker_context() if workers else None,
            worker_init_fn=_end_with_the_run,
            generator=torch.Generator(),  # else each iterator draws a number from the global stream
        )
        for images in batches:
            if isinstance(images, str):
                raise UserError(images)
            yield images.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class _JobLists:
    """What each batch is made of. It travels to the workers in place of all the paths of a large set."""

    files: Files
    parts: tuple[Tensor, ...]
    epoch: int | None

    def __iter__(self) -> Iterator[list[Job]]:
        for part in self.parts:
            yield [(self.files.paths[row], self._crop_seed(row)) for row in part.tolist()]

    def __len__(self) -> int:
        return len(self.parts)

    def _crop_seed(self, row: int) -> int | None:
        if self.epoch is None or self.files.decoder.crop_scale is None:
            return None
        return key(self.files.seed, "augment", self.epoch, row)


class _Jobs(Dataset[Tensor | str]):
    """Job -> image, or the text of the error: an exception would arrive wrapped in the worker's traceback."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def __getitem__(self, job: Job) -> Tensor | str:
        with warnings.catch_warnings(action="ignore"):  # Pillow's remarks on odd files that it does read
            try:
                return torch.from_numpy(self.decoder(*job))
            except UserError as error:
                return str(error)


def _collate(images: list[Tensor | str]) -> Tensor | str:
    tensors = [image for image in images if isinstance(image, Tensor)]
    if len(tensors) < len(images):
        return next(image for image in images if isinstance(image, str))
    return torch.stack(tensors)


def worker_context() -> multiprocessing.context.BaseContext:
    """Workers fork from a clean process: forking this one, with its threads and CUDA, may deadlock."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context


def _end_with_the_run(worker: int) -> None:
    """Leave no worker behind a run that was killed: torch watches for the death of a worker's parent, but
    that is the process it was forked from, which in turn waits for its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches workers, too; the run decides
    run = multiprocessing.parent_process()
    if run is None:
        return

    def wait() -> None:
        run.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
