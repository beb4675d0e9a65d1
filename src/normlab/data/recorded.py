"""The images of a folder as a run records them, and whether they are still the same."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from normlab.config.schema import ArrayDataset, FolderDataset, RunConfig
from normlab.data import arrays
from normlab.data.contents import known_contents_digest, listing_digest
from normlab.data.folders import Listing, shown
from normlab.data.inventory import list_images, usable_images

RECORDED = 20  # names of files that are left out


class ImageFiles:
    """The image files of a folder: listed when that is first needed, and read only if they have to be.

    Those that cannot be read and are left out belong to them. So whether they are the same is known without decoding.

    Args:
        dataset: the settings of the folder.
        data_dir: keeps the digest of what was read, so that not every run reads it.
    """

    def __init__(self, dataset: FolderDataset | ArrayDataset, data_dir: Path) -> None:
        self._dataset, self._data_dir = dataset, data_dir
        self._lenient = isinstance(dataset, FolderDataset) and dataset.skip_unreadable
        self._images = self._list()
        self.path = self._images.root.resolve()

    def _list(self) -> Listing:
        assert isinstance(self._dataset, FolderDataset)
        return list_images(self._dataset)

    @cached_property
    def listing(self) -> str:
        """SHA-256 of names, sizes and times."""
        return self._listing(self._images.paths)

    @cached_property
    def contents(self) -> str:
        """SHA-256 of names and bytes."""
        return self._contents(self._images.paths)

    def _listing(self, paths: tuple[str, ...]) -> str:
        return listing_digest(self._images.root, paths, lenient=self._lenient)

    def _contents(self, paths: tuple[str, ...]) -> str:
        return known_contents_digest(self.path, paths, self._data_dir, lenient=self._lenient)

    def _counts(self) -> dict[str, int]:
        return {
            "classes": len(self._images.classes),
            "images": len(self._images.paths),
            "validation_images": len(self._images.val),
        }

    def describe(self) -> dict[str, Any]:
        """Return what a run records: path as set, numbers of classes and files, digests, and the files left out."""
        described = {"path": self._dataset.path, **self._counts(), "listing": self.listing, "contents": self.contents}
        if not isinstance(self._dataset, FolderDataset) or not self._lenient:
            return described
        left_out = usable_images(self._dataset, self._data_dir, log=lambda sentence: None).left_out
        names = [shown(path) for path in left_out]
        digest = hashlib.sha256("\0".join(names).encode()).hexdigest()
        return {**described, "left_out": {"images": len(names), "first": names[:RECORDED], "names": digest}}

    def change(self, recorded: object) -> str:
        """Return how the files differ from what was recorded, e.g. `2 classes then, 3 now`; "" if they do not.

        Before format 3 a validation part was not looked at, and is no part of what was recorded.
        """
        if not isinstance(recorded, Mapping):
            return ""
        paths = (*self._images.train, *self._images.test)
        known = self._images.paths if "validation_images" in recorded else paths
        if self._listing(known) == recorded.get("listing") or self._contents(known) == recorded.get("contents"):
            return ""
        now = self._counts() | ({} if "validation_images" in recorded else {"images": len(known)})
        counts = (count for count in ("classes", "images") if now[count] != recorded.get(count))
        return next(
            (f"{recorded.get(each)} {each} then, {now[each]} now" for each in counts), "other files or contents"
        )


class ArrayFiles(ImageFiles):
    """The files of arrays; their images are counted, not the files."""

    def __init__(self, dataset: ArrayDataset, data_dir: Path) -> None:
        self._arrays = arrays.scan(Path(dataset.path).expanduser())
        super().__init__(dataset, data_dir)

    def _list(self) -> Listing:
        return Listing(self._arrays.root, self._arrays.classes, self._arrays.paths, (), (), ())

    def _counts(self) -> dict[str, int]:
        numbers = {part: len(labels) for part, labels in self._arrays.labels.items()}
        images, val = sum(numbers.values()), numbers.get("val", 0)
        return {"classes": len(self._arrays.classes), "images": images, "validation_images": val}


def image_files(config: RunConfig) -> ImageFiles | None:
    """Return the files of a run's images; None for data whose content its name says.

    Raises:
        UserError: if the folder is not there, or is no data set.
    """
    data_dir = Path(config.data_dir).expanduser()
    if isinstance(config.dataset, ArrayDataset):
        return ArrayFiles(config.dataset, data_dir)
    if not isinstance(config.dataset, FolderDataset) or config.dataset.kind != "image_folder":
        return None
    return ImageFiles(config.dataset, data_dir)
