from collections.abc import Iterator

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
from normlab.data.resident import Resident

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("batch", [1, 3, 20, 64])
def test_order_and_augmentation_do_not_depend_on_the_batch_size(batch) -> None:
    images, labels = together(split(batch=4).batches(2))
    other_images, other_labels = together(split(batch=batch).batches(2))
    assert torch.equal(images, other_images)
    assert torch.equal(labels, other_labels)


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
    for images, labels in (*split().batches(0), *split().batches()):
        assert (images.dtype, images.shape, labels.dtype) == (torch.float32, (4, 3, 6, 6), torch.int64)
        assert images.is_contiguous()


@pytest.mark.parametrize(
    ("shape", "padding", "cut"),
    [((6, 6), 2, 0), ((5, 7), 2, 0), ((6, 6), 0, 0), ((6, 6), 0, 1), ((6, 6), 0, 3), ((6, 6), 2, 2), ((6, 6), 1, 5)],
)
def test_crop_and_flip_equal_torchvisions_on_pictures(shape, padding, cut) -> None:
    pictures = noise(12, *shape)
    augment = Augmentation(flip=True, crop_padding=padding, cut=cut)
    draws = augment.draw(12, torch.Generator().manual_seed(3))
    for picture, made, (top, left, flip) in zip(pictures, augment(pictures, draws), draws.tolist(), strict=True):
        image = tf.pad(Image.fromarray(picture.permute(1, 2, 0).numpy()), padding)
        image = tf.crop(image, top, left, shape[0] - cut, shape[1] - cut)
        expected = np.array(tf.hflip(image) if flip else image)
        assert np.array_equal(made.permute(1, 2, 0).numpy(), expected)


def test_offsets_are_uniform_over_the_padded_image_and_flips_too() -> None:
    draws = Augmentation(flip=True, crop_padding=2, cut=3).draw(30_000, torch.Generator().manual_seed(0))
    cases = torch.bincount((draws[:, 0] * 8 + draws[:, 1]) * 2 + draws[:, 2])
    assert len(cases) == 8 * 8 * 2  # 6 + 2·2 - 3 leaves 8 offsets each way
    assert stats.chisquare(cases).pvalue > 1e-3


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("flip", "padding"), [(False, 0), (True, 0), (False, 2), (True, 2)])
def test_the_draws_of_recorded_runs_stay_what_they_were(flip, padding, drop_last) -> None:
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


# --- Normalization ----------------------------------------------------------------------------------


def test_training_images_get_mean_0_and_std_1_per_channel(load_it) -> None:
    images = together(load_it("digits", train_size=500).train.batches(0))[0].double()
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-6)
    assert images.std((0, 2, 3), correction=0).tolist() == pytest.approx([1] * 3, abs=1e-6)


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


def test_input_norm_none_gives_pixels_over_255_and_bn_leaves_normalizing_to_the_network(load_it) -> None:
    none, bn = (load_it("digits", input_norm=kind) for kind in ("none", "bn"))
    images, _ = together(none.test.batches())
    assert images.min() == 0
    assert images.max() == torch.tensor(240) / 255
    assert equal(none.train.batches(0), bn.train.batches(0))


def test_small_sets_kept_ready_equal_those_normalized_by_the_batch(load_it, monkeypatch) -> None:
    ready = load_it("digits", crop_size=5)
    train, test = list(ready.train.batches(3)), list(ready.test.batches())
    monkeypatch.setattr(batches, "READY_BYTES", 0)
    assert equal(train, load_it("digits", crop_size=5).train.batches(3))
    assert equal(test, load_it("digits", crop_size=5).test.batches())


# --- Crops of a data set's images -------------------------------------------------------------------


@pytest.mark.parametrize(("size", "offset"), [(8, 0), (7, 0), (6, 1), (5, 1), (1, 3)])
def test_an_evaluation_sees_the_central_crop(load_it, size, offset) -> None:
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


def test_training_sees_every_crop(load_it) -> None:
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


def test_streamed_crops_equal_those_from_memory(load_it, image_folder) -> None:
    settings = {"path": str(image_folder()), "flip": True, "crop_padding": 1, "crop_size": 5, "val_size": 4}
    memory, streamed = (load_it("image_folder", storage=storage, **settings) for storage in ("memory", "stream"))
    assert memory.val
    assert streamed.val
    for one, other in (
        (memory.train.batches(2), streamed.train.batches(2)),
        (memory.test.batches(), streamed.test.batches()),
        (memory.val.batches(), streamed.val.batches()),
    ):
        pairs = list(one), list(other)
        assert equal(*pairs)
        assert all(images.shape[1:] == (3, 5, 5) and images.is_contiguous() for images, _ in (*pairs[0], *pairs[1]))
    assert torch.equal(memory.calibration(10), streamed.calibration(10))


@pytest.mark.parametrize("padding", [0, 4])
def test_a_crop_larger_than_the_images_is_refused(load_it, padding) -> None:
    with pytest.raises(UserError, match=r"crop_size=9 is larger than the 8x8 images .*\n.*\n.*crop_size=8, or"):
        load_it("digits", crop_size=9, crop_padding=padding)


# --- The whole --------------------------------------------------------------------------------------


def test_validation_images_come_from_the_training_images(load_it) -> None:
    data = load_it("digits", val_size=100, input_norm="none")
    assert data.val is not None
    assert (len(data.train), len(data.val), len(data.test)) == (1338, 100, 359)
    seen = {image.numpy().tobytes() for images, _ in data.train.batches(0) for image in images}
    held_out = {image.numpy().tobytes() for images, _ in data.val.batches() for image in images}
    assert not seen & held_out
    assert load_it("digits").val is None


def test_the_test_set_is_the_same_for_every_seed_and_split(load_it) -> None:
    one = load_it("digits", input_norm="none")
    other = load_it("digits", input_norm="none", seed=7, split_seed=9, val_size=50)
    assert equal(one.test.batches(), other.test.batches())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("storage", ["memory", "stream"])
@pytest.mark.parametrize("sampler", [IID(name="iid"), Paired(name="paired", images_per_label=2)])
def test_a_gpu_gets_the_batches_of_the_cpu(load_it, image_folder, storage, sampler) -> None:
    settings = {"path": str(image_folder(count=20)), "storage": storage, "flip": True, "crop_padding": 2, "val_size": 6}
    settings |= {"workers": 1, "crop_size": 7, "sampler": sampler, "eval_stats": "batch"}
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
