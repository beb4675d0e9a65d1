"""Decoding: from an image file of any mode to the RGB pixels that a network gets."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tf

from normlab.data.inventory import open_image, require_one_size


def read(path: Path) -> Image.Image:
    """Decode a file to mode RGB. Its EXIF orientation is ignored, as torchvision does.

    Raises:
        UserError: naming the file, if it cannot be decoded whole.
    """
    with open_image(path) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB. Transparency is laid on white; of several frames the first counts.

    16-bit gray is divided by 257, so that 65535 becomes 255. Mode I is taken as 16 bit, too: it is how
    Pillow holds 16-bit files of several formats. Mode F is a fraction if no value is above 1, else 0 to 255.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        fractions = np.nan_to_num(np.asarray(image, dtype=np.float64))
        scaled = fractions * 255 if np.all(fractions <= 1) else fractions
        return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8)).convert("RGB")
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

    def __call__(self, path: str, crop_seed: int | None = None) -> NDArray[np.uint8]:
        """Decode `root/path`, under the random resized crop of `crop_seed` if there is one.

        Raises:
            UserError: naming the file, if it cannot be decoded or breaks `one_size`.
        """
        image = read(self.root / path)
        if self.one_size and image.size != (self.size, self.size):
            require_one_size({"the first training image": (self.size, self.size), path: image.size})
        if self.crop_scale and crop_seed is not None:
            image = random_crop(image, self.size, self.crop_scale, crop_seed)
        else:
            image = fit(image, self.size, self.short_side)
        return np.array(np.asarray(image).transpose(2, 0, 1), order="C")
