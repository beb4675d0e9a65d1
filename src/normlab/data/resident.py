"""Images that live in memory, on the device that trains on them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Resident:
    """`images`: uint8 (N, 3, H, W) on the device of the run."""

    images: Tensor

    def read(self, rows: Tensor, batch: int, epoch: int | None = None) -> Iterator[Tensor]:
        """Batches of the images at `rows`; `epoch` means nothing here."""
        for part in rows.to(self.images.device).split(batch):
            yield self.images.index_select(0, part)
