"""Arrays of one's own: what is read, against the arrays; what is refused, by its sentence."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from normlab import runs
from normlab.common.errors import UserError
from normlab.data import datasets, inventory
from normlab.data.recorded import image_files
from normlab.launchers.unchanged import Unchanged
from normlab.training.run import train_run

CPU = torch.device("cpu")


def images(number: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, *shape), dtype=np.uint8)


def labels(number: int, classes: int = 3) -> np.ndarray:
    return np.arange(number) % classes


def whole(*shape: int, **others: Any) -> dict[str, Any]:
    """A set with a split, as MedMNIST writes it: labels uint8 (N, 1)."""
    sizes = {"train": 12, "val": 6, "test": 9}
    found: dict[str, Any] = {}
    for seed, (part, size) in enumerate(sizes.items()):
        found[f"{part}_images"] = images(size, *shape, seed=seed)
        found[f"{part}_labels"] = labels(size)[:, None].astype(np.uint8)
    return {key: value for key, value in (found | others).items() if value is not None}


def write(path: Path, arrays: dict[str, Any], *, compressed: bool = False) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def load(make: Any, path: Path, *settings: str) -> datasets.Data:
    config = make("dataset=npz", f"dataset.path={path}", "batch=4", "input_norm=none", *settings)
    return datasets.load(config, CPU, log=lambda sentence: None)


def content(split: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, as uint8 (N, 3, H, W), and labels in the order of rows."""
    batches = list(split.plain(torch.arange(len(split))))
    pixels = torch.cat([x for x, _ in batches]) * 255
    return pixels.round().to(torch.uint8).numpy(), torch.cat([y for _, y in batches]).numpy()


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3)])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_is_read_with_its_own_split(make, tmp_path, shape, compressed) -> None:
    arrays = whole(*shape, classes=np.array(["a", "b b", "ç"]))
    data = load(make, write(tmp_path / "blood.npz", arrays, compressed=compressed))
    assert (data.classes, data.image_size) == (("a", "b b", "ç"), 8)
    for part, split in (("train", data.train), ("val", data.val), ("test", data.test)):
        pixels, found = content(split)
        expected = arrays[f"{part}_images"].reshape(len(found), 8, 8, -1)
        for channel in range(3):
            np.testing.assert_array_equal(pixels[:, channel], expected[..., channel % expected.shape[-1]])
        np.testing.assert_array_equal(found, arrays[f"{part}_labels"][:, 0])


def test_what_is_named_beside_images_and_labels_is_passed_over_and_names_of_labels_are_those_of_classes(
    make, tmp_path
) -> None:
    more = {"image_ids": np.arange(12), "my_train_labels": labels(12) * 0, "label_names": np.array(["a", "b", "c"])}
    data, expected = (load(make, write(tmp_path / "set.npz", whole(4, 4) | each)) for each in (more, {}))
    for found, known in zip(content(data.train), content(expected.train), strict=True):
        np.testing.assert_array_equal(found, known)
    assert data.classes == ("a", "b", "c")


def test_images_of_one_color_are_refused(make, tmp_path) -> None:
    """Such are pictures of floats from 0 to 1 whose fractions were cut off."""
    path = write(tmp_path / "set.npz", whole(4, 4, test_images=(images(9, 4, 4) / 256).astype(np.uint8)))
    with pytest.raises(UserError, match=r"All pixels of test_images in .* are 0\.\n.*np\.round"):
        load(make, path)


@pytest.mark.parametrize("layout", ["npy", "npz", "x_y", "fortran"])
def test_a_folder_says_the_same_as_a_file(make, tmp_path, layout) -> None:
    arrays = whole(4, 4, val_images=None, val_labels=None)
    expected = content(load(make, write(tmp_path / "one.npz", arrays)).train)
    folder = tmp_path / "folder"
    folder.mkdir()
    if layout == "npz":
        for part in ("train", "test"):
            of_part = {kind: arrays[f"{part}_{kind}"] for kind in ("images", "labels")}
            write(folder / f"{part}.npz", of_part | {"filenames": np.arange(3)})
    for name, array in arrays.items() if layout != "npz" else ():
        called = name.replace("test_", "Testing-")
        if layout == "x_y":
            called = {"images": "x", "labels": "y"}[name.split("_")[1]] + "_" + name.split("_")[0]
        np.save(folder / f"{called}.npy", np.asfortranarray(array) if layout == "fortran" else array)
    (folder / "readme.txt").write_text("not read")
    data = load(make, folder)
    for found, known in zip(content(data.train), expected, strict=True):
        np.testing.assert_array_equal(found, known)
    assert data.classes == ("0", "1", "2")


