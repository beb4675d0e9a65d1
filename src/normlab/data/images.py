"""Decoding: from an image file of any mode to the RGB pixels that a network gets."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tf

from normlab.common.errors import UserError
from normlab.data.damage import open_image
from normlab.data.inventory import orientation, require_one_size
from normlab.data.values import ValueRange, is_deep, scaled


def read(path: Path, value_range: ValueRange | None = None) -> Image.Image:
    """Decode a file to mode RGB, turned by its EXIF orientation.

    Args:
        path: the file.
        value_range: the values that become black and white in images of more than 8 bits.

    Raises:
        UserError: naming the file, if it cannot be decoded whole, or has more than 8 bits and no range is given.
    """
    with open_image(path) as image:
        image.load()
        deep = value_range is None and is_deep(image)
        if not deep:
            turned = ImageOps.exif_transpose(image) if orientation(image) != 1 else image
            return to_rgb(turned, value_range)
    raise UserError(
        f"The image {path} has more than 8 bits, and which of its values are black and white is not known.\n"
        "Set them, e.g. dataset.value_range=[0,65535]."
    )


def to_rgb(image: Image.Image, value_range: ValueRange | None = None) -> Image.Image:
    """Convert any mode to RGB. Transparency is laid on white; of several frames the first counts.

    Args:
        image: of any mode and of 8 bits or more.
        value_range: the values that become black and white in images of more than 8 bits; needed for these.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if value_range and is_deep(image):
        return Image.fromarray(scaled(np.asarray(image), value_range)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: int, short_side: int) -> Image.Image:
    """Resize the short side to `short_side` (bilinear, antialiased), then crop the central `size` square."""
    resized: Image.Image = tf.resize(image, short_side, InterpolationMode.BILINEAR)
    cropped: Image.Image = tf.center_crop(resized, size)
    return cropped


def random_crop(image: Image.Image, size: int, scale: tuple[float, float], seed: int) -> Image.Image:
    """Apply torchvision's RandomResizedCrop with the draws of `seed` alone; the global stream is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
    made: Image.Image = tf.resized_crop(image, top, left, height, width, [size, size], InterpolationMode.BILINEAR)
    return made


@dataclass(frozen=True)
class Decoder:
    """The decoding of the files below `root` to uint8 pixels (3, size, size), in memory and streamed alike."""

    root: Path
    size: int
    short_side: int  # of the resized image that the central square is cut from
    one_size: bool  # every file has to have `size` already, because nobody chose one
    crop_scale: tuple[float, float] | None
    value_range: ValueRange | None = None  # of images of more than 8 bits

    def __call__(self, path: str, crop_seed: int | None = None) -> NDArray[np.uint8]:
        """Decode `root/path`, under the random resized crop of `crop_seed` if there is one.

        Raises:
            UserError: naming the file, if it cannot be decoded or breaks `one_size`.
        """
        image = read(self.root / path, self.value_range)
        if self.one_size and image.size != (self.size, self.size):
            require_one_size({"the first training image": (self.size, self.size), path: image.size})
        if self.crop_scale and crop_seed is not None:
            image = random_crop(image, self.size, self.crop_scale, crop_seed)
        else:
            image = fit(image, self.size, self.short_side)
        return np.array(np.asarray(image).transpose(2, 0, 1), order="C")
