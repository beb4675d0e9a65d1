from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from data.equality import equal
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision.transforms import functional as tf

from normlab.common.errors import UserError
from normlab.common.rng import stream
from normlab.config.schema import IID, Paired
from normlab.data import batches
from normlab.data.batches import Augmentation, Split, standardization, unit_interval
from normlab.data.datasets import Data
from normlab.data.resident import Resident

CPU = torch.device("cpu")
Load = Callable[..., Data]


def together(parts: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def noise(count: int = 20, height: int = 6, width: int = 6) -> Tensor:
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


def split(batch: int = 4, count: int = 20, drop_last: bool = False, seed: int = 0) -> Split:
    """Every image is numbered by its label; augmented."""
    return Split(
        Resident(noise(count)),
        torch.arange(count),
        torch.arange(count),
        unit_interval(CPU),
        CPU,
        batch=batch,
        drop_last=drop_last,
        augmentation=Augmentation(flip=True, crop_padding=2),
        seed=seed,
    )


# --- Order and augmentation -------------------------------------------------------------------------


def test_an_epoch_has_every_image_once() -> None:
    _, labels = together(split().batches(0))
    assert labels.tolist() != list(range(20))
    assert sorted(labels.tolist()) == list(range(20))


@pytest.mark.parametrize("batch", [1, 3, 20, 64])
def test_order_and_augmentation_do_not_depend_on_the_batch_size(batch: int) -> None:
    images, labels = together(split(batch=4).batches(2))
    other_images, other_labels = together(split(batch=batch).batches(2))
    assert torch.equal(images, other_images)
    assert torch.equal(labels, other_labels)


def test_an_images_augmentation_does_not_depend_on_its_place() -> None:
    """The images of an epoch, put back into their order, are those of one batch that holds them all in order."""
    images, labels = together(split().batches(5))
    whole = split()
    draws = Augmentation(True, 2).draw(20, batches.stream(0, "augment", 5))
    in_order = unit_interval(CPU)(Augmentation(True, 2)(noise(), draws))
    assert torch.equal(images[labels.argsort()], in_order)
    assert len(whole) == 20


def test_the_last_partial_batch_is_kept_or_dropped() -> None:
    kept, dropped = split(batch=8), split(batch=8, drop_last=True)
    assert [len(labels) for _, labels in kept.batches(0)] == [8, 8, 4]
    assert [len(labels) for _, labels in dropped.batches(0)] == [8, 8]
    assert (kept.steps, dropped.steps) == (3, 2)
    assert [len(labels) for _, labels in dropped.batches(0, start=2)] == []


def test_without_an_epoch_images_come_in_order_as_they_are() -> None:
    images, labels = together(split().batches())
    assert labels.tolist() == list(range(20))
    assert torch.equal(images, noise() / 255)


def test_types_and_shapes() -> None:
    for images, labels in (*split().batches(0), *split().batches()):
        assert images.dtype == torch.float32
        assert images.shape == (4, 3, 6, 6)
        assert images.is_contiguous()
        assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("shape", "padding", "cut"),
    [((6, 6), 2, 0), ((5, 7), 2, 0), ((6, 6), 0, 0), ((6, 6), 0, 1), ((6, 6), 0, 3), ((6, 6), 2, 2), ((6, 6), 1, 5)],
)
def test_crop_and_flip_equal_torchvisions_on_pictures(shape: tuple[int, int], padding: int, cut: int) -> None:
    pictures = noise(12, *shape)
    augment = Augmentation(flip=True, crop_padding=padding, cut=cut)
    draws = augment.draw(12, torch.Generator().manual_seed(3))
    for picture, made, (top, left, flip) in zip(pictures, augment(pictures, draws), draws.tolist(), strict=True):
        image = tf.pad(Image.fromarray(picture.permute(1, 2, 0).numpy()), padding)
        image = tf.crop(image, top, left, shape[0] - cut, shape[1] - cut)
        expected = np.array(tf.hflip(image) if flip else image)
        assert np.array_equal(made.permute(1, 2, 0).numpy(), expected)