def test_a_share_of_every_class_is_tested_on(make, tmp_path) -> None:
    arrays = {"images": images(40, 4, 4), "labels": labels(40, 4)}
    path = write(tmp_path / "plain.npz", arrays)
    data = load(make, path, "dataset.test_fraction=0.25")
    train, test = content(data.train), content(data.test)
    assert np.bincount(test[1]).tolist() == [3, 3, 2, 2]
    together = np.concatenate([train[0][:, 0], test[0][:, 0]])
    assert sorted(map(bytes, together)) == sorted(map(bytes, arrays["images"]))  # each image once
    of_image = {bytes(image): label for image, label in zip(arrays["images"], arrays["labels"], strict=True)}
    for pixels, found in (train, test):
        assert [of_image[bytes(image[0])] for image in pixels] == found.tolist()
    other = load(make, path, "dataset.test_fraction=0.25", "dataset.split_seed=1", "seed=3")
    assert not np.array_equal(content(other.test)[0], test[0])
    assert np.array_equal(content(load(make, path, "dataset.test_fraction=0.25", "seed=3").test)[0], test[0])
    found = inventory.check(make("dataset=npz", f"dataset.path={path}", "dataset.test_fraction=0.25").dataset, path)
    assert (found.train_images, found.test_images, found.classes, found.image_size) == (30, 10, 4, 4)


def test_val_is_tested_on_where_there_is_no_test_and_images_are_resized(make, tmp_path) -> None:
    path = write(tmp_path / "set.npz", whole(8, 8, test_images=None, test_labels=None))
    data = load(make, path, "dataset.image_size=4")
    assert data.val is None
    assert (len(data.test), data.image_size) == (6, 4)
    assert content(data.test)[0].shape == (6, 3, 4, 4)
    with_val = load(make, write(tmp_path / "val.npz", whole(8, 8)), "dataset.image_size=4")
    assert content(with_val.val)[0].shape == (6, 3, 4, 4)


