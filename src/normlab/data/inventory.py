"""The inventory of a data set: its images and classes, read without torch and before a sweep starts.

Here is every check of a data set's settings that can be made without decoding all of it.
"""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from normlab.common.download import unreachable
from normlab.common.errors import UserError, nearest
from normlab.config.schema import BuiltinDataset, FolderDataset, ImageDataset, RegressionDataset
from normlab.data import damage
from normlab.data.damage import open_image

if TYPE_CHECKING:  # Pillow is imported where an image is opened
    from PIL import Image

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
NO_CLASSES = {  # by systems and programs, in lower case; names that begin with a dot are left out, too
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
    *("__macosx", "$recycle.bin", "system volume information", "lost+found", "__pycache__"),
}
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
    """

    train_images: int
    test_images: int
    classes: int | None
    image_size: int | None


@dataclass(frozen=True)
class Listing:
    """The images of a folder, by class and then by name; `/`-separated paths relative to `root`."""

    root: Path
    classes: tuple[str, ...]
    train: tuple[str, ...]
    train_labels: tuple[int, ...]
    test: tuple[str, ...]
    test_labels: tuple[int, ...]


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


def check(dataset: ImageDataset | RegressionDataset, data_dir: Path) -> Inventory:
    """Locate the data set and check the settings that depend on it.

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
    if dataset.kind == "imagenet" and not _imagenet_is_unpacked(Path(dataset.path).expanduser()):
        return _inventory(dataset, train=1_281_167, test=50_000, classes=1000, image_size=dataset.image_size)
    listing = list_images(dataset)
    damage.check(listing.root, (*listing.train, *listing.test))
    image_size = dataset.image_size or common_size(listing)
    return _inventory(dataset, len(listing.train), len(listing.test), len(listing.classes), image_size)


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
    return Inventory(dataset.train_size or left, dataset.test_size or test, classes, image_size)


# --- Folders ----------------------------------------------------------------------------------------


def list_images(dataset: FolderDataset) -> Listing:
    """Return the images below `dataset.path`, as `scan` lists them."""
    root = Path(dataset.path).expanduser()
    if dataset.kind != "imagenet":
        return scan(root)
    listing = scan(root, ("val",))
    for part in ("train", "val"):  # where torchvision unpacks archives of classes, and images before it sorts them
        with os.scandir(root / part) as entries:
            left = next((entry.name for entry in entries if entry.name.endswith((".tar", ".JPEG"))), None)
        if left:
            raise UserError(
                f"ImageNet is unpacked in part: {root / part / left} has not been put into its class.\n"
                f"Delete {root / 'train'} and {root / 'val'}; they are unpacked again from the archives."
            )
    return listing


def is_gone(dataset: FolderDataset) -> bool:
    """Return whether there is nothing at `dataset.path`, or an empty folder, as of a disk that is not mounted."""
    root = Path(dataset.path).expanduser()
    return not root.exists() or (root.is_dir() and os.access(root, os.R_OK) and not any(root.iterdir()))


@lru_cache(maxsize=8)  # a sweep checks every run
def scan(root: Path, test_names: tuple[str, ...] = ("test", "val")) -> Listing:
    """List `root/train/<class>/*` and the first of `root/<test_names>/<class>/*` that exists.

    Classes are the folders' names in sorted order. Folders inside a class are entered. Hidden files and folders,
    those of `NO_CLASSES` and files without an extension of `IMAGE_EXTENSIONS` are left out.

    Raises:
        UserError: the layout is not that, the classes of the two parts differ, or there is a single one.
    """
    layout = f"Expected {root}/train/<class>/* and {root}/{' or '.join(test_names)}/<class>/*."
    try:
        _require_folder(root)
        parts = {entry.name for entry in os.scandir(root) if _is_folder(entry)}
        test_name = next((name for name in test_names if name in parts), None)
        if not parts:
            raise UserError(f"The folder {root} has no folders in it.\n{layout}")
        if "train" not in parts or test_name is None:
            missing = "train" if "train" not in parts else " or ".join(test_names)
            raise UserError(f"The folder {root} has no folder {missing}; it has {_abridged(sorted(parts))}.\n{layout}")
        train, test = _classes(root, "train", layout), _classes(root, test_name, layout)
    except OSError as error:
        raise UserError(f"The folder {root} cannot be read: {error.strerror} ({error.filename}).") from None
    if train.keys() != test.keys():
        raise UserError(_class_difference(root, set(train), test_name, set(test)))
    if len(train) == 1:
        raise UserError(
            f"The folder {root} has a single class, {next(iter(train))}: every network would be right about all images."
            f"\n{layout}\nGive it two classes or more."
        )
    return Listing(root, tuple(train), *_paths_and_labels(train), *_paths_and_labels(test))


