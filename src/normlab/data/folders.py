"""Image folders as people have them: their parts, classes and files, listed without torch; no file is opened."""

import errno
import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path

from normlab.common.errors import UserError, exact, listed, nearest

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
NOT_READ = (".heic", ".heif", ".avif", ".jfif", ".jpe", ".jp2", ".tga", ".dng", ".cr2", ".nef", ".svg", ".npy", ".dcm")
TABLE_EXTENSIONS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".xml", ".xls", ".xlsx", ".parquet", ".mat")
NO_CLASSES = {  # by systems and programs, in lower case; names that begin with a dot are left out, too
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
    *("__macosx", "$recycle.bin", "system volume information", "lost+found", "__pycache__"),
}
PARTS = {  # what a folder of a part may be called, in any case
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
MOST_LEFT_OUT = 0.1  # of the files of a folder; more that cannot be read are a mistake
NAMED = 5  # names in a sentence

Classes = Mapping[str, tuple[str, ...]]  # the paths of the images of each class; both sorted


@dataclass(frozen=True, eq=False)
class Layout:
    """The image files of a folder in its own parts.

    Attributes:
        root: the folder, which paths are relative to, with `/` between names.
        names: of the folder of each part, by "train", "val" and "test"; of classes without a split, "" for "train".
        parts: their classes, equal in all.
        no_files: of the paths, pipes, devices and links to nowhere, which are never opened.
        not_read: the numbers of files in the formats of `NOT_READ`, by their extension.
    """

    root: Path
    names: Mapping[str, str]
    parts: Mapping[str, Classes]
    no_files: frozenset[str]
    not_read: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """The images of a folder as a run uses them, by class and then by name; `/`-separated paths relative to `root`.

    Attributes:
        val: of a validation part of its own; nothing without.
        left_out: paths of files that cannot be read.
        not_read: as of `Layout`, in pairs.
    """

    root: Path
    classes: tuple[str, ...]
    train: tuple[str, ...]
    train_labels: tuple[int, ...]
    test: tuple[str, ...]
    test_labels: tuple[int, ...]
    val: tuple[str, ...] = ()
    val_labels: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()
    not_read: tuple[tuple[str, int], ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All images; those of a validation part come last, so that folders without one are as they always were."""
        return (*self.train, *self.test, *self.val)


def images_of(
    layout: Layout, test_fraction: float | None, split_seed: int, left_out: Collection[str] = frozenset()
) -> Listing:
    """Return the images of a folder, those left out taken away first, with the test images of `test_fraction`.

    Raises:
        UserError: there is nothing to test on, or test images are to be split off where there are some; too many are
            left out, or all images of a class; a class is too small to be split.
    """
    if test_fraction is None and "test" not in layout.parts:
        raise UserError(_no_test(layout))
    if test_fraction is not None and "test" in layout.parts:
        folders = " and ".join(f"{name}/" for name in layout.names.values())
        raise UserError(
            f"The folder {layout.root} has a split already, {folders}, and dataset.test_fraction={exact(test_fraction)}"
            " would make another.\nLeave it out: dataset.test_fraction=null. Or split the training images alone:"
            f"\ndataset.path={layout.root / layout.names['train']}."
        )
    parts = {part: _without(layout, part, left_out) for part in layout.parts}
    number = sum(len(paths) for classes in layout.parts.values() for paths in classes.values())
    if len(left_out) > MOST_LEFT_OUT * number:
        raise UserError(
            f"{len(left_out):,} of the {number:,} images of {layout.root} cannot be read, e.g."
            f" {shown(min(left_out))}.\ndataset.skip_unreadable leaves out a tenth at most, since so many are a"
            " mistake: an interrupted copy, say.\nCopy the folder anew, or remove these files."
        )
    if test_fraction is not None:
        parts = _split(layout, parts["train"], test_fraction, split_seed)
    train, test, val = (_paths_and_labels(parts.get(part, {})) for part in ("train", "test", "val"))
    not_read = tuple(sorted(layout.not_read.items()))
    return Listing(layout.root, tuple(parts["train"]), *train, *test, *val, tuple(sorted(left_out)), not_read)


def _no_test(layout: Layout) -> str:
    root, name, classes = layout.root, layout.names["train"], layout.parts["train"]
    lack = "has no folder test or val; it has train" if name else "has classes and no split"
    return (
        f"The folder {root} {lack}: {listed([shown(each) for each in classes], NAMED)}.\n"
        "To test on a part of each class that is not trained on: dataset.test_fraction=0.2.\n"
        f"Or give it test images of its own: {_expected(root)}"
    )


def _without(layout: Layout, part: str, left_out: Collection[str]) -> Classes:
    if not left_out:
        return layout.parts[part]
    left = {name: tuple(p for p in paths if p not in left_out) for name, paths in layout.parts[part].items()}
    lost = [shown(name) for name, paths in left.items() if not paths]
    if lost:
        raise UserError(
            f"No image of {listed(lost, NAMED)} in {layout.root / layout.names[part]} can be read.\n"
            "dataset.skip_unreadable leaves images out, and no classes: replace the files, or remove the class"
            " everywhere."
        )
    return left


def _split(layout: Layout, classes: Classes, fraction: float, seed: int) -> dict[str, Classes]:
    """Take the test images from each class: those whose names' digests are the smallest.

    So the choice depends on nothing but the seed and the names from the class's folder on, not on their order, nor on
    what else there is; a larger fraction extends a smaller one.
    """
    single = [shown(name) for name, paths in classes.items() if len(paths) == 1]
    if single:
        raise UserError(
            f"dataset.test_fraction={exact(fraction)} needs two images of each class, and there is one of"
            f" {listed(single, NAMED)} in {layout.root / layout.names['train']}.\n"
            "Add images, or remove the folder of the class."
        )
    above = len(layout.names["train"]) + 1 if layout.names["train"] else 0

    def place(path: str) -> bytes:
        return hashlib.sha256(f"{seed} test {path[above:]}".encode("utf-8", "surrogateescape")).digest()

    train, test = {}, {}
    for name, paths in classes.items():
        count = min(max(round(fraction * len(paths)), 1), len(paths) - 1)
        chosen = set(sorted(paths, key=place)[:count])
        train[name] = tuple(path for path in paths if path not in chosen)
        test[name] = tuple(path for path in paths if path in chosen)
    return {"train": train, "test": test}


def _paths_and_labels(classes: Classes) -> tuple[tuple[str, ...], tuple[int, ...]]:
    labels = (label for label, paths in enumerate(classes.values()) for _ in paths)
    return tuple(chain.from_iterable(classes.values())), tuple(labels)


# --- The layout -------------------------------------------------------------------------------------


@lru_cache(maxsize=8)  # a sweep checks every run
def scan(root: Path, *, imagenet: bool = False) -> Layout:
    """List the files of a folder: `root/<part>/<class>/*`, or `root/<class>/*` without a split.

    Parts are called as in `PARTS`. Beside train/ and test/, val/ is the validation part; without test/ it is the test
    part, as in ImageNet, whose own folders alone count with `imagenet`. Classes are the folders' names in sorted order.
    Folders inside a class are entered, through links, too, but each once. Hidden files and folders, those of
    `NO_CLASSES` and files without an extension of `IMAGE_EXTENSIONS` are left out.

    Raises:
        UserError: the layout is not that, the classes of the parts differ, or there is a single one.
    """
    _require_folder(root)
    try:
        names = _part_names(root, imagenet=imagenet)
        if "test" not in names and "val" in names:
            names["test"] = names.pop("val")
        odd = _Odd()
        parts = {part: _classes(root, name, names, odd) for part, name in names.items()}
        _require_equal_classes(root, names, parts)
    except OSError as error:
        raise UserError(f"The folder {root} cannot be read: {error.strerror} ({error.filename}).") from None
    if len(parts["train"]) == 1:
        raise UserError(
            f"The folder {root} has a single class, {shown(next(iter(parts['train'])))}: every network would be right"
            f" about all images.\nExpected {_expected(root)}\nGive it two classes or more."
        )
    return Layout(root, names, parts, frozenset(odd.no_files), odd.not_read)


@dataclass(eq=False)
class _Odd:
    """Files of classes that are none, or are not read."""

    no_files: set[str] = field(default_factory=set)
    not_read: Counter[str] = field(default_factory=Counter)


def _expected(root: Path) -> str:
    return f"{root}/train/<class>/* and {root}/test/<class>/* (or val/)."


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


def _part_names(root: Path, *, imagenet: bool) -> dict[str, str]:
    """Return the names of the folders of the parts; {"train": ""} of classes without a split."""
    folders = _folders(root)
    if not folders:
        raise UserError(_no_classes(root, "", f"The folder {root} has no folders in it", {}))
    if imagenet:
        found = {part: [name for name in folders if name == part] for part in ("train", "val")}
    else:
        found = {part: [name for name in folders if name.lower() in names] for part, names in PARTS.items()}
    several = next((names for names in found.values() if len(names) > 1), None)
    if several:
        raise UserError(
            f"The folder {root} has {' and '.join(map(shown, several))}, and which of them counts is not known.\n"
            "Keep one of them: rename or move the others."
        )
    parts = {part: names[0] for part, names in found.items() if names}
    if not imagenet and _are_classes(root, folders, parts):
        return {"train": ""}
    missing = "train" if "train" not in parts else "val"
    if missing == "train" or (imagenet and missing not in parts):
        has = listed([shown(name) for name in folders], NAMED)
        raise UserError(f"The folder {root} has no folder {missing}; it has {has}.\nExpected {_expected(root)}")
    return parts


def _are_classes(root: Path, folders: Sequence[str], parts: Mapping[str, str]) -> bool:
    """Return whether the folders in `root` are classes without a split, although some may be called as a part is.

    Raises:
        UserError: they are none, but a split by other names, or the data set lies deeper.
    """
    others = [name for name in folders if name not in parts.values()]
    if not all(_is_flat(root / name) for name in parts.values()):
        return False
    classes = [shown(name) for name in others if _has_images(root, name)]
    if not classes:
        return False
    if held_out := next((name for part, name in parts.items() if part != "train"), None):
        raise UserError(
            f"{root / held_out} has images without classes, beside the classes {listed(classes, NAMED)}.\n"
            "Move it away, and test on a part of each class: dataset.test_fraction=0.2.\n"
            f"Rename it if it is a class. Or give it classes: {_expected(root)}"
        )
    if not parts:
        _refuse_other_splits(root, others)
    return True  # with parts: a class of trains, beside other vehicles


def _refuse_other_splits(root: Path, folders: Sequence[str]) -> None:
    words = {name: set(re.split("[^a-z]+", name.lower())) for name in folders}
    train = next((name for name in folders if words[name].intersection(PARTS["train"])), None)
    held_out = next((name for name in folders if words[name].intersection(PARTS["val"] + PARTS["test"])), None)
    if train and held_out:
        raise UserError(
            f"The folders {shown(train)} and {shown(held_out)} of {root} look like a split, not like classes.\n"
            f"Rename them train and test, each with a folder for each class in it.\nExpected {_expected(root)}"
        )
    deeper = [name for name in folders if any(each.lower() in PARTS["train"] for each in _folders(root / name))]
    if len(deeper) > 1:
        raise UserError(
            f"The classes of {root} have parts in them, e.g. {shown(deeper[0])}/train; parts have classes in them.\n"
            f"Expected {_expected(root)}"
        )
    if inner := _nested(root / (deeper or folders)[0]) if deeper or len(folders) == 1 else None:
        raise UserError(f"The data set of {root} lies deeper in it.\nUse dataset.path={inner}.")


def _nested(folder: Path, depth: int = 3) -> Path | None:
    """Return the folder, or the one deeper in it, that has the parts or several classes."""
    folders = _folders(folder)
    if any(name.lower() in PARTS["train"] for name in folders) or len(folders) > 1:
        return folder
    return _nested(folder / folders[0], depth - 1) if folders and depth else None


def _folders(folder: Path, *, needed: bool = False) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_folder(entry, needed=needed))


def _is_flat(folder: Path) -> bool:
    """Return whether images lie in a folder directly, and no folders do."""
    with os.scandir(folder) as entries:
        kinds = {"folder" if _is_folder(entry) else "image" if _is_image(entry) else "other" for entry in entries}
    return "image" in kinds and "folder" not in kinds


def _has_images(root: Path, folder: str) -> bool:
    return next(_images(root, folder, set(), _Odd()), None) is not None


def _classes(root: Path, part: str, parts: Mapping[str, str], odd: _Odd) -> Classes:
    """List the image paths of each class below `root/part`, both sorted; add to `odd` what is found of these."""
    above = {_place(folder) for folder in (root / part, root, *root.resolve().parents)}
    names = [name for name in _folders(root / part, needed=True) if _place(root / part / name) not in above]
    if not names:
        raise UserError(_no_classes(root, part, f"The folder {root / part} has no class folders in it", parts))
    prefix = f"{part}/" if part else ""
    classes = {name: tuple(sorted(_images(root, f"{prefix}{name}", set(above), odd))) for name in names}
    empty = [shown(name) for name, paths in classes.items() if not paths]
    if empty:
        raise UserError(
            f"{'Classes' if len(empty) > 1 else 'A class'} without images in {root / part}: {listed(empty, NAMED)}.\n"
            f"Files count as images by their extension: {' '.join(IMAGE_EXTENSIONS)}.\n"
            f"Add images, or remove the folder{' from all parts' if part else ''}."
        )
    return classes


def _no_classes(root: Path, part: str, problem: str, parts: Mapping[str, str]) -> str:
    """Return what to do about a part whose images are not in folders of their classes."""
    with os.scandir(root / part) as entries:
        images = any(_is_image(entry) for entry in entries)
    tables = _tables(root / part) or _tables(root)
    lines = [f"{problem}{', but images' if images else ''}."]
    if images and tables:
        lines[0] += f" Labels in a table ({shown(tables[0])}) are not read."
    if images:
        lines.append("Move the images into a folder for each class.")
    if part and part != parts["train"]:
        train = f"dataset.path={root / parts['train']} dataset.test_fraction=0.2"
        lines.append(f"Without them: {train if len(parts) == 2 else f'move {root / part} away'}.")
    lines.append(f"Expected {_expected(root)}")
    return "\n".join(lines)


def _tables(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = (entry.name for entry in entries if entry.name.lower().endswith(TABLE_EXTENSIONS))
        return sorted(name for name in names if not name.lower().startswith(("readme", "license", ".")))


def _require_equal_classes(root: Path, names: Mapping[str, str], parts: Mapping[str, Classes]) -> None:
    """Check that all parts have the same classes.

    Raises:
        UserError: naming those that a part has not.
    """
    train = parts["train"].keys()
    others = {part: classes.keys() for part, classes in parts.items() if part != "train"}
    if all(classes == train for classes in others.values()):
        return
    for part, classes in others.items():
        tables = _tables(root / names[part])
        if not classes & train and tables:
            raise UserError(
                f"The labels of {root / names[part]} are in {shown(tables[0])}, which is not read.\n"
                f"Move its images into a folder for each class, as in {root / names['train']}.\n"
                f"Or test on a part of the training images: dataset.path={root / names['train']}"
                " dataset.test_fraction=0.2."
            )
    both = len(parts) == 2
    lines = [f"The classes in {' and '.join(names[part] for part in parts)} of {root} differ."]
    everywhere = train | frozenset().union(*others.values())
    for part in parts:
        rest = everywhere - frozenset().union(*(parts[each].keys() for each in parts if each != part))
        odd = sorted(map(shown, rest if both else everywhere - parts[part].keys()))
        if odd:
            lines.append(f"{'Only' if both else 'Not'} in {names[part]}: {listed(odd, NAMED)}.")
    raise UserError("\n".join([*lines, "Give all the same class folders: rename or remove those."]))


# --- Files ------------------------------------------------------------------------------------------


def _images(root: Path, folder: str, seen: set[tuple[int, int]], odd: _Odd) -> Iterator[str]:
    """Yield the paths of a folder's images. Folders of `seen`, to which links lead back, are not entered again."""
    left = [folder]
    while left:
        folder = left.pop()
        if (place := _place(root / folder)) in seen:
            continue
        seen.add(place)
        deeper = []
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path, name = f"{folder}/{entry.name}", entry.name.lower()
                if _is_folder(entry, needed=True):
                    deeper.append(path)
                elif _is_image(entry):
                    if not _is_file(entry):
                        odd.no_files.add(path)
                    yield path
                elif name.endswith(NOT_READ) and not name.startswith("."):
                    odd.not_read[name[name.rindex(".") :]] += 1
        left += sorted(deeper, reverse=True)  # so that it depends on no order of a disk which of two links is entered


def _place(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_image(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and entry.name.lower().endswith(IMAGE_EXTENSIONS)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # of a link
        return False


def _is_folder(entry: os.DirEntry[str], *, needed: bool = False) -> bool:
    """Return whether an entry is a folder of the user's, and none that a system or a program keeps there.

    Raises:
        OSError: nobody can tell; with `needed`, of a link that leads nowhere now and is called as a folder is.
    """
    if entry.name.startswith(".") or entry.name.lower() in NO_CLASSES:
        return False
    try:
        found = entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP or _is_image(entry):  # a link to itself; an image that cannot be read
            return False
        raise
    if needed and not found and entry.is_symlink() and not _is_file(entry) and not Path(entry.name).suffix:
        raise FileNotFoundError(errno.ENOENT, "the link leads nowhere", entry.path)
    return found


def shown(name: str) -> str:
    """Return a name from a disk as it can be printed and written, whatever its bytes are."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)
