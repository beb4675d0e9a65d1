"""The images of a folder as a run records them, and whether they are still the same."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from normlab.config.schema import FolderDataset, RunConfig
from normlab.data.contents import known_contents_digest, listing_digest
from normlab.data.inventory import Listing, list_images


class ImageFiles:
    """The image files of a folder: listed when that is first needed, and read only if they have to be.

    Args:
        images: those of the folder.
        data_dir: keeps the digest of what was read, so that not every run reads it.
    """

    def __init__(self, images: Listing, data_dir: Path) -> None:
        self._images, self._data_dir = images, data_dir
        self._paths = (*images.train, *images.test)
        self.path = images.root.resolve()

    @cached_property
    def listing(self) -> str:
        """SHA-256 of names, sizes and times."""
        return listing_digest(self._images.root, self._paths)

    @cached_property
    def contents(self) -> str:
        """SHA-256 of names and bytes."""
        return known_contents_digest(self.path, self._paths, self._data_dir)

    def describe(self) -> dict[str, Any]:
        """Return what a run records: path, numbers of classes and images, and both digests."""
        return {
            "path": str(self.path),
            "classes": len(self._images.classes),
            "images": len(self._paths),
            "listing": self.listing,
            "contents": self.contents,
        }

    def change(self, recorded: object) -> str:
        """Return how the files differ from what was recorded, e.g. `2 classes then, 3 now`; "" if they do not."""
        if not isinstance(recorded, Mapping) or self.listing == recorded.get("listing"):
            return ""
        now = self.describe()
        if now["contents"] == recorded.get("contents"):
            return ""
        counts = (count for count in ("classes", "images") if now[count] != recorded.get(count))
        return next(
            (f"{recorded.get(each)} {each} then, {now[each]} now" for each in counts), "other files or contents"
        )


def image_files(config: RunConfig) -> ImageFiles | None:
    """Return the files of a run's images; None for data whose content its name says.

    Raises:
        UserError: if the folder is not there, or is no data set.
    """
    if not isinstance(config.dataset, FolderDataset) or config.dataset.kind != "image_folder":
        return None
    return ImageFiles(list_images(config.dataset), Path(config.data_dir).expanduser())
