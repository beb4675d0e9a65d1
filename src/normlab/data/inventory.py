"""The inventory of a data set: its images and classes, read without torch and before a sweep starts.

Here is every check of a data set's settings that can be made without decoding all of it.
"""

import os
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from normlab.common.download import unreachable
from normlab.common.errors import UserError, nearest
from normlab.config.schema import (
    MOST_TASKS,
    ArrayDataset,
    BuiltinDataset,
    ClassIncremental,
    FolderDataset,
    ImageDataset,
    RegressionDataset,
)
from normlab.data import arrays, damage, unreadable
from normlab.data.damage import open_image
from normlab.data.folders import Layout, Listing, images_of, scan

if TYPE_CHECKING:  # Pillow is imported where an image is opened
    from PIL import Image

TURNED = (5, 6, 7, 8)  # orientations of EXIF that exchange width and height
SIZE_SAMPLE = 64  # training images whose size is read when all are expected to have the same


@dataclass(frozen=True)
class Inventory:
    """The size of a data set as a run uses it.

    Attributes:
        train_images: left to train on after the validation split and `train_size`.
        test_images: after `test_size`.
        classes: None for a regression.
        image_size: side in pixels, before any crop; None if the settings do not fix it.
        val_images: split off the training images, or of a part of their own.
        remarks: sentences about files that are left out, as far as they are known.
    """

    train_images: int
    test_images: int
    classes: int | None
    image_size: int | None
    val_images: int = 0
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cifar:
    """torchvision's names for the files of one CIFAR (a test compares them)."""

    title: str
    classes: int
    folder: str
    files: tuple[str, ...]
    archive: str

    @property
    def url(self) -> str:
        """The address of the archive."""
        return f"https://www.cs.toronto.edu/~kriz/{self.archive}"


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFARS = {
    "cifar10": Cifar(
        "CIFAR-10", 10, "cifar-10-batches-py", (*_BATCHES, "test_batch", "batches.meta"), "cifar-10-python.tar.gz"
    ),
    "cifar100": Cifar("CIFAR-100", 100, "cifar-100-python", ("train", "test", "meta"), "cifar-100-python.tar.gz"),
}
IMAGENET_ARCHIVES = {  # by what torchvision unpacks them to (a test compares the names)
    "meta.bin": "ILSVRC2012_devkit_t12.tar.gz",
    "train": "ILSVRC2012_img_train.tar",
    "val": "ILSVRC2012_img_val.tar",
}


def check(
    dataset: ImageDataset | RegressionDataset, data_dir: Path, log: Callable[[str], None] | None = None
) -> Inventory:
    """Locate the data set and check the settings that depend on it.

    Args:
        dataset: its settings.
        data_dir: where data sets are, and what is kept of folders.
        log: as of `usable_images`: the data is about to be used.

    Raises:
        UserError: the data is missing, incomplete or unusable, or a subset does not fit it.
    """
    if isinstance(dataset, RegressionDataset):
        return Inventory(dataset.train_size, dataset.test_size, classes=None, image_size=1)
    if isinstance(dataset, BuiltinDataset):
        if dataset.kind == "digits":
            return _inventory(dataset, train=1438, test=359, classes=10, image_size=dataset.image_size or 8)
        _require_cifar(dataset.kind, data_dir)
        classes, size = CIFARS[dataset.kind].classes, dataset.image_size or 32
        return _inventory(dataset, train=50_000, test=10_000, classes=classes, image_size=size)
    if isinstance(dataset, ArrayDataset):
        return _of_arrays(dataset)
    if dataset.kind == "imagenet" and not _imagenet_is_unpacked(Path(dataset.path).expanduser()):
        return _inventory(dataset, train=1_281_167, test=50_000, classes=1000, image_size=dataset.image_size)
    images = usable_images(dataset, data_dir, log)
    _check_validation(dataset, len(images.val))
    image_size = dataset.image_size or common_size(images, lenient=dataset.skip_unreadable)
    found = _inventory(dataset, len(images.train), len(images.test), len(images.classes), image_size)
    return replace(found, val_images=len(images.val) or found.val_images, remarks=remarks(images))


def check_tasks(sampler: ClassIncremental, classes: int) -> None:
    """Check that a data set's classes make tasks of equal size, and that the memory has room for one image of each.

    Raises:
        UserError: if not.
    """
    if classes % sampler.tasks:
        valid = [tasks for tasks in range(2, MOST_TASKS + 1) if classes % tasks == 0]
        advice = f"Nearest valid: sampler.tasks={nearest(sampler.tasks, valid)}." if valid else "Use sampler=iid."
        raise UserError(f"sampler.tasks={sampler.tasks} cannot have as many of the {classes} classes each.\n{advice}")
    if sampler.memory < classes:
        raise UserError(
            f"sampler.memory={sampler.memory} has no room for an image of each of the {classes} classes.\n"
            f"Nearest valid: sampler.memory={classes}."
        )


