"""The order in which a record has the images of a test set: by class, and in that by their place in the data set.

So the number of images in each class says which class each is of, and bits of two runs are compared only where the
digest says that they are of the same images in the same order.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageOrder:
    """The images of a split in the order of a record.

    Attributes:
        digest: SHA-256 of which images they are, in this order; 64 hex digits.
        positions: of these images in the split, int64 (N,).
        classes: names of the classes.
        counts: images of each class.
    """

    digest: str
    positions: Tensor
    classes: tuple[str, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, fingerprint: str, rows: Tensor, labels: Tensor, classes: Sequence[str]) -> Self:
        """Return the order of the images that a split has at `rows` (int64, (N,)) of a source.

        However the split is evaluated, the order is the same.

        Args:
            fingerprint: of the source's content.
            rows: in the order of the split.
            labels: int64 (N,), likewise.
            classes: names.
        """
        by_row = torch.argsort(rows, stable=True)
        positions = by_row[torch.argsort(labels[by_row], stable=True)]
        digest = hashlib.sha256(fingerprint.encode())
        for values in (rows[positions], labels[positions]):
            digest.update(values.numpy().astype("<i8").tobytes())
        counts = torch.bincount(labels, minlength=len(classes)).tolist()
        return cls(digest.hexdigest(), positions, tuple(classes), tuple(counts))
