"""Stratified subsets: which images train, validate and test."""

import torch
from torch import Tensor

from normlab.common.rng import stream


def stratified(labels: Tensor, size: int | None, *key: object) -> Tensor:
    """Choose `size` positions of `labels` (int64, (N,)), each class in its proportion; None: all.

    Shares are rounded by largest remainder, so that the size is exact (ties: the lower class). `key` names
    the random stream. Within one key a larger choice extends a smaller one, up to that rounding.

    Returns:
        int64 (size,), ascending.
    """
    if size is None or size == len(labels):
        return torch.arange(len(labels))
    counts = torch.bincount(labels)
    shares, remainders = counts * size // len(labels), counts * size % len(labels)
    extra = torch.argsort(remainders, descending=True, stable=True)[: size - int(shares.sum())]
    shares[extra] += 1
    by_class = shuffled_by_class(labels, stream(*key))
    chosen = [members[:share] for members, share in zip(by_class, shares.tolist(), strict=True)]
    return torch.cat(chosen).sort().values


def shuffled_by_class(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return, for each class 0, 1, ..., its positions in `labels` (int64, (N,)), in random order."""
    shuffled = torch.randperm(len(labels), generator=generator)
    return torch.split(shuffled[torch.argsort(labels[shuffled], stable=True)], torch.bincount(labels).tolist())


def without(count: int, chosen: Tensor) -> Tensor:
    """Return the positions below `count` that are not in `chosen` (int64), ascending."""
    kept = torch.ones(count, dtype=torch.bool)
    kept[chosen] = False
    return kept.nonzero().flatten()


def training_rows(labels: Tensor, train_size: int | None, val_size: int, split_seed: int) -> tuple[Tensor, Tensor]:
    """Choose the positions to train on and to validate on, ascending; int64.

    The validation images are taken out first, so that they do not depend on `train_size`, which counts the images
    that are left to train on.
    """
    val = stratified(labels, val_size, split_seed, "val")
    rest = without(len(labels), val)
    return rest[stratified(labels[rest], train_size, split_seed, "train")], val