def _of_arrays(dataset: ArrayDataset) -> Inventory:
    path = Path(dataset.path).expanduser()
    found = arrays.scan(path)
    val, test = len(found.labels.get("val", ())), arrays.check_split(found, path, dataset.test_fraction)
    _check_validation(dataset, val)
    train = len(found.labels["train"]) - (test if "test" not in found.labels else 0)
    counted = _inventory(dataset, train, test, len(found.classes), dataset.image_size or found.image_size)
    return replace(counted, val_images=val or counted.val_images)


def _check_validation(dataset: ImageDataset, own: int) -> None:
    if own and dataset.val_size:
        raise UserError(
            f"dataset.val_size={dataset.val_size} would split off validation images, and {dataset.name} has {own} of"
            " its own.\nLeave it out: dataset.val_size=0."
        )


def remarks(images: Listing) -> tuple[str, ...]:
    """Return sentences about files that are left out."""
    found = []
    if images.left_out:
        found.append(unreadable.remark(images.root, images.left_out, len(images.paths) + len(images.left_out)))
    if images.not_read:
        counts = ", ".join(f"{number:,} {extension}" for extension, number in images.not_read)
        found.append(f"Files of {images.root} have formats that are not read, and are passed over: {counts}.")
    return tuple(found)


def _inventory(dataset: ImageDataset, train: int, test: int, classes: int, image_size: int | None) -> Inventory:
    left = train - dataset.val_size
    if dataset.val_size and left < classes:
        raise UserError(
            f"dataset.val_size={dataset.val_size} leaves too few of the {train} training images of"
            f" {dataset.name}: each of its {classes} classes needs one.\n"
            f"Nearest valid: dataset.val_size={max(train - classes, 0)}."
        )
    after = f" after dataset.val_size={dataset.val_size}" if dataset.val_size else ""
    for setting, size, most, kind in (
        ("val_size", dataset.val_size or None, train, "training"),
        ("train_size", dataset.train_size, left, "training"),
        ("test_size", dataset.test_size, test, "test"),
    ):
        if size is not None and not classes <= size <= most:
            shown = after if setting == "train_size" else ""
            raise UserError(
                f"dataset.{setting}={size} does not fit {dataset.name}, which has {most} {kind} images{shown}"
                f" in {classes} classes.\n"
                f"Nearest valid: dataset.{setting}={min(max(size, classes), most)}"
                + ("." if setting == "val_size" else f", or dataset.{setting}=null for all.")
            )
    if dataset.crop_size and image_size and dataset.crop_size > image_size:
        raise UserError(
            f"dataset.crop_size={dataset.crop_size} is larger than the {image_size}x{image_size} images of"
            f" {dataset.name}.\nAn evaluation sees the central crop of an image, without crop_padding.\n"
            f"Nearest valid: dataset.crop_size={image_size}, or dataset.crop_size=null for whole images."
        )
    return Inventory(dataset.train_size or left, dataset.test_size or test, classes, image_size, dataset.val_size)


# --- Folders ----------------------------------------------------------------------------------------


def usable_images(dataset: FolderDataset, data_dir: Path, log: Callable[[str], None] | None = None) -> Listing:
    """Return the images of a folder that a run uses.

    With `skip_unreadable`, without those that cannot be read. With `log`, which is called with sentences about
    progress, all images are decoded once to find them; else those are left out that are known or quickly found.

    Raises:
        UserError: the layout is another, or files are damaged, or too many.
    """
    layout = _layout(dataset)
    everything = images_of(layout, dataset.test_fraction, dataset.split_seed)
    paths = tuple(sorted(everything.paths))  # the same of every split
    if not dataset.skip_unreadable:
        damage.check(layout.root, paths, layout.no_files)
        return everything
    left_out: Collection[str] | None
    if log:
        left_out = unreadable.find(layout.root, paths, layout.no_files, data_dir, log)
    else:
        left_out = unreadable.known(layout.root, paths, data_dir)
    if left_out is None:
        left_out = damage.find(layout.root, paths, layout.no_files)
    return images_of(layout, dataset.test_fraction, dataset.split_seed, left_out)


def list_images(dataset: FolderDataset) -> Listing:
    """Return all images of a folder, those that cannot be read included, without opening one.

    Raises:
        UserError: the layout is another.
    """
    return images_of(_layout(dataset), dataset.test_fraction, dataset.split_seed)


def _layout(dataset: FolderDataset) -> Layout:
    root = Path(dataset.path).expanduser()
    if dataset.kind != "imagenet":
        return scan(root)
    layout = scan(root, imagenet=True)
    for part in ("train", "val"):  # where torchvision unpacks archives of classes, and images before it sorts them
        with os.scandir(root / part) as entries:
            left = next((entry.name for entry in entries if entry.name.endswith((".tar", ".JPEG"))), None)
        if left:
            raise UserError(
                f"ImageNet is unpacked in part: {root / part / left} has not been put into its class.\n"
                f"Delete {root / 'train'} and {root / 'val'}; they are unpacked again from the archives."
            )
    return layout


