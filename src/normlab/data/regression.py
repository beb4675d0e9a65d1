"""The synthetic regression of Santurkar et al. 2018, section 3.1 and appendix: y = A x."""

import hashlib

import torch
from torch import Tensor

from normlab.common.rng import stream
from normlab.config.schema import RegressionDataset


def samples(dataset: RegressionDataset) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Draw (x, y) to train on and (x, y) to test on; x float32 (N, features, 1, 1), y float32 (N, features).

    A (features, features) and x have independent N(0, 1) entries, from streams that `split_seed` chooses.
    """
    a = torch.randn(dataset.features, dataset.features, generator=_stream(dataset, "matrix"))

    def draw(part: str, size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, dataset.features, generator=_stream(dataset, part))
        y = (x.double() @ a.double().T).float()  # in float64, so that no machine's order of sums shows
        return x[:, :, None, None], y

    return draw("train", dataset.train_size), draw("test", dataset.test_size)


def fingerprint(*parts: Tensor) -> str:
    """Return the SHA-256 of the values of tensors on the CPU, in hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def _stream(dataset: RegressionDataset, part: str) -> torch.Generator:
    return stream(dataset.split_seed, "regression", part)
