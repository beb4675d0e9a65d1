"""One split of a data set as batches: order, augmentation and normalisation, all keyed and in bulk."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab.common.rng import stream
from normlab.data.resident import Resident
from normlab.data.samplers import paired
from normlab.data.streaming import Files

READY_BYTES = 64 * 2**20  # normalised images that are kept ready up to this size
SAMPLE = 2000  # streamed training images that mean and std are estimated from


@dataclass(frozen=True)
class Normalisation:
    """(pixel - mean) / std per channel; both float32 (1, 3, 1, 1), in units of a pixel's 0 to 255."""

    mean: Tensor
    std: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 -> float32, (B, 3, H, W)."""
        return torch.sub(images, self.mean).div_(self.std)


def unit_interval(device: torch.device) -> Normalisation:
    """Pixels / 255."""
    return Normalisation(torch.zeros(1, 3, 1, 1, device=device), torch.full((1, 3, 1, 1), 255.0, device=device))


def standardisation(source: Resident | Files, rows: Tensor, device: torch.device) -> Normalisation:
    """To mean 0 and (population) std 1 of the images at `rows`, without augmentation.

    Exact for images in memory; for a stream an estimate from `SAMPLE` of them, always the same ones.
    A channel that is constant is centred only.
    """
    if isinstance(source, Files) and len(rows) > SAMPLE:
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
    return Normalisation(*(v.float().view(1, 3, 1, 1).to(device) for v in (mean, std)))


@dataclass(frozen=True)
class Augmentation:
    """torchvision's RandomCrop(size, crop_padding) on black, then RandomHorizontalFlip, of uint8 batches.

    The crops are `cut` pixels smaller than the images, in height and in width.
    """

    flip: bool
    crop_padding: int
    cut: int = 0

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """For each of `count` images: row offset, column offset, flip; int64 (count, 3)."""
        flips = torch.randint(0, 1 + self.flip, (count,), generator=generator)
        offsets = torch.randint(0, 2 * self.crop_padding + self.cut + 1, (count, 2), generator=generator)
        return torch.cat([offsets, flips[:, None]], dim=1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """(B, 3, H, W) of any dtype, and the draws of these images."""
        if self.crop_padding or self.cut:
            height, width = (side - self.cut for side in images.shape[2:])
            padded = F.pad(images, (self.crop_padding,) * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, 3, offsets, offsets, h, w), a view
            image = torch.arange(len(images), device=images.device)
            images = windows[image, :, draws[:, 0], draws[:, 1]]
        if self.flip:
            images = torch.where(draws[:, 2, None, None, None].bool(), images.flip(3), images)
        return images


def centre(images: Tensor, cut: int) -> Tensor:
    """The central crop that is `cut` pixels smaller in height and in width, offset floor(cut / 2); a view."""
    height, width = images.shape[-2:]
    first = cut // 2
    return images[..., first : first + height - cut, first : first + width - cut]


@dataclass(frozen=True)
class Epoch:
    """What an epoch of images in memory goes through, image by image; on the device.

    Attributes:
        positions: of the images in their split; int64 (images,).
        labels: of these images, (images,) or (images, features).
        draws: of their augmentation, int64 (images, 3); None where they are left as they are.
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


