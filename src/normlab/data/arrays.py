"""A user's own arrays of NumPy: a .npz file, or a folder of .npz and .npy files. Without torch; nothing is executed."""

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from normlab.common.errors import UserError, exact, listed
from normlab.data.folders import NAMED, PARTS, shown

KINDS = {  # words in the names of arrays, beside those of `PARTS`
    "images": ("images", "image", "x"),
    "labels": ("labels", "label", "y", "targets"),
    "classes": ("classes", "names"),
}
_KNOWN = {word for meant in (KINDS, PARTS) for words in meant.values() for word in words}
EXPECTED = (
    "Expected arrays train_images, train_labels, test_images, test_labels (val_... too), or images and labels with"
    " dataset.test_fraction=0.2: in one .npz, or in a folder of .npy, or of train.npz and test.npz."
)


@dataclass(frozen=True)
class Place:
    """Where an array is: a .npy file, or a member of a .npz file."""

    file: Path
    member: str | None

    def __str__(self) -> str:
        inside = f"{self.member.removesuffix('.npy')} in " if self.member else ""
        return f"{shown(inside)}{shown(str(self.file))}"


@dataclass(frozen=True, eq=False)
class Arrays:
    """The arrays of a data set, checked by their headers; labels are read.

    Attributes:
        root: the folder of the files; `paths` are their names in it.
        classes: their names, or the labels as text.
        image_size: side in pixels.
        images: where the images of each part are, by "train", "val" and "test"; of a set without a split "train" alone.
        labels: of each part, int64 (N,), 0 to the number of classes - 1, each of them in every part.
    """

    root: Path
    paths: tuple[str, ...]
    classes: tuple[str, ...]
    image_size: int
    images: Mapping[str, Place]
    labels: Mapping[str, NDArray[np.int64]]


@lru_cache(maxsize=8)  # a sweep checks every run
def scan(path: Path) -> Arrays:
    """Return the arrays of a file or folder; of images only the headers are read.

    Raises:
        UserError: there are none, some are missing, twice there, damaged, or of another type or shape than expected.
    """
    places = _places(path)
    parts = [part for part in PARTS if (part, "images") in places or (part, "labels") in places]
    if "train" not in parts:
        raise UserError(f"{path} has no images and labels to train on.\n{EXPECTED}")
    for part in parts:
        for kind in ("images", "labels"):
            if (part, kind) not in places:
                other = places[part, "images" if kind == "labels" else "labels"]
                raise UserError(f"{other} is there, and no {kind} beside it.\n{EXPECTED}")
    shapes = {part: _image_shape(places[part, "images"]) for part in parts}
    if len({shape[1:] for shape in shapes.values()}) > 1:
        told = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
        raise UserError(f"The images of {path} have other sizes or channels in other parts: {told}.\nMake them alike.")
    labels = {part: _labels(places[part, "labels"], shapes[part][0]) for part in parts}
    number = _number_of_classes(places, labels)
    if "test" not in parts and "val" in parts:  # as of folders
        shapes["test"], labels["test"] = shapes.pop("val"), labels.pop("val")
        places["test", "images"] = places["val", "images"]
    used = [place for key, place in places.items() if key[1] != "classes" or key[0] == "train"]
    root = path if path.is_dir() else path.parent
    return Arrays(
        root=root,
        paths=tuple(sorted({place.file.name for place in used})),
        classes=_class_names(places.get(("train", "classes")), number),
        image_size=shapes["train"][1],
        images={part: places[part, "images"] for part in labels},
        labels=labels,
    )


def check_split(found: Arrays, path: Path, fraction: float | None) -> int:
    """Return the number of test images: those of a part of their own, or `fraction` of all.

    Raises:
        UserError: there are none, or twice; a class is too small to be split.
    """
    if "test" in found.labels:
        if fraction is not None:
            raise UserError(
                f"{path} has test images, and dataset.test_fraction={exact(fraction)} would split off others.\n"
                "Leave it out: dataset.test_fraction=null."
            )
        return len(found.labels["test"])
    if fraction is None:
        raise UserError(
            f"{path} has no test images.\n"
            "To test on a part of each class that is not trained on: dataset.test_fraction=0.2."
        )
    counts = np.bincount(found.labels["train"])
    size = round(len(found.labels["train"]) * fraction)
    shares = counts * size // counts.sum()
    for label in np.flatnonzero((shares < 1) | (counts - shares < 2)):  # one more may be added by rounding
        raise UserError(
            f"Class {shown(found.classes[label])} of {path} has {counts[label]} images, too few to test on"
            f" {exact(fraction)} of them.\nUse another dataset.test_fraction, or give test images of their own."
        )
    return size


def read(place: Place) -> NDArray[np.generic]:
    """Return an array.

    Raises:
        UserError: it cannot be read.
    """
    with _opened(place) as file:
        array: NDArray[np.generic] = np.lib.format.read_array(file, allow_pickle=False)
        return array


@contextmanager
def _opened(place: Place) -> Iterator[IO[bytes]]:
    try:
        if place.member is None:
            with place.file.open("rb") as file:
                yield file
        else:
            with zipfile.ZipFile(place.file) as archive, archive.open(place.member) as file:
                yield file
    except Exception as error:  # of a file that is cut, encrypted, no array at all: whatever zipfile and NumPy meet
        raise UserError(
            f"{place} cannot be read as an array: {str(error).splitlines()[0] if str(error) else type(error).__name__}."
            "\nWrite it again with np.savez or np.save, as numbers: Python's objects are not read."
        ) from None