def forget() -> None:
    """Let the next look at a folder read it anew."""
    for remembered in (scan, common_size, damage.check):
        remembered.cache_clear()


def _paths_and_labels(classes: dict[str, list[str]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    labels = (label for label, paths in enumerate(classes.values()) for _ in paths)
    return tuple(chain.from_iterable(classes.values())), tuple(labels)


def _require_folder(root: Path) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise UserError(f"dataset.path={root} is a file.\nExpected a folder with train/ and test/ or val/ in it.")
    siblings = [entry.name for entry in root.parent.iterdir()] if root.parent.is_dir() else []
    close = nearest(root.name, siblings)
    raise UserError(
        f"The folder dataset.path={root} does not exist"
        + (f"; did you mean {root.parent / close}?" if close else ".")
        + "\nExpected a folder with train/<class>/* and test/<class>/* (or val/) in it."
    )


def _classes(root: Path, part: str, layout: str) -> dict[str, list[str]]:
    """List the image paths of each class below `root/part`, both sorted."""
    names = [entry.name for entry in os.scandir(root / part) if _is_folder(entry)]
    if not names:
        raise UserError(f"The folder {root / part} has no class folders in it.\n{layout}")
    classes = {name: sorted(_images(root, f"{part}/{name}")) for name in sorted(names)}
    empty = [name for name, paths in classes.items() if not paths]
    if empty:
        raise UserError(
            f"{'Classes' if len(empty) > 1 else 'A class'} without images in {root / part}: {_abridged(empty)}.\n"
            f"Files count as images by their extension: {' '.join(IMAGE_EXTENSIONS)}.\n"
            "Add images, or remove the folder from both parts."
        )
    return classes


def _images(root: Path, folder: str) -> Iterator[str]:
    with os.scandir(root / folder) as entries:
        for entry in entries:
            if _is_folder(entry):
                yield from _images(root, f"{folder}/{entry.name}")
            elif _is_no_dotfile(entry) and entry.name.lower().endswith(IMAGE_EXTENSIONS):
                yield f"{folder}/{entry.name}"


def _is_no_dotfile(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder of the user's, and none that a system or a program keeps there."""
    return _is_no_dotfile(entry) and entry.name.lower() not in NO_CLASSES and entry.is_dir()


def _class_difference(root: Path, train: set[str], test_name: str, test: set[str]) -> str:
    lines = [f"The classes in train and {test_name} of {root} differ."]
    for only, part in ((train - test, "train"), (test - train, test_name)):
        if only:
            lines.append(f"Only in {part}: {_abridged(sorted(only))}.")
    return "\n".join([*lines, "Give both the same class folders: rename or remove those."])


def _abridged(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@lru_cache(maxsize=8)
def common_size(listing: Listing) -> int:
    """Return the side in pixels that all images seem to have, by the headers of `SIZE_SAMPLE` training images.

    Raises:
        UserError: sizes differ or are not square, so that `dataset.image_size` has to be chosen.
    """
    sizes = {}
    with warnings.catch_warnings(action="ignore"):  # Pillow's remarks on odd files that it does read
        for path in listing.train[:: max(1, len(listing.train) // SIZE_SAMPLE)]:
            with open_image(listing.root / path) as image:
                sizes[path] = shown_size(image)
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