def test_offsets_of_smaller_crops_are_uniform_over_the_padded_image() -> None:
    draws = Augmentation(flip=False, crop_padding=2, cut=3).draw(30_000, torch.Generator().manual_seed(0))
    places = torch.bincount(draws[:, 0] * 8 + draws[:, 1])
    assert len(places) == 64  # 6 + 2·2 - 3 leaves 8 offsets each way
    assert stats.chisquare(places).pvalue > 1e-3
    assert draws[:, 2].max() == 0


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("flip", "padding"), [(False, 0), (True, 0), (False, 2), (True, 2)])
def test_the_draws_of_recorded_runs_stay_what_they_were(flip: bool, padding: int, drop_last: bool) -> None:
    """An epoch written out: the order, then of every image its flip, then of every image its two offsets."""
    pictures = noise()
    order = torch.randperm(20, generator=stream(7, "order", 4))
    generator = stream(7, "augment", 4)
    flips = torch.randint(0, 1 + flip, (20,), generator=generator)
    offsets = torch.randint(0, 2 * padding + 1, (20, 2), generator=generator)
    expected = []
    for number in order[: 16 if drop_last else 20].tolist():
        top, left = offsets[number].tolist()
        padded = torch.zeros(3, 6 + 2 * padding, 6 + 2 * padding)
        padded[:, padding : padding + 6, padding : padding + 6] = pictures[number]
        image = padded[:, top : top + 6, left : left + 6]
        expected.append(image.flip(2) if flips[number] else image)
    augmentation = Augmentation(flip, padding) if flip or padding else None
    whole = torch.arange(20)
    settings = {"batch": 8, "drop_last": drop_last, "augmentation": augmentation, "seed": 7}
    images, labels = together(Split(Resident(pictures), whole, whole, unit_interval(CPU), CPU, **settings).batches(4))
    assert labels.tolist() == order[: len(expected)].tolist()
    assert torch.equal(images, torch.stack(expected) / 255)


def test_draws_are_uniform() -> None:
    draws = Augmentation(flip=True, crop_padding=1).draw(30_000, torch.Generator().manual_seed(0))
    for column, values in ((0, 3), (1, 3), (2, 2)):
        shares = torch.bincount(draws[:, column]) / 30_000
        assert torch.allclose(shares, torch.full((values,), 1 / values), atol=0.015)


# --- Normalization ----------------------------------------------------------------------------------


def test_training_images_get_mean_0_and_std_1_per_channel(load_it: Load) -> None:
    images, _ = together(load_it("digits", train_size=500).train.batches(0))
    assert torch.allclose(images.double().mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(images.double().std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), atol=1e-6)


def test_statistics_are_those_of_the_rows_alone() -> None:
    images, rows = noise(50), torch.arange(0, 50, 3)
    found = standardization(Resident(images), rows, CPU)
    chosen = images[rows].double()
    assert torch.allclose(found.mean.flatten().double(), chosen.mean((0, 2, 3)))
    assert torch.allclose(found.std.flatten().double(), chosen.std((0, 2, 3), correction=0))


def test_a_constant_channel_is_only_centered() -> None:
    images = noise()
    images[:, 1] = 7
    normalized = standardization(Resident(images), torch.arange(20), CPU)(images)
    assert normalized[:, 1].abs().max() == 0


def test_input_norm_none_gives_pixels_over_255(load_it: Load) -> None:
    images, _ = together(load_it("digits", input_norm="none").test.batches())
    assert images.min() == 0
    assert images.max() == torch.tensor(240) / 255


def test_input_norm_bn_leaves_normalizing_to_the_network(load_it: Load) -> None:
    one, other = (load_it("digits", input_norm=kind) for kind in ("none", "bn"))
    assert equal(one.train.batches(0), other.train.batches(0))


