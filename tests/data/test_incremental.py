"""sampler=class_incremental: which images an epoch has, which ones the memory keeps, and what is measured of tasks."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from data.equality import equal

from normlab.common.errors import UserError
from normlab.config.schema import ClassIncremental
from normlab.data.batches import Augmentation
from normlab.data.incremental import TaskSequence


def sampler(tasks: int = 5, memory: int = 40, memory_batch: int = 4, exemplars: str = "random") -> ClassIncremental:
    return ClassIncremental(
        name="class_incremental", tasks=tasks, memory=memory, memory_batch=memory_batch, exemplars=exemplars
    )


def sequence(labels: list[int], classes: int, epochs: int = 2, seed: int = 0, **settings: Any) -> TaskSequence:
    return TaskSequence(torch.tensor(labels), classes, epochs, sampler(**settings), seed)


LABELS = [n % 6 for n in range(60)] + [0] * 7  # 10 images of each of six classes, 17 of class 0


def drawn(tasks: TaskSequence, epoch: int, batch: int = 12) -> list[list[int]]:
    positions = tasks.draw(epoch, batch, torch.Generator().manual_seed(epoch))
    return [part.tolist() for part in positions.split(batch)]


@pytest.mark.parametrize("epoch", range(6))
def test_an_epoch_is_what_its_description_says(epoch) -> None:
    """Three tasks of two epochs, two classes each; batches of 12, 4 of them of a memory of 13."""
    tasks = sequence(LABELS, 6, tasks=3, memory=13)
    task = epoch // 2
    order = tasks.classes.tolist()
    assert sorted(itertools.chain(*order)) == list(range(6))
    now, before = order[task], list(itertools.chain(*order[:task]))
    current = {n for n, label in enumerate(LABELS) if label in now}
    largest = max(sum(label in classes for label in LABELS) for classes in order)
    batches = drawn(tasks, epoch)
    assert len(batches) == tasks.steps(12) == -(-largest // 8)
    assert {len(batch) for batch in batches} == {12}
    split = 8 if task else 12
    first = Counter(n for batch in batches for n in batch[:split])
    assert set(first) == current
    assert max(first.values()) - min(first.values()) <= 1
    rest = Counter(n for batch in batches for n in batch[split:])
    kept = Counter(LABELS[n] for n in tasks.exemplars(task).tolist())
    assert kept == {label: 13 // len(before) for label in before}
    assert set(rest) == set(tasks.exemplars(task).tolist()) or not task
    assert not rest or max(rest.values()) - min(rest.values()) <= 1


def test_no_image_is_of_a_class_to_come_or_of_the_test(load_it) -> None:
    data = load_it("digits", sampler=sampler(), epochs=10, batch=64, val_size=100)
    train, tasks = data.train, data.train.tasks
    apart = itertools.chain(data.test.batches(), data.val.batches())
    others = {image.numpy().tobytes() for images, _ in apart for image in images}
    known = {image.numpy().tobytes() for images, _ in train.plain(torch.arange(len(train))) for image in images}
    for epoch in range(10):
        seen = set(tasks.classes[: epoch // 2 + 1].flatten().tolist())
        for images, labels in train.batches(epoch):
            assert set(labels.tolist()) <= seen
            assert {image.numpy().tobytes() for image in images} <= known - others


def test_orders_of_classes_and_exemplars_are_the_seeds() -> None:
    one, same, other = (sequence(LABELS, 6, tasks=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.classes, same.classes)
    assert torch.equal(one.ranks, same.ranks)
    assert not torch.equal(one.classes, other.classes)
    assert not torch.equal(one.ranks, other.ranks)


def test_a_class_that_shrinks_keeps_its_first_images() -> None:
    tasks = sequence(LABELS, 6, tasks=3, memory=13)
    before, after = set(tasks.exemplars(1).tolist()), set(tasks.exemplars(2).tolist())
    first = tasks.classes[0].tolist()
    assert {n for n in after if LABELS[n] in first} < before
    small = sequence(LABELS, 6, tasks=3, memory=600)  # more than there are
    assert len(small.exemplars(2)) == sum(LABELS[n] in small.classes[:2].flatten() for n in range(len(LABELS)))


@pytest.mark.parametrize("augmentation", [None, Augmentation(True, 2)])
def test_a_started_epoch_goes_on_with_the_same_batches(load_it, augmentation) -> None:
    train = load_it("digits", sampler=sampler(), epochs=10, batch=64).train
    train.augmentation = augmentation
    for epoch in (0, 3, 9):
        whole = list(train.batches(epoch))
        assert len(whole) == train.steps
        assert train.images == train.steps * 64
        assert equal(whole[2:], train.batches(epoch, start=2))
    assert not equal(train.batches(8), train.batches(9))


def test_streamed_batches_equal_those_from_memory(image_folder, load_it) -> None:
    settings: dict[str, Any] = {"path": str(image_folder()), "sampler": sampler(2, 8, 2), "flip": True}
    memory, stream = (load_it("image_folder", storage=storage, batch=4, **settings) for storage in ("memory", "stream"))
    for epoch in (1, 2):
        assert equal(memory.train.batches(epoch), stream.train.batches(epoch))


def brute_force(features: np.ndarray, count: int) -> list[int]:
    """Rebuffi et al. 2017, algorithm 4: at each k all images are tried that are left."""
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean, chosen = features.mean(0), list[int]()
    for k in range(1, count + 1):
        left = [n for n in range(len(features)) if n not in chosen]
        chosen.append(min(left, key=lambda n: np.linalg.norm(mean - (features[n] + features[chosen].sum(0)) / k)))
    return chosen


def test_herding_brings_the_mean_of_those_kept_nearest_to_the_class() -> None:
    tasks = sequence(LABELS, 6, tasks=3, memory=13, exemplars="herding")
    rest = tasks.ranks.clone()
    label = int(tasks.classes[0, 1])
    positions = torch.tensor([n for n in range(len(LABELS)) if LABELS[n] == label])
    features = np.random.default_rng(0).normal(1.0, 1.0, (len(positions), 5))
    tasks.herd(positions, torch.from_numpy(features))
    expected = [int(positions[n]) for n in brute_force(features, 6)]  # 13 // 2
    of_class = {int(tasks.ranks[n]): int(n) for n in positions if tasks.ranks[n] < 6}
    assert [of_class[rank] for rank in range(6)] == expected
    assert [n for n in tasks.exemplars(1).tolist() if LABELS[n] == label] == sorted(expected)
    assert [n for n in tasks.exemplars(2).tolist() if LABELS[n] == label] == sorted(expected[:3])
    others = torch.tensor([n for n in range(len(LABELS)) if LABELS[n] != label])
    assert torch.equal(tasks.ranks[others], rest[others])


def test_columns_of_tasks_by_hand() -> None:
    tasks = sequence(LABELS, 6, tasks=3)
    a, b = tasks.classes[0].tolist(), tasks.classes[1].tolist()
    labels = torch.tensor([a[0], a[1], a[1], a[0], b[0], int(tasks.classes[2, 0])])
    hits = torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.uint8)
    assert tasks.accuracies(3, hits, labels) == {"task": 2, "task_1_accuracy": 0.75, "task_2_accuracy": 0.0}
    assert tasks.accuracies(1, hits, labels) == {"task": 1, "task_1_accuracy": 0.75}
    assert [tasks.seen_images(epoch, labels) for epoch in (0, 1, 2, 3, 4, 5)] == [4, 4, 5, 5, 6, 6]


def test_a_task_without_images_is_refused() -> None:
    with pytest.raises(UserError, match="has no image to train on"):
        sequence([0, 1, 0], 4, tasks=4)
