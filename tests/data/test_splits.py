import pytest
import torch

from normlab.data.splits import stratified, training_rows, without

LABELS = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100, generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize(
    ("size", "by_hand"),
    [
        (10, [5, 3, 2]),
        (50, [25, 15, 10]),
        (7, [4, 2, 1]),  # shares 3.5, 2.1, 1.4: the largest remainder gets the seventh
        (9, [4, 3, 2]),  # shares 4.5, 2.7, 1.8
        (100, [50, 30, 20]),
    ],
)
def test_a_subset_has_the_proportions_of_the_whole(size, by_hand) -> None:
    assert torch.bincount(LABELS[stratified(LABELS, size, 0)]).tolist() == by_hand


def test_subset_counts_equal_scikit_learns() -> None:
    from sklearn.model_selection import StratifiedShuffleSplit

    for size in (10, 20, 50, 90):  # where no remainder is left to chance
        chosen, _ = next(StratifiedShuffleSplit(1, train_size=size, random_state=0).split(LABELS, LABELS))
        ours = torch.bincount(LABELS[stratified(LABELS, size, 0)])
        assert ours.tolist() == torch.bincount(LABELS[chosen]).tolist()


def test_a_subset_is_the_same_for_its_key_and_another_for_another() -> None:
    assert torch.equal(stratified(LABELS, 30, 0, "a"), stratified(LABELS, 30, 0, "a"))
    assert not torch.equal(stratified(LABELS, 30, 0, "a"), stratified(LABELS, 30, 1, "a"))


def test_a_larger_subset_extends_a_smaller_one() -> None:
    small, large = stratified(LABELS, 20, 0), stratified(LABELS, 50, 0)
    assert set(small.tolist()) < set(large.tolist())


def test_all_images_are_taken_in_order_without_a_size() -> None:
    assert torch.equal(stratified(LABELS, None, 0), torch.arange(100))


def test_train_and_validation_do_not_overlap_and_the_latter_does_not_depend_on_train_size() -> None:
    train, val = training_rows(LABELS, None, 20, split_seed=3)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(100))
    assert torch.bincount(LABELS[val]).tolist() == [10, 6, 4]
    subset, val_of_subset = training_rows(LABELS, 40, 20, split_seed=3)
    assert torch.equal(val, val_of_subset)
    assert len(subset) == 40
    assert set(subset.tolist()) <= set(train.tolist())


def test_without_leaves_the_others() -> None:
    assert without(5, torch.tensor([1, 3])).tolist() == [0, 2, 4]