def test_small_sets_kept_ready_equal_those_normalized_by_the_batch(
    load_it: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = list(load_it("digits").train.batches(3))
    monkeypatch.setattr(batches, "READY_BYTES", 0)
    assert equal(ready, load_it("digits").train.batches(3))


# --- Crops of a data set's images -------------------------------------------------------------------


@pytest.mark.parametrize(("size", "offset"), [(8, 0), (7, 0), (6, 1), (5, 1), (1, 3)])
def test_an_evaluation_sees_the_central_crop(load_it: Load, size: int, offset: int) -> None:
    data, whole = (load_it("digits", crop_size=crop, val_size=100) for crop in (size, None))
    assert (data.image_size, whole.image_size) == (size, 8)
    for part in ("test", "val"):
        images, _ = together(getattr(whole, part).batches())  # normalized by statistics of whole images, too
        cropped, _ = together(getattr(data, part).batches())
        assert torch.equal(cropped, images[:, :, offset : offset + size, offset : offset + size])
    in_order, _ = together(whole.train.batches())
    seen = {image.numpy().tobytes() for image in in_order[:, :, offset : offset + size, offset : offset + size]}
    assert {image.numpy().tobytes() for image in data.calibration(50)} <= seen
    assert {image.numpy().tobytes() for images in data.train.plain_batches(3) for image in images} <= seen


def test_training_sees_every_crop(load_it: Load) -> None:
    settings = {"crop_size": 6, "crop_padding": 1, "input_norm": "none"}
    data, whole = load_it("digits", **settings), load_it("digits", input_norm="none")
    images, _ = together(data.train.batches(0))
    originals, _ = together(whole.train.batches(0))  # in the same order
    assert images.shape == (1438, 3, 6, 6)
    windows = torch.nn.functional.pad(originals, (1,) * 4).unfold(2, 6, 1).unfold(3, 6, 1)
    found = (windows == images[:, :, None, None]).all(dim=5).all(dim=4).all(dim=1)  # (N, 5, 5): which crops it equals
    assert found.any(dim=(1, 2)).all()
    alone = found[found.sum((1, 2)) == 1].sum(0)  # where no other crop has the same pixels
    assert alone.sum() > 1000
    assert alone.min() > 0


def test_a_crop_of_the_whole_image_changes_nothing(load_it: Load) -> None:
    settings = {"flip": True, "crop_padding": 1}
    whole, cropped = (load_it("digits", crop_size=size, **settings) for size in (None, 8))
    assert equal(whole.train.batches(1), cropped.train.batches(1))


def test_streamed_crops_equal_those_from_memory(load_it: Load, image_folder: Callable[..., Path]) -> None:
    settings = {"path": str(image_folder()), "flip": True, "crop_padding": 1, "crop_size": 5, "val_size": 4}
    memory, streamed = (load_it("image_folder", storage=storage, **settings) for storage in ("memory", "stream"))
    assert memory.val
    assert streamed.val
    for one, other in (
        (memory.train.batches(2), streamed.train.batches(2)),
        (memory.test.batches(), streamed.test.batches()),
        (memory.val.batches(), streamed.val.batches()),
    ):
        for (images, labels), (again, labels_again) in zip(one, other, strict=True):
            assert images.shape[1:] == (3, 5, 5)
            assert images.is_contiguous()
            assert again.is_contiguous()
            assert torch.equal(images, again)
            assert torch.equal(labels, labels_again)
    assert torch.equal(memory.calibration(10), streamed.calibration(10))


def test_central_crops_are_the_same_ready_or_by_the_batch(load_it: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, _ = together(load_it("digits", crop_size=5).test.batches())
    monkeypatch.setattr(batches, "READY_BYTES", 0)
    assert torch.equal(together(load_it("digits", crop_size=5).test.batches())[0], ready)


@pytest.mark.parametrize("padding", [0, 4])
def test_a_crop_larger_than_the_images_is_refused(load_it: Load, padding: int) -> None:
    with pytest.raises(UserError, match=r"crop_size=9 is larger than the 8x8 images .*\n.*\n.*crop_size=8, or"):
        load_it("digits", crop_size=9, crop_padding=padding)


# --- The whole --------------------------------------------------------------------------------------


def test_the_arms_of_a_comparison_get_the_same_batches(load_it: Load) -> None:
    first, second = (load_it("digits", flip=True, crop_padding=1) for _ in range(2))
    assert equal(first.train.batches(0), second.train.batches(0))
    assert first.fingerprint == second.fingerprint


def test_validation_images_come_from_the_training_images(load_it: Load) -> None:
    data = load_it("digits", val_size=100, input_norm="none")
    assert data.val is not None
    assert (len(data.train), len(data.val), len(data.test)) == (1338, 100, 359)
    seen = {image.numpy().tobytes() for images, _ in data.train.batches(0) for image in images}
    held_out = {image.numpy().tobytes() for images, _ in data.val.batches() for image in images}
    assert not seen & held_out
    assert load_it("digits").val is None


def test_the_test_set_is_the_same_for_every_seed_and_split(load_it: Load) -> None:
    one = together(load_it("digits", input_norm="none").test.batches())
    other = together(load_it("digits", input_norm="none", seed=7, split_seed=9, val_size=50).test.batches())
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("storage", ["memory", "stream"])
@pytest.mark.parametrize("sampler", [IID(name="iid"), Paired(name="paired", images_per_label=2)])
def test_a_gpu_gets_the_batches_of_the_cpu(
    load_it: Load, image_folder: Callable[..., Path], storage: str, sampler: IID | Paired
) -> None:
    settings = {
        "path": str(image_folder(count=20)),
        "storage": storage,
        "flip": True,
        "crop_padding": 2,
        "val_size": 6,
        "workers": 1,
        "crop_size": 7,
        "sampler": sampler,
        "eval_stats": "batch",
    }
    on_cpu, on_gpu = (load_it("image_folder", device=torch.device(name), **settings) for name in ("cpu", "cuda"))
    for expected, got in (
        (on_cpu.train.batches(1), on_gpu.train.batches(1)),
        (on_cpu.test.batches(), on_gpu.test.batches()),
    ):
        for (images, labels), (gpu_images, gpu_labels) in zip(expected, got, strict=True):
            assert gpu_images.device.type == gpu_labels.device.type == "cuda"
            assert torch.allclose(images, gpu_images.cpu())
            assert torch.equal(labels, gpu_labels.cpu())
    assert torch.allclose(on_cpu.calibration(9), on_gpu.calibration(9).cpu())
