"""Comparing the batches of two splits."""

from collections.abc import Iterable

import torch
from torch import Tensor

Batches = Iterable[tuple[Tensor, Tensor]]


def equal(one: Batches, other: Batches) -> bool:
    """Whether there are as many batches, at least one, with the same images and labels."""
    pairs = list(zip(one, other, strict=True))
    return bool(pairs) and all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)
