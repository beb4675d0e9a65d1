from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as tf

from normlab.data import batches
from normlab.data.batches import Augmentation, Split, standardisation, unit_interval
from normlab.data.load import Data
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


@pytest.mark.parametrize("start", range(6))
def test_a_started_epoch_goes_on_with_the_same_batches(start: int) -> None:
    whole, rest = list(split().batches(1)), list(split().batches(1, start=start))
    assert len(rest) == 5 - start
    for (images, labels), (again, labels_again) in zip(whole[start:], rest, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, labels_again)


def test_epochs_and_seeds_differ() -> None:
    orders = [together(split(seed=seed).batches(epoch))[1].tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


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


@pytest.mark.parametrize("shape", [(6, 6), (5, 7)])
def test_crop_and_flip_equal_torchvisions_on_pictures(shape: tuple[int, int]) -> None:
    pictures = noise(12, *shape)
    augment = Augmentation(flip=True, crop_padding=2)
    draws = augment.draw(12, torch.Generator().manual_seed(3))
    for picture, made, (top, left, flip) in zip(pictures, augment(pictures, draws), draws.tolist(), strict=True):
        image = tf.pad(Image.fromarray(picture.permute(1, 2, 0).numpy()), 2)
        image = tf.crop(image, top, left, *shape)
        expected = np.array(tf.hflip(image) if flip else image)
        assert np.array_equal(made.permute(1, 2, 0).numpy(), expected)


def test_draws_are_uniform() -> None:
    draws = Augmentation(flip=True, crop_padding=1).draw(30_000, torch.Generator().manual_seed(0))
    for column, values in ((0, 3), (1, 3), (2, 2)):
        shares = torch.bincount(draws[:, column]) / 30_000
        assert torch.allclose(shares, torch.full((values,), 1 / values), atol=0.015)


# --- Normalisation ----------------------------------------------------------------------------------


def test_training_images_get_mean_0_and_std_1_per_channel(load_it: Load) -> None:
    images, _ = together(load_it("digits", train_size=500).train.batches(0))
    assert torch.allclose(images.double().mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(images.double().std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), atol=1e-6)


def test_statistics_are_those_of_the_rows_alone() -> None:
    images, rows = noise(50), torch.arange(0, 50, 3)
    found = standardisation(Resident(images), rows, CPU)
    chosen = images[rows].double()
    assert torch.allclose(found.mean.flatten().double(), chosen.mean((0, 2, 3)))
    assert torch.allclose(found.std.flatten().double(), chosen.std((0, 2, 3), correction=0))


def test_a_constant_channel_is_only_centred() -> None:
    images = noise()
    images[:, 1] = 7
    normalised = standardisation(Resident(images), torch.arange(20), CPU)(images)
    assert normalised[:, 1].abs().max() == 0


def test_input_norm_none_gives_pixels_over_255(load_it: Load) -> None:
    images, _ = together(load_it("digits", input_norm="none").test.batches())
    assert images.min() == 0
    assert images.max() == torch.tensor(240) / 255


def test_small_sets_kept_ready_equal_those_normalised_by_the_batch(
    load_it: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = list(load_it("digits").train.batches(3))
    monkeypatch.setattr(batches, "READY_BYTES", 0)
    for (images, labels), (again, labels_again) in zip(ready, load_it("digits").train.batches(3), strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, labels_again)


# --- The whole --------------------------------------------------------------------------------------


def test_the_arms_of_a_comparison_get_the_same_batches(load_it: Load) -> None:
    first, second = (load_it("digits", flip=True, crop_padding=1) for _ in range(2))
    for (images, labels), (again, labels_again) in zip(first.train.batches(0), second.train.batches(0), strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, labels_again)
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
def test_a_gpu_gets_the_batches_of_the_cpu(load_it: Load, image_folder: Callable[..., Path], storage: str) -> None:
    settings = {
        "path": str(image_folder(count=20)),
        "storage": storage,
        "flip": True,
        "crop_padding": 2,
        "val_size": 6,
        "workers": 1,
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
