"""sampler=paired, the order of an evaluation by batch statistics, and the images that are only looked at."""

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from data.equality import equal
from scipy import stats
from torch import Tensor

from normlab.common.rng import stream
from normlab.config.schema import Paired
from normlab.data.batches import Augmentation, Split, unit_interval
from normlab.data.resident import Resident
from normlab.data.samplers import evaluation_order, paired
from normlab.norms import GroupedBatchNorm2d

CPU = torch.device("cpu")
PAIRS = Paired(name="paired", images_per_label=2)
# Classes of 9, 0, 4, 1 and 6 images, mixed.
LABELS = torch.tensor([0] * 9 + [2] * 4 + [3] * 1 + [4] * 6)[
    torch.randperm(20, generator=torch.Generator().manual_seed(1))
]
SIGNIFICANT = 1e-3  # a right sampler fails a test with this probability, once and for all: its seed is fixed


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(counts: dict[Any, int], cases: int) -> bool:
    """Pearson's chi-square test of equal frequencies of all `cases`, those never seen included."""
    assert len(counts) <= cases
    seen = [*counts.values()] + [0] * (cases - len(counts))
    return bool(stats.chisquare(seen).pvalue > SIGNIFICANT)


def split(batch: int = 8, each: int | None = 2, **options: Any) -> Split:
    """20 images, each of one color that is its number, which is its red value."""
    images = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 3, 4, 4).contiguous()
    return Split(
        Resident(images),
        torch.arange(20),
        LABELS,
        unit_interval(CPU),
        CPU,
        batch=batch,
        images_per_label=each,
        **options,
    )


def numbers(images: Tensor) -> list[int]:
    return [round(float(image.amax()) * 255) for image in images]


# --- What paired draws ------------------------------------------------------------------------------


def test_labels_are_drawn_with_replacement() -> None:
    """Two in a row are each pair of the four that occur equally often, the same label twice included."""
    drawn = LABELS[paired(LABELS, 16_000, 2, generator())[::2]].view(-1, 2).tolist()
    assert uniform(Counter(map(tuple, drawn)), cases=16)


@pytest.mark.parametrize("each", [2, 3, 4])
def test_images_of_a_drawn_label_are_every_ordered_choice_equally_often(each) -> None:
    """Ordered: which of the groups of norm_batch an image comes into must not depend on the image."""
    chosen = paired(LABELS, 8000 * each, each, generator()).view(-1, each)
    for label, size in ((0, 9), (2, 4), (4, 6)):
        members = (label == LABELS).nonzero().flatten().tolist()
        assert len(members) == size
        choices = list(itertools.permutations(members, each))
        counts = Counter(tuple(group) for group in chosen[LABELS[chosen[:, 0]] == label].tolist())
        assert counts.keys() <= set(choices), "an image came twice, or one of another class"
        if len(choices) < 400:  # else too few of each for the test
            assert uniform(counts, cases=len(choices))


def test_a_class_with_too_few_images_is_drawn_with_replacement() -> None:
    chosen = paired(LABELS, 5 * 8000, 5, generator()).view(-1, 5)
    of_four = chosen[LABELS[chosen[:, 0]] == 2]
    assert len(of_four) > 1000
    for place in range(5):
        assert uniform(Counter(of_four[:, place].tolist()), cases=4)
    assert uniform(Counter(map(tuple, of_four[:, :2].tolist())), cases=16)
    of_one = chosen[LABELS[chosen[:, 0]] == 3]
    assert of_one.unique().tolist() == (LABELS == 3).nonzero().flatten().tolist()
    assert all(len(group.unique()) == 1 for group in LABELS[paired(LABELS, 240, 12, generator())].view(-1, 12))


# --- Epochs of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("batch", "steps"), [(2, 10), (6, 4), (8, 3), (20, 1), (24, 1)])
def test_an_epoch_has_as_many_batches_as_with_iid_all_full(batch, steps, drop_last) -> None:
    pairs, iid = split(batch, drop_last=drop_last), split(batch, each=None, drop_last=drop_last)
    assert [len(labels) for _, labels in pairs.batches(0)] == [batch] * steps
    assert (pairs.steps, pairs.images) == (steps, steps * batch)
    sizes = [len(labels) for _, labels in iid.batches(0)]
    assert (iid.steps, iid.images) == (len(sizes), sum(sizes))
    assert split(batch, each=None).steps == steps


def test_images_keep_their_labels() -> None:
    for images, labels in split().batches(3):
        assert LABELS[numbers(images)].tolist() == labels.tolist()
        assert labels[::2].tolist() == labels[1::2].tolist()


