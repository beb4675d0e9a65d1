"""Images that live in memory, on the device that trains on them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Resident:
    """Images in memory: uint8 (N, 3, H, W), or float32 (N, features, 1, 1) of a regression."""

    images: Tensor

    def read(self, rows: Tensor, batch: int) -> Iterator[Tensor]:
        """Yield batches of the images at `rows` (int64, (n,))."""
        for part in torch.split(rows.to(self.images.device), batch):
            yield self.images.index_select(0, part)