SPLIT = ("dataset.test_fraction=0.2",)
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "float": ({"train_images": images(12, 4, 4) / 255}, (), "Write np.round(255 * x).astype(np.uint8), if 1 is white."),
    "16 bits": ({"train_images": images(12, 4, 4).astype(np.uint16)}, (), "is uint16; images are expected as uint8"),
    "channels first": ({"train_images": images(12, 3, 4, 4)}, (), "np.moveaxis(x, 1, -1)"),
    "flat": ({"train_images": images(12, 16)}, (), "has the shape (12, 16)"),
    "rgba": ({"train_images": images(12, 4, 4, 4)}, (), "Leave the transparency out: x[..., :3]."),
    "empty": ({"train_images": images(0, 4, 4), "train_labels": labels(0)}, (), "is empty"),
    "not square": ({"train_images": images(12, 4, 5)}, (), "images of 4x5 pixels"),
    "other sizes": ({"test_images": images(9, 5, 5)}, (), "other sizes or channels in other parts"),
    "no labels": ({"train_labels": None}, (), "train_images in"),
    "no images": ({"val_images": None}, (), "and no images beside it"),
    "nothing": (dict.fromkeys(whole(4, 4)) | {"a": np.zeros(3)}, (), "no images and labels to train on"),
    "no train": ({"train_images": None, "train_labels": None}, (), "no images and labels to train on"),
    "lengths": ({"train_labels": labels(11)}, (), "has 11 labels for 12 images"),
    "one-hot": ({"train_labels": np.eye(3, dtype=int)[labels(12)]}, (), "has the shape (12, 3); expected is one label"),
    "scalar": ({"train_labels": np.array(3)}, (), "has the shape (); expected is one label"),
    "float labels": ({"train_labels": labels(12) / 1}, (), "is float64; labels are expected as whole numbers"),
    "texts": ({"train_labels": np.array(["a", "b", "c"] * 4)}, (), "np.unique(labels, return_inverse=True)[1]"),
    "gap": ({"train_labels": labels(12) * 2}, (), "has the labels 0, 2, 4; expected are 0 to"),
    "from one": ({"train_labels": labels(12) + 1}, (), "has the labels 1, 2, 3; expected are 0 to"),
    "negative": ({"train_labels": labels(12) - 1}, (), "has the labels -1, 0, 1"),
    "huge": ({"train_labels": labels(12).astype(np.uint64) + 2**63}, (), "expected are 0 to"),
    "one class": (
        {f"{p}_labels": labels(n, 1) for p, n in (("train", 12), ("val", 6), ("test", 9))},
        (),
        "two or more.\nGive images of another class.",
    ),
    "classes differ": ({"test_labels": labels(9, 4)}, (), "only one of them has 3"),
    "a class is missing": ({"test_labels": labels(9, 2)}, (), "only one of them has 2"),
    "names": ({"classes": np.array(["a", "b"])}, (), "expected are the names of the 3 classes"),
    "equal names": ({"classes": np.array(["a", "b", "a"])}, (), "each another text"),
    "twice": ({"training_images": images(12, 4, 4)}, (), "are both train images"),
    "two splits": ({}, SPLIT, "would split off others"),
    "two validations": ({}, ("dataset.val_size=3",), "has 6 of its own"),
    "objects": ({"train_labels": np.array([{}] * 12)}, (), "Python's objects are not read"),
    "object images": ({"train_images": np.array([{}] * 12)}, (), "Write all images at one size, with np.stack."),
    "no test": (dict.fromkeys(k for k in whole(4, 4) if not k.startswith("train")), (), "has no test images"),
    "rare": (
        {**dict.fromkeys(whole(4, 4)), "images": images(21, 4, 4), "labels": np.array([0] * 20 + [1])},
        SPLIT,
        "Class 1 of",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_data_set_is_a_sentence(make, tmp_path, name) -> None:
    changes, settings, sentence = REFUSED[name]
    path = write(tmp_path / "set.npz", whole(4, 4, **changes))
    with pytest.raises(UserError) as error:
        load(make, path, *settings)
    assert sentence in str(error.value)
    assert len(str(error.value).splitlines()) <= 5


@pytest.mark.parametrize("damage", ["cut", "no zip", "no array", "cut inside", "pickle", "huge header"])
def test_damaged_files_are_sentences(make, tmp_path, damage) -> None:
    path = write(tmp_path / "set.npz", whole(4, 4))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "no zip":
        path.write_bytes(b"hello")
    else:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = "train_labels.npy"
        members[name] = {
            "no array": b"hello",
            "cut inside": members[name][:-5],
            "pickle": b"\x80\x04K\x01.",
            "huge header": members[name].replace(b"(12, 1)", b"(99999999999999, 1)"),
        }[damage]
        with zipfile.ZipFile(path, "w") as archive:
            for each, text in members.items():
                archive.writestr(each, text)
    with pytest.raises(UserError, match="cannot be read"):
        load(make, path)


@pytest.mark.parametrize("path", ["missing", "empty", "set.txt"])
def test_a_path_without_arrays_is_a_sentence(make, tmp_path, path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "set.txt").write_text("hello")
    with pytest.raises(UserError, match="Expected arrays train_images"):
        load(make, tmp_path / path)


def test_a_set_is_called_by_its_file_and_known_by_its_bytes(make, tmp_path) -> None:
    path = write(tmp_path / "blood cells.npz", whole(8, 8))
    config = make("dataset=npz", f"dataset.path={path}", "epochs=1", "batch=4", "threads=1", "device=cpu",
                  "model=custom", "model.target=small.SmallNet", "model.name=small")  # fmt: skip
    assert config.dataset.name == "blood_cells"
    assert runs.run_id(config.as_dict()) == runs.run_id(
        {**config.as_dict(), "dataset": {**config.as_dict()["dataset"], "path": "/elsewhere/x.npz"}}
    )
    train_run(config)
    run = runs.Run(config.as_dict())
    recorded = runs.read_provenance(run.folder)["data"]
    assert (recorded["classes"], recorded["images"], recorded["validation_images"]) == (3, 27, 6)
    inventory.forget()
    assert image_files(config).change(recorded) == ""
    Unchanged().check(run, config)
    path.with_suffix(".copy").write_bytes(path.read_bytes())
    path.with_suffix(".copy").replace(path)  # other times, the same bytes
    inventory.forget()
    assert image_files(config).change(recorded) == ""
    write(path, whole(8, 8, test_images=images(9, 8, 8, seed=9)))
    inventory.forget()
    assert image_files(config).change(recorded) == "other files or contents"
    write(path, whole(8, 8, test_images=images(6, 8, 8), test_labels=labels(6)))
    inventory.forget()
    with pytest.raises(UserError, match="27 images then, 24 now"):
        Unchanged().check(run, config)
    path.unlink()
    Unchanged().check(run, config)  # of what is gone, a line says so