def is_gone(dataset: FolderDataset | ArrayDataset) -> bool:
    """Return whether there is nothing at `dataset.path`, or an empty folder, as of a disk that is not mounted."""
    root = Path(dataset.path).expanduser()
    return not root.exists() or (root.is_dir() and os.access(root, os.R_OK) and not any(root.iterdir()))


def forget() -> None:
    """Let the next look at a folder read it anew."""
    for remembered in (scan, arrays.scan, common_size, damage.find, unreadable.remembered):
        remembered.cache_clear()


@lru_cache(maxsize=8)
def common_size(images: Listing, *, lenient: bool = False) -> int:
    """Return the side in pixels that all images seem to have, by the headers of `SIZE_SAMPLE` training images.

    Args:
        images: of the folder.
        lenient: pass over headers that cannot be read.

    Raises:
        UserError: a header cannot be read; sizes differ or are not square, and `dataset.image_size` has to be chosen.
    """
    sizes = {}
    with warnings.catch_warnings(action="ignore"):  # Pillow's remarks on odd files that it does read
        for path in images.train[:: max(1, len(images.train) // SIZE_SAMPLE)]:
            try:
                with open_image(images.root / path) as image:
                    sizes[path] = shown_size(image)
            except UserError:
                if not lenient:
                    raise
    if not sizes:
        raise UserError(f"None of the images of {images.root} that were looked at can be read, e.g. {images.train[0]}.")
    return require_one_size(sizes)


def shown_size(image: "Image.Image") -> tuple[int, int]:
    """Return width and height as the image is shown: turned by its EXIF orientation."""
    width, height = image.size
    if image.format == "TIFF" or orientation(image) not in TURNED:  # Pillow has turned a TIFF's size already
        return width, height
    return height, width


def orientation(image: "Image.Image") -> int:
    """Return the EXIF orientation, 1 to 8; 1, as it is, where there is none that can be read."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # of a tag that breaks off: whatever Pillow's parsing meets; the pixels are whole
        return 1


def require_one_size(sizes: dict[str, tuple[int, int]]) -> int:
    """Return the side of images whose (width, height) are all one square.

    Raises:
        UserError: they are not; it proposes a side.
    """
    (first, a), (last, b) = (pick(sizes.items(), key=lambda item: item[1]) for pick in (min, max))
    if a == b and a[0] == a[1]:
        return a[0]
    short_sides = sorted(min(size) for size in sizes.values())
    differ = f"{first} is {a[0]}x{a[1]} and {last} is {b[0]}x{b[1]}" if a != b else f"all are {a[0]}x{a[1]}"
    raise UserError(
        f"The images are not squares of one size: {differ} pixels.\n"
        "Choose the side that they are resized and cropped to, e.g."
        f" dataset.image_size={short_sides[len(short_sides) // 2]}."
    )


def _imagenet_is_unpacked(root: Path) -> bool:
    """Return whether torchvision has unpacked ImageNet into `root`; if not, require what it unpacks."""
    unpacked = {name: (root / name).exists() for name in IMAGENET_ARCHIVES}
    missing = [file for name, file in IMAGENET_ARCHIVES.items() if not (unpacked[name] or (root / file).is_file())]
    if missing:
        raise UserError(
            f"ImageNet is not complete in dataset.path={root}: missing {', '.join(missing)}.\n"
            "Get the files from https://image-net.org (an account is needed) and put them into that folder;\n"
            "they are unpacked there on first use. Or name the folder that has them: dataset.path=...\n"
            "Another folder in this layout: dataset=image_folder. Without any download: dataset=digits."
        )
    return all(unpacked.values())


# --- CIFAR ------------------------------------------------------------------------------------------


def _require_cifar(kind: str, data_dir: Path) -> None:
    """Require the files below `data_dir` (their checksums are tested on loading), or a server to fetch them from."""
    cifar = CIFARS[kind]
    folder = data_dir / cifar.folder
    if all((folder / name).is_file() for name in cifar.files) or (data_dir / cifar.archive).is_file():
        return
    reason = unreachable(cifar.url)
    if reason:
        raise cifar_missing(kind, data_dir, reason)


def cifar_missing(kind: str, data_dir: Path, reason: str) -> UserError:
    """Return the error for a CIFAR that is neither complete nor can be downloaded."""
    cifar = CIFARS[kind]
    return UserError(
        f"{cifar.title} is not complete in data_dir={data_dir} and cannot be downloaded: {reason}.\n"
        f"Put {cifar.archive} from {cifar.url}\n"
        f"into {data_dir}, or name the folder that has it: data_dir=...\n"
        "Without any download: dataset=digits."
    )
