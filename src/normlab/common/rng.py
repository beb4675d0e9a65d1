"""Random streams keyed by what they are for, so that no draw depends on the order of other draws.

Equal keys give equal streams: the same batches and augmentation in every arm of a comparison, and a
resumed run that equals an uninterrupted one without saving a generator's state.
"""

import hashlib

import torch


def key(*parts: object) -> int:
    """Return a 63-bit seed made of any printable parts, e.g. ``key(seed, "order", epoch)``."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stream(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded with `key(*parts)`."""
    return torch.Generator().manual_seed(key(*parts))