def _places(path: Path) -> dict[tuple[str, str], Place]:
    """Return where each array is, by its part ("train" if it names none) and kind; others are passed over.

    Of several that say the same, it is the one with the fewest other words in its name: images, not image_ids.
    """
    if not path.exists():
        raise UserError(f"dataset.path={path} is not there.\n{EXPECTED}")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".npz", ".npy") and file.is_file())
    else:
        files = [path] if path.suffix in (".npz", ".npy") and path.is_file() else []
    found: dict[tuple[str, str], tuple[int, Place]] = {}
    for place in (place for file in files for place in _in_file(file)):
        name = place.file.stem if place.member is None else place.member.removesuffix(".npy")
        kind, others = _word(name, KINDS), len(_words(name) - _KNOWN)
        part = _word(name, PARTS) or (_word(place.file.stem, PARTS) if path.is_dir() else None) or "train"
        if kind is None:
            continue
        least, known = found.get((part, kind), (others + 1, place))
        if others == least:
            raise UserError(f"{known} and {place} are both {part} {kind}.\nKeep one, rename the other.")
        if others < least:
            found[part, kind] = others, place
    return {key: place for key, (_, place) in found.items()}


def _words(name: str) -> set[str]:
    return set(re.split("[^a-z]+", name.lower())) - {""}


def _word(name: str, meant: Mapping[str, Sequence[str]]) -> str | None:
    """Return what a name says it is, by any of its words."""
    return next((each for each, names in reversed([*meant.items()]) if _words(name).intersection(names)), None)


def _in_file(file: Path) -> list[Place]:
    if file.suffix == ".npy":
        return [Place(file, None)]
    try:
        with zipfile.ZipFile(file) as archive:
            return [Place(file, name) for name in archive.namelist() if name.endswith(".npy")]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read: {error}.\nWrite it again with np.savez.") from None


def _image_shape(place: Place) -> tuple[int, ...]:
    """Return the shape of images, (N, S, S) or (N, S, S, C), by the header."""
    with _opened(place) as file:
        version = np.lib.format.read_magic(file)
        of_version = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, _, dtype = of_version[version[0]](file)
    if dtype != np.uint8:
        written = {
            "f": "np.round(255 * x).astype(np.uint8), if 1 is white",
            "O": "all images at one size, with np.stack",
        }
        raise UserError(
            f"{place} is {dtype}; images are expected as uint8, 0 is black and 255 white.\n"
            f"Write {written.get(dtype.kind, 'x.astype(np.uint8), if no value is above 255')}."
        )
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        hint = "Gray images may leave the last out."
        if len(shape) == 4 and shape[1] in (1, 3):
            hint = "Channels go last: np.moveaxis(x, 1, -1)."
        elif len(shape) == 4 and shape[3] == 4:
            hint = "Leave the transparency out: x[..., :3]."
        raise UserError(f"{place} has the shape {shape}; images are expected as (N, H, W, 3) or (N, H, W, 1).\n{hint}")
    if not all(shape):
        raise UserError(f"{place} is empty: it has the shape {shape}.\n{EXPECTED}")
    if shape[1] != shape[2]:
        raise UserError(f"{place} has images of {shape[1]}x{shape[2]} pixels.\nCrop or pad them to squares.")
    return tuple(shape)


def _labels(place: Place, images: int) -> NDArray[np.int64]:
    labels = read(place)
    if labels.dtype.kind not in "iu":
        raise UserError(
            f"{place} is {labels.dtype}; labels are expected as whole numbers, 0 to the number of classes - 1.\n"
            "Write np.unique(labels, return_inverse=True)[1]."
        )
    if not labels.ndim or labels.shape[1:] not in ((), (1,)):
        raise UserError(f"{place} has the shape {labels.shape}; expected is one label an image, (N,) or (N, 1).")
    if len(labels) != images:
        raise UserError(f"{place} has {len(labels):,} labels for {images:,} images.\nGive every image one label.")
    return labels.reshape(-1).astype(np.int64)


def _number_of_classes(places: Mapping[tuple[str, str], Place], labels: Mapping[str, NDArray[np.int64]]) -> int:
    """Return the number of classes, which all parts have."""
    known = {part: np.unique(values) for part, values in labels.items()}
    train = known["train"]
    if train[0] != 0 or train[-1] != len(train) - 1 or len(train) < 2:
        raise UserError(
            f"{places['train', 'labels']} has the labels {listed(train.tolist(), NAMED)}; expected are 0 to the number"
            " of classes - 1, each of them, and two or more.\n"
            + (
                "Write np.unique(labels, return_inverse=True)[1]."
                if len(train) > 1
                else "Give images of another class."
            )
        )
    for part, others in known.items():
        odd = np.setxor1d(train, others)
        if len(odd):
            place = places[part, "labels"]
            raise UserError(
                f"The classes of {places['train', 'labels']} and {place} differ: only one of them has"
                f" {listed(odd.tolist(), NAMED)}.\nGive every part images of every class."
            )
    return len(train)


def _class_names(place: Place | None, number: int) -> tuple[str, ...]:
    if place is None:
        return tuple(map(str, range(number)))
    names = read(place)
    if names.dtype.kind != "U" or names.shape != (number,) or len({*names.tolist(), ""}) <= number:
        raise UserError(
            f"{place} is {names.dtype} of the shape {names.shape}; expected are the names of the {number} classes, each"
            " another text.\nWrite np.array(['cat', 'dog']), or leave it out."
        )
    return tuple(names.tolist())
