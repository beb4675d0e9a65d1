"""The synthetic regression task, against NumPy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data.equality import equal

from normlab.common.errors import UserError
from normlab.data import datasets, inventory
from normlab.data.datasets import Data
from normlab.launchers import preflight

CPU = torch.device("cpu")


@pytest.fixture
def load_it(make):
    def load(*settings: str) -> Data:
        return datasets.load(make("model=deep_linear", *settings), CPU, log=print)

    return load


def pairs(split) -> tuple[np.ndarray, np.ndarray]:
    """All x (N, features) and y of a split in its own order."""
    batches = list(split.batches())
    return tuple(torch.cat(parts).flatten(1).numpy() for parts in zip(*batches, strict=True))


def test_the_targets_are_one_linear_map_of_the_inputs(load_it) -> None:
    """A solved from the training samples by least squares explains both parts to float32's precision."""
    data = load_it()
    (x, y), (test_x, test_y) = pairs(data.train), pairs(data.test)
    a, *_ = np.linalg.lstsq(x.astype(np.float64), y.astype(np.float64), rcond=None)
    for inputs, targets in ((x, y), (test_x, test_y)):
        np.testing.assert_allclose(inputs @ a, targets, atol=1e-5)
    assert np.linalg.matrix_rank(a) == 10
    assert not set(map(tuple, x.tolist())) & set(map(tuple, test_x.tolist()))


def test_map_and_inputs_are_standard_normal(load_it) -> None:
    data = load_it("dataset.features=100", "dataset.train_size=2000", "batch=1000")
    x, y = pairs(data.train)
    a, *_ = np.linalg.lstsq(x.astype(np.float64), y.astype(np.float64), rcond=None)
    for drawn in (x, a):
        assert abs(drawn.mean()) < 5 / drawn.size**0.5
        assert abs(drawn.var() - 1) < 5 * (2 / drawn.size) ** 0.5
        assert 0.25 < (np.abs(drawn) > 1).mean() < 0.38  # of a normal distribution: 0.317


def test_batches_have_the_shapes_that_the_network_takes(load_it) -> None:
    data = load_it("dataset.features=7", "dataset.train_size=25", "dataset.test_size=9", "batch=10", "eval_batch=4")
    assert (data.task, data.channels, data.image_size, len(data.classes)) == ("regression", 7, 1, 7)
    train, test = list(data.train.batches(0)), list(data.test.batches())
    assert [tuple(x.shape) for x, _ in train] == [(10, 7, 1, 1), (10, 7, 1, 1), (5, 7, 1, 1)]
    assert [tuple(y.shape) for _, y in test] == [(4, 7), (4, 7), (1, 7)]
    assert {t.dtype for batch in train for t in batch} == {torch.float32}


def test_an_epoch_is_a_shuffle_that_keeps_samples_together_and_begins_anywhere(load_it) -> None:
    data = load_it("dataset.train_size=25", "batch=10")
    of_x = {tuple(x): tuple(y) for x, y in zip(*pairs(data.train), strict=True)}
    seen = [
        (tuple(x.flatten().tolist()), tuple(y.tolist()))
        for batch in data.train.batches(3)
        for x, y in zip(*batch, strict=True)
    ]
    assert dict(seen) == of_x
    assert [x for x, _ in seen] != list(of_x)
    assert equal(data.train.batches(1, start=1), list(data.train.batches(1))[1:])


def test_seeds_share_the_task_and_shuffle_it_differently(load_it) -> None:
    first, again, other = load_it(), load_it("seed=1"), load_it("dataset.split_seed=1")
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert np.array_equal(pairs(first.train)[0], pairs(again.train)[0])
    assert not np.array_equal(pairs(first.train)[0], pairs(other.train)[0])
    x, _ = next(first.train.batches(0))
    y, _ = next(again.train.batches(0))
    assert not torch.equal(x, y)


def test_the_inventory_counts_samples(make) -> None:
    found = inventory.check(make("model=deep_linear", "dataset.train_size=1200").dataset, Path("nowhere"))
    assert found.train_images == 1200


def test_a_batch_larger_than_the_data_is_told_before_the_run(make) -> None:
    with pytest.raises(UserError, match=r"(?s)linear_regression has 500 samples.*Nearest valid: batch=500"):
        preflight.check(make("model=deep_linear", "dataset.train_size=500"))