class Split:
    """Some rows of a source, as batches of float32 (B, 3, H, W) images and int64 (B,) labels on the device.

    An epoch has every image once, in random order, in ceil(N / batch) batches. With `images_per_label` it has
    as many batches, all of them full, of images that `samplers.paired` draws.

    With `processes` > 1 there are as many of it, and `batches` gives each its share: process r reads only the images
    r, r + processes, r + 2 processes, ... of each batch, B ~ batch / processes. (So norm_batch's group n mod G of the
    batch is one process's, if batch / processes is a multiple of it.)

    Args:
        source: where the images are.
        rows: which of its images belong to the split; int64 (N,).
        labels: of these images; int64 (N,).
        batch: images per batch.
        images_per_label: None, or a divisor of `batch`.
        drop_last: leave out the last batch of an epoch if it is smaller.
        augmentation: applied in an epoch.
        cut: pixels by which an image's central crop is smaller, where it is not augmented.
        seed: of order and augmentation.
        rank: r, the number of this process, of `processes` that read the split together. They divide `batch` of
            a split that is trained on.
    """

    def __init__(
        self,
        source: Resident | Files,
        rows: Tensor,
        labels: Tensor,
        normalisation: Normalisation,
        device: torch.device,
        *,
        batch: int,
        images_per_label: int | None = None,
        drop_last: bool = False,
        augmentation: Augmentation | None = None,
        cut: int = 0,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.batch, self.images_per_label, self.drop_last = batch, images_per_label, drop_last
        self.rank, self.processes = rank, processes
        self.seed, self.device = seed, device
        self.rows, self.labels = rows, labels
        self._source, self._normalise = source, normalisation
        self._augment, self._cut = augmentation, cut
        self._ready: Tensor | None = None
        if isinstance(source, Resident):
            self._places = rows.to(device)
            images = centre(source.images, cut)
            if not augmentation and 4 * len(rows) * images[0].numel() <= READY_BYTES:
                self._ready = normalisation(images[self._places])

    def __len__(self) -> int:
        """Images."""
        return len(self.rows)

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        whole, rest = divmod(len(self), self.batch)
        return whole if self.drop_last and not self.images_per_label else whole + bool(rest)

    @property
    def images(self) -> int:
        """Images of an epoch, counted as often as they come. Only the last batch can have fewer than `batch`."""
        full = self.steps * self.batch
        return full if self.images_per_label else min(full, len(self))

    def images_of(self, batch: int) -> int:
        """Images in batch number `batch` of an epoch, over all processes."""
        return min(self.batch, self.images - batch * self.batch)

    @property
    def share(self) -> int:
        """Images of a full batch that this process reads."""
        return math.ceil(self.batch / self.processes)

    @property
    def shared_batches(self) -> int:
        """Batches of all images that every process has; some have one more."""
        return math.ceil(len(self) // self.processes / self.share)

    def batches(self, epoch: int | None = None, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from number `start` on: drawn and augmented by what (seed, epoch) says.
        Without an epoch: all images in their order as they are. Of several processes, each gets its share.
        """
        mine = slice(start * self.batch + self.rank, None, self.processes)
        if epoch is None:
            return self._read(torch.arange(len(self))[mine], self.share, None, None)
        order, draws = self._drawn(epoch)
        return self._read(order[mine], self.share, epoch, None if draws is None else draws[mine])

    @property
    def resident(self) -> bool:
        """Whether its images are in memory, on the device."""
        return isinstance(self._source, Resident)

    def epoch(self, number: int) -> Epoch:
        """What `batches(number)` goes through; for images in memory and a single process."""
        order, draws = self._drawn(number)
        return self._epoch(order, draws)

    def gather(self, positions: Tensor, draws: Tensor | None) -> Tensor:
        """The images at `positions` (int64, (B,), on the device), augmented by their `draws` and normalised.

        For images in memory; nothing waits for the device.
        """
        if self._ready is not None:
            return self._ready.index_select(0, positions)
        assert isinstance(self._source, Resident)
        pixels = self._source.images.index_select(0, self._places.index_select(0, positions))
        return self._normalise(self._augmented(pixels, draws))

    def plain(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The images at positions `order` (int64, (n,)) of the split, in batches, not augmented; for every process."""
        return self._read(order, self.batch, None, None)

    def plain_batches(self, count: int) -> Iterator[Tensor]:
        """The images of the first `count` batches, or fewer if it has fewer, of an epoch of its own: drawn as in
        training, the same ones whenever asked for, not augmented; for every process.
        """
        return (images for images, _ in self.plain(self._order("precise")[: count * self.batch]))

    def _order(self, *key: object) -> Tensor:
        """The positions that an epoch goes through; int64 (images,)."""
        generator = stream(self.seed, *key)
        if self.images_per_label:
            return paired(self.labels, self.images, self.images_per_label, generator)
        return torch.randperm(len(self), generator=generator)[: self.images]

    def _drawn(self, epoch: int) -> tuple[Tensor, Tensor | None]:
        """The positions that an epoch goes through, and the draws of augmentation there."""
        order = self._order("order", epoch)
        if not self._augment:
            return order, None
        # An image has its draw wherever it comes. If it can come twice, a place has, and the image looks new
        # (but for the random resized crop of a streamed one, which is the image's own throughout an epoch).
        count, whose = (len(order), slice(None)) if self.images_per_label else (len(self), order)
        return order, self._augment.draw(count, stream(self.seed, "augment", epoch))[whose]

    def _augmented(self, pixels: Tensor, draws: Tensor | None) -> Tensor:
        if self._augment and draws is not None:
            return self._augment(pixels, draws)
        return centre(pixels, self._cut)

    def _epoch(self, order: Tensor, draws: Tensor | None) -> Epoch:
        labels = self.labels[order].to(self.device)
        return Epoch(order.to(self.device), labels, None if draws is None else draws.to(self.device))

    def _read(
        self, order: Tensor, batch: int, epoch: int | None, draws: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if not len(order):
            return
        # Whatever belongs to single images is put into order once, so that a batch is but a slice of it.
        each = self._epoch(order, draws)
        parts, labels = each.positions.split(batch), each.labels.split(batch)
        drawn: Sequence[Tensor | None] = [None] * len(parts) if each.draws is None else each.draws.split(batch)
        pixels: Iterator[Tensor]
        if isinstance(self._source, Resident):
            pixels = map(self.gather, parts, drawn)
        else:
            files = self._source.read(self.rows[order], batch, epoch)
            pixels = (self._normalise(self._augmented(*pair)) for pair in zip(files, drawn, strict=True))
        yield from zip(pixels, labels, strict=True)
