"""One split of a data set as batches: order, augmentation and normalization, all keyed and in bulk."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab.common.rng import stream
from normlab.data.incremental import TaskSequence
from normlab.data.resident import Resident
from normlab.data.samplers import paired
from normlab.data.streaming import Files

READY_BYTES = 64 * 2**20  # up to this size, images that are not augmented are normalized once and kept
SAMPLE = 2000  # streamed training images that mean and std are estimated from


@dataclass(frozen=True)
class Normalization:
    """(pixel - mean) / std per channel; both float32 (1, 3, 1, 1), in units of a pixel's 0 to 255."""

    mean: Tensor
    std: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Normalize uint8 (B, 3, H, W) to float32 of the same shape."""
        return torch.sub(images, self.mean).div_(self.std)


def unit_interval(device: torch.device) -> Normalization:
    """Return the division of pixels by 255."""
    return Normalization(torch.zeros(1, 3, 1, 1, device=device), torch.full((1, 3, 1, 1), 255.0, device=device))


def standardization(source: Resident | Files, rows: Tensor, device: torch.device) -> Normalization:
    """Measure mean and (population) std per channel of the images at `rows` (int64, (N,)), without augmentation.

    Exact for images in memory; for a stream an estimate from `SAMPLE` of them, always the same ones.
    A channel that is constant is only centered.
    """
    if isinstance(source, Files) and len(rows) > SAMPLE:
        # The spelling of a key is part of its random stream.
        rows = rows[torch.randperm(len(rows), generator=stream("normalisation sample"))[:SAMPLE]]
    count, total, squares = 0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for images in source.read(rows, batch=256):  # sums of whole numbers: exact in float64 in any order
        values = images.float()
        count += values[:, 0].numel()
        total += values.sum((0, 2, 3), dtype=torch.float64).cpu()
        squares += values.square_().sum((0, 2, 3), dtype=torch.float64).cpu()
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    std = torch.where(std > 1e-6, std, 1.0)
    return Normalization(*(v.float().view(1, 3, 1, 1).to(device) for v in (mean, std)))


@dataclass(frozen=True)
class Augmentation:
    """torchvision's RandomCrop(size, crop_padding) on black, then RandomHorizontalFlip, of uint8 batches.

    The crops are `cut` pixels smaller than the images, in height and in width.
    """

    flip: bool
    crop_padding: int
    cut: int = 0

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw row offset, column offset and flip (0 or 1) of `count` images; int64 (count, 3)."""
        flips = torch.randint(0, 1 + self.flip, (count,), generator=generator)
        offsets = torch.randint(0, 2 * self.crop_padding + self.cut + 1, (count, 2), generator=generator)
        return torch.cat([offsets, flips[:, None]], dim=1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Crop and flip images (B, 3, H, W) of any dtype by their `draws` (int64, (B, 3))."""
        if self.crop_padding or self.cut:
            height, width = (side - self.cut for side in images.shape[2:])
            padded = F.pad(images, (self.crop_padding,) * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, 3, offsets, offsets, h, w), a view
            image = torch.arange(len(images), device=images.device)
            images = windows[image, :, draws[:, 0], draws[:, 1]]
        if self.flip:
            images = torch.where(draws[:, 2, None, None, None].bool(), images.flip(3), images)
        return images


def center_crop(images: Tensor, cut: int) -> Tensor:
    """Return the central crop that is `cut` pixels smaller in height and in width, offset floor(cut / 2); a view."""
    height, width = images.shape[-2:]
    first = cut // 2
    return images[..., first : first + height - cut, first : first + width - cut]


@dataclass(frozen=True)
class Epoch:
    """The images of an epoch in memory, in their order; on the device.

    Attributes:
        positions: of the images in their split; int64 (images,).
        labels: of these images, (images,) or (images, features).
        draws: of their augmentation, int64 (images, 3); None without augmentation.
    """

    positions: Tensor
    labels: Tensor
    draws: Tensor | None

    def copy_(self, other: "Epoch") -> None:
        """Become `other`, another epoch of the same split, in place."""
        self.positions.copy_(other.positions)
        self.labels.copy_(other.labels)
        if self.draws is not None and other.draws is not None:
            self.draws.copy_(other.draws)


@dataclass(eq=False)
class Split:
    """Some rows of a source, as batches of float32 (B, 3, H, W) images and int64 (B,) labels on the device.

    An epoch has every image once, in random order, in ceil(N / batch) batches. With `images_per_label` it has
    as many batches, all of them full, of images that `samplers.paired` draws; with `tasks`, by `TaskSequence.draw`.

    With `processes` > 1 there are as many of it, and `batches` gives each its share: process r reads only the images
    r, r + processes, r + 2 processes, ... of each batch, B ~ batch / processes. (So norm_batch's group n mod G of the
    batch is one process's, if batch / processes is a multiple of it.)

    Attributes:
        source: where the images are.
        rows: which of its images belong to the split; int64 (N,).
        labels: of these images; int64 (N,), or float32 (N, features) of a regression.
        batch: images per batch.
        images_per_label: None, or a divisor of `batch`.
        tasks: None, or the tasks that the classes come in.
        drop_last: leave out the last batch of an epoch if it is smaller.
        augmentation: applied in an epoch.
        cut: pixels by which an image's central crop is smaller, where it is not augmented.
        seed: of order and augmentation.
        rank: r, the number of this process, of `processes` that read the split together. They divide `batch` of
            a split that is trained on.
    """

    source: Resident | Files
    rows: Tensor
    labels: Tensor
    normalization: Normalization
    device: torch.device
    _: KW_ONLY
    batch: int
    images_per_label: int | None = None
    tasks: TaskSequence | None = None
    drop_last: bool = False
    augmentation: Augmentation | None = None
    cut: int = 0
    seed: int = 0
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        self._normalized: Tensor | None = None
        if isinstance(self.source, Resident):
            self._device_rows = self.rows.to(self.device)
            images = center_crop(self.source.images, self.cut)
            if not self.augmentation and 4 * len(self.rows) * images[0].numel() <= READY_BYTES:
                self._normalized = self.normalization(images[self._device_rows])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    @property
    def steps(self) -> int:
        """The number of batches of an epoch."""
        if self.tasks:
            return self.tasks.steps(self.batch)
        whole, rest = divmod(len(self), self.batch)
        return whole if self.drop_last and not self.images_per_label else whole + bool(rest)

    @property
    def images(self) -> int:
        """The number of images of an epoch, with repetitions. Only the last batch can have fewer than `batch`."""
        full = self.steps * self.batch
        return full if self.images_per_label or self.tasks else min(full, len(self))

    def images_of(self, batch: int) -> int:
        """Return the number of images in batch number `batch` of an epoch, over all processes."""
        return min(self.batch, self.images - batch * self.batch)

    @property
    def local_batch(self) -> int:
        """The number of images of a full batch that this process reads."""
        return math.ceil(self.batch / self.processes)

    @property
    def shared_batches(self) -> int:
        """The number of batches of all images that every process has; some have one more."""
        return math.ceil(len(self) // self.processes / self.local_batch)

    def batches(self, epoch: int | None = None, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share of the batches of an epoch from number `start` on.

        Order and augmentation are drawn from streams of (seed, epoch). Without an epoch: all images in their order,
        not augmented.
        """
        share = slice(start * self.batch + self.rank, None, self.processes)
        if epoch is None:
            return self._read(torch.arange(len(self))[share], self.local_batch)
        order, draws = self._draw(epoch)
        return self._read(order[share], self.local_batch, epoch, None if draws is None else draws[share])

    @property
    def resident(self) -> bool:
        """Return whether the images are in memory, on the device."""
        return isinstance(self.source, Resident)

    def epoch(self, number: int) -> Epoch:
        """Return the images of `batches(number)`; for images in memory and a single process."""
        return self._epoch(*self._draw(number))

    def gather(self, positions: Tensor, draws: Tensor | None) -> Tensor:
        """Return the images at `positions` (int64, (B,), on the device), augmented by their `draws` and normalized.

        For images in memory; nothing waits for the device.
        """
        if self._normalized is not None:
            return self._normalized.index_select(0, positions)
        assert isinstance(self.source, Resident)
        pixels = self.source.images.index_select(0, self._device_rows.index_select(0, positions))
        return self._transform(pixels, draws)

    def plain(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images at positions `order` (int64, (n,)) in batches, not augmented; the same in every process."""
        return self._read(order, self.batch)

    def plain_batches(self, count: int) -> Iterator[Tensor]:
        """Yield the images of the first `count` batches (or of all, if fewer) of an epoch apart, not augmented.

        They are drawn as in training, and are the same in every call and in every process.
        """
        return (images for images, _ in self.plain(self._order("precise")[: count * self.batch]))

    def _order(self, *key: object) -> Tensor:
        """Draw the positions of an epoch; int64 (images,)."""
        generator = stream(self.seed, *key)
        if self.images_per_label:
            return paired(self.labels, self.images, self.images_per_label, generator)
        return torch.randperm(len(self), generator=generator)[: self.images]

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Draw the positions of an epoch and the augmentation there."""
        if self.tasks:
            order = self.tasks.draw(epoch, self.batch, stream(self.seed, "order", epoch))
        else:
            order = self._order("order", epoch)
        if not self.augmentation:
            return order, None
        # An image has its draw wherever it comes. If it can come twice, a place has, and the image looks new
        # (but for the random resized crop of a streamed one, which is the image's own throughout an epoch).
        repeats = self.images_per_label or self.tasks
        count, of_place = (len(order), slice(None)) if repeats else (len(self), order)
        return order, self.augmentation.draw(count, stream(self.seed, "augment", epoch))[of_place]

    def _epoch(self, order: Tensor, draws: Tensor | None) -> Epoch:
        labels = self.labels[order].to(self.device)
        return Epoch(order.to(self.device), labels, None if draws is None else draws.to(self.device))

    def _transform(self, pixels: Tensor, draws: Tensor | None) -> Tensor:
        if self.augmentation and draws is not None:
            return self.normalization(self.augmentation(pixels, draws))
        return self.normalization(center_crop(pixels, self.cut))

    def _read(
        self, order: Tensor, batch: int, epoch: int | None = None, draws: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if not len(order):
            return
        # All that belongs to single images is put into order once, so that a batch is a slice of it.
        images = self._epoch(order, draws)
        positions, labels = torch.split(images.positions, batch), torch.split(images.labels, batch)
        parts: Sequence[Tensor | None] = [None] * len(labels)
        if images.draws is not None:
            parts = torch.split(images.draws, batch)
        if isinstance(self.source, Resident):
            yield from zip(map(self.gather, positions, parts), labels, strict=True)
        else:
            decoded = self.source.read(self.rows[order], batch, epoch)
            yield from zip(map(self._transform, decoded, parts), labels, strict=True)