@pytest.mark.parametrize("each", [None, 2])
@pytest.mark.parametrize("augmentation", [None, Augmentation(True, 2), Augmentation(True, 1, cut=1)])
def test_a_started_epoch_goes_on_with_the_same_batches(augmentation, each) -> None:
    whole, *rests = (list(split(each=each, augmentation=augmentation).batches(1, start)) for start in range(4))
    for start, rest in enumerate(rests, start=1):
        assert len(rest) == 3 - start
        assert equal(whole[start:], rest) or start == 3


@pytest.mark.parametrize("each", [None, 2])
def test_epochs_and_seeds_differ(each) -> None:
    drawn = [
        [number for images, _ in split(each=each, seed=seed).batches(epoch) for number in numbers(images)]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert drawn[0] != drawn[1]
    assert drawn[0] != drawn[2]


def test_the_copies_of_an_image_in_an_epoch_are_augmented_each_for_itself() -> None:
    """Colors run over the columns of otherwise like images, so that a mirrored one is known."""
    train = split(batch=200, augmentation=Augmentation(flip=True, crop_padding=0))
    train.source = Resident(torch.arange(4, dtype=torch.uint8).expand(20, 3, 4, 4).contiguous())
    flips: dict[int, set[bool]] = {}
    order = train._order("order", 0).tolist()
    (images, _), *none_left = train.batches(0)
    assert not none_left
    for number, image in zip(order, images, strict=True):
        flips.setdefault(number, set()).add(bool(image[0, 0, 0] > 0))
    assert max(Counter(order).values()) > 10
    assert any(len(seen) == 2 for seen in flips.values())


@pytest.mark.parametrize("each", [2, 4])
def test_half_minibatches_part_the_images_of_a_label(each) -> None:
    """norm_batch = batch / images_per_label (Ioffe 2017): who shares statistics with whom is read off the gradients."""
    batch = 8
    layer = GroupedBatchNorm2d(1, norm_batch=batch // each)
    (_, labels), *_ = split(batch, each).batches(0)
    images = torch.randn(batch, 1, 3, 3, generator=generator()).requires_grad_()
    together = []
    for output in layer(images):
        (gradient,) = torch.autograd.grad((output**3).sum(), images, retain_graph=True)
        together.append((gradient.abs().amax((1, 2, 3)) > 0).nonzero().flatten().tolist())
    for image, others in enumerate(together):
        assert len(others) == batch // each
        first = image // each * each
        assert labels[first : first + each].unique().numel() == 1
        assert set(range(first, first + each)) & set(others) == {image}


def test_streamed_pairs_equal_those_from_memory(image_folder, load_it) -> None:
    settings: dict[str, Any] = {"path": str(image_folder()), "sampler": PAIRS, "flip": True, "crop_padding": 2}
    memory, stream = (load_it("image_folder", storage=storage, **settings) for storage in ("memory", "stream"))
    assert equal(memory.train.batches(1), stream.train.batches(1))
    assert equal(memory.train.batches(1, start=1), stream.train.batches(1, start=1))
    cropped = load_it("image_folder", crop_scale=[0.3, 1.0], **settings).train
    assert equal(itertools.islice(cropped.batches(1), 1, None), cropped.batches(1, start=1))


# --- The order of an evaluation ---------------------------------------------------------------------


@pytest.mark.parametrize("each", [None, 2, 3, 7, 30])
def test_an_evaluation_has_every_image_once(each) -> None:
    order = evaluation_order(LABELS, each, generator())
    assert order.sort().values.tolist() == list(range(20))
    assert not torch.equal(order, torch.arange(20))


@pytest.mark.parametrize(("each", "groups", "left_over"), [(2, 4 + 2 + 3, 2), (3, 3 + 1 + 2, 2), (4, 2 + 1 + 1, 4)])
def test_an_evaluation_in_pairs_has_all_whole_ones_then_what_is_left(each, groups, left_over) -> None:
    labels = LABELS[evaluation_order(LABELS, each, generator())]
    first, rest = labels[: groups * each].view(-1, each), labels[groups * each :]
    assert len(rest) == left_over
    assert all(len(set(group)) == 1 for group in first.tolist())
    assert max(Counter(rest.tolist()).values()) < each
    assert first[:, 0].tolist() != sorted(first[:, 0].tolist())


def test_an_evaluation_mixes_groups_and_members_evenly() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    orders = [tuple(evaluation_order(labels, 2, generator(seed)).tolist()) for seed in range(4000)]
    assert uniform(Counter(orders), cases=24 * 2 * 3)  # of the four, of the two, and the place of the latter


def test_an_evaluation_by_batch_statistics_is_in_one_random_order_for_every_arm_and_seed(load_it) -> None:
    given = load_it("digits", input_norm="none", val_size=100)
    one, other, split_anew = (
        load_it("digits", input_norm="none", val_size=100, eval_stats="batch", **changes)
        for changes in ({}, {"seed": 5, "batch": 32}, {"split_seed": 1})
    )
    for part in ("test", "val"):
        in_order, shuffled, again, anew = (
            [
                (image.numpy().tobytes(), label)
                for images, labels in getattr(data, part).batches()
                for image, label in zip(images, labels.tolist(), strict=True)
            ]
            for data in (given, one, other, split_anew)
        )
        assert shuffled == again
        assert shuffled != in_order
        assert shuffled != anew
        assert sorted(shuffled) == sorted(in_order)
    assert equal(given.train.batches(0), one.train.batches(0))
    precise = load_it("digits", input_norm="none", sampler=PAIRS, eval_stats="precise")
    assert equal(precise.test.batches(), given.test.batches()), "other evaluations keep the data set's order"


def test_every_batch_of_a_sorted_folder_is_evaluated_with_several_classes(image_folder, load_it) -> None:
    settings: dict[str, Any] = {"path": str(image_folder(count=40)), "eval_batch": 20}
    for storage in ("memory", "stream"):
        as_it_lies = load_it("image_folder", storage=storage, **settings)
        mixed = load_it("image_folder", storage=storage, eval_stats="batch", **settings)
        assert {len(labels.unique()) for _, labels in as_it_lies.test.batches()} == {1}
        assert {len(labels.unique()) for _, labels in mixed.test.batches()} == {2}


def test_paired_is_evaluated_in_batches_of_25_labels_times_2_images(load_it) -> None:
    test = load_it("digits", sampler=PAIRS, eval_stats="batch", eval_batch=50).test
    *full, (_, last) = test.batches()
    assert len(full) == 7
    assert len(last) == 9  # 359 images
    for _, labels in full:
        assert labels[::2].tolist() == labels[1::2].tolist()
        assert len(labels[::2].unique()) > 5


# --- Images to look at ------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"flip": True, "crop_padding": 1}, {"sampler": PAIRS}])
def test_calibration_images_are_some_training_images_as_they_are(load_it, changes) -> None:
    data = load_it("digits", val_size=100, **changes)
    images = data.calibration(70)
    assert images.shape == (70, 3, 8, 8)
    assert images.dtype == torch.float32
    known = Counter(image.numpy().tobytes() for images, _ in data.train.batches() for image in images)
    assert not Counter(image.numpy().tobytes() for image in images) - known
    assert torch.equal(images, load_it("digits", val_size=100, batch=32, **changes).calibration(70))


def test_calibration_takes_all_there_are_and_follows_the_seed(load_it) -> None:
    data, other = load_it("digits", train_size=50), load_it("digits", train_size=50, seed=1)
    everything = data.calibration(256)
    assert len(everything) == 50
    assert torch.equal(everything[:20], data.calibration(20))
    in_order = torch.cat([images for images, _ in data.train.batches()])
    assert torch.equal(everything, in_order[torch.randperm(50, generator=stream(0, "calibration"))])
    assert not torch.equal(data.calibration(20), other.calibration(20))


@pytest.mark.parametrize("drop_last", [False, True])
def test_plain_batches_are_an_epoch_at_most_not_augmented(drop_last) -> None:
    train = split(each=None, drop_last=drop_last, augmentation=Augmentation(True, 2))
    found = list(train.plain_batches(200))
    assert [len(images) for images in found] == ([8, 8] if drop_last else [8, 8, 4])
    seen = [number for images in found for number in numbers(images)]
    assert len(set(seen)) == len(seen) == train.images
    assert seen != sorted(seen)
    assert all(torch.equal(image, image.amax().expand(3, 4, 4)) for images in found for image in images)  # no padding
    again = list(train.plain_batches(2))
    assert len(again) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=False))


def test_plain_batches_are_paired_as_in_training() -> None:
    found = [numbers(images) for images in split(augmentation=Augmentation(True, 2)).plain_batches(200)]
    assert [len(images) for images in found] == [8, 8, 8]
    assert all(LABELS[images][::2].tolist() == LABELS[images][1::2].tolist() for images in found)
    assert found != [numbers(images) for images in split(seed=1).plain_batches(200)]
