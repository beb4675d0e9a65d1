"""One split of a data set as batches: order, augmentation and normalisation, all keyed and in bulk."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab.data.resident import Resident
from normlab.data.streaming import Files
from normlab.streams import stream

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
    """torchvision's RandomCrop(size, crop_padding) on black, then RandomHorizontalFlip, of uint8 batches."""

    flip: bool
    crop_padding: int

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """For each of `count` images: row offset, column offset, flip; int64 (count, 3)."""
        flips = torch.randint(0, 1 + self.flip, (count,), generator=generator)
        offsets = torch.randint(0, 2 * self.crop_padding + 1, (count, 2), generator=generator)
        return torch.cat([offsets, flips[:, None]], dim=1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """(B, 3, H, W) of any dtype, and the draws of these images."""
        if self.crop_padding:
            height, width = images.shape[2:]
            padded = F.pad(images, (self.crop_padding,) * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, 3, offsets, offsets, H, W), a view
            image = torch.arange(len(images), device=images.device)
            images = windows[image, :, draws[:, 0], draws[:, 1]]
        if self.flip:
            images = torch.where(draws[:, 2, None, None, None].bool(), images.flip(3), images)
        return images


class Split:
    """Some rows of a source, as batches of float32 (B, 3, H, W) images and int64 (B,) labels on the device.

    Args:
        source: where the images are.
        rows: which of its images belong to the split; int64 (N,).
        labels: of these images; int64 (N,).
        batch: images per batch.
        drop_last: leave out the last batch of an epoch if it is smaller.
        augmentation: applied in an epoch.
        seed: of order and augmentation.
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
        drop_last: bool = False,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.batch, self.drop_last, self.seed, self.device = batch, drop_last, seed, device
        self.rows, self.labels = rows, labels
        self._source, self._normalise = source, normalisation
        self._augment = augmentation
        self._ready: Tensor | None = None
        if isinstance(source, Resident) and not augmentation:
            small = 4 * len(rows) * source.images[0].numel() <= READY_BYTES
            self._ready = normalisation(source.images[rows.to(device)]) if small else None

    def __len__(self) -> int:
        """Images."""
        return len(self.rows)

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return len(self) // self.batch if self.drop_last else -(-len(self) // self.batch)

    def batches(self, epoch: int | None = None, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from number `start` on: shuffled and augmented by what (seed, epoch)
        says of each image. Without an epoch: all images in their order as they are."""
        if epoch is None:
            order = torch.arange(start * self.batch, len(self))
        else:
            order = torch.randperm(len(self), generator=stream(self.seed, "order", epoch))
            order = order[start * self.batch : self.steps * self.batch]
        if not len(order):
            return
        # Whatever belongs to single images is put into order once, so that a batch is but a slice of it.
        labels = self.labels[order].to(self.device).split(self.batch)
        if self._ready is not None:
            for part, targets in zip(order.to(self.device).split(self.batch), labels, strict=True):
                yield self._ready.index_select(0, part), targets
            return
        pixels = self._source.read(self.rows[order], self.batch, epoch)
        if self._augment and epoch is not None:
            draws = self._augment.draw(len(self), stream(self.seed, "augment", epoch))[order]
            pixels = map(self._augment, pixels, draws.to(self.device).split(self.batch))
        yield from zip(map(self._normalise, pixels), labels, strict=True)
