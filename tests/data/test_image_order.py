"""The order of a record's test images."""

import pytest
import torch
from conftest import composed

from normlab.data.datasets import Data, load
from normlab.data.image_order import ImageOrder

ROWS, LABELS = torch.tensor([9, 2, 5, 4]), torch.tensor([1, 2, 1, 0])


def test_images_are_sorted_by_class_and_then_by_their_place_in_the_data_set() -> None:
    order = ImageOrder.of("x", ROWS, LABELS, ("a", "b", "c", "d"))
    assert order.positions.tolist() == [3, 2, 0, 1]  # rows 4; 5, 9; 2
    assert order.counts == (1, 2, 1, 0)


@pytest.mark.parametrize(
    ("fingerprint", "rows", "labels"),
    [("y", ROWS, LABELS), ("x", ROWS + 1, LABELS), ("x", ROWS, torch.tensor([1, 2, 1, 3]))],
)
def test_other_images_have_another_digest(fingerprint, rows, labels) -> None:
    one, other = ImageOrder.of("x", ROWS, LABELS, "abcd"), ImageOrder.of(fingerprint, rows, labels, "abcd")
    assert one.digest != other.digest


def test_the_order_in_which_they_are_evaluated_makes_no_difference() -> None:
    def data(*settings: str) -> Data:
        config = composed("dataset=digits", "dataset.test_size=30", "batch=10", *settings)
        return load(config, torch.device("cpu"), log=print)

    one, other = data(), data("eval_stats=batch", "sampler=paired")
    assert one.test.rows.tolist() != other.test.rows.tolist()
    assert one.test_order is not None
    assert other.test_order is not None
    assert one.test_order.digest == other.test_order.digest
    assert one.test.rows[one.test_order.positions].tolist() == other.test.rows[other.test_order.positions].tolist()
    assert data("dataset.split_seed=7").test_order.digest != one.test_order.digest  # type: ignore[union-attr]
