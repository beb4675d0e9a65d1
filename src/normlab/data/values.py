"""The values of gray images of more than 8 bits (Pillow's modes I, I;16, F): one range for a data set. Without torch.

Images of 8 bits have the range 0 to 255; a few are looked at, to warn of those that use next to nothing of it.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings

import numpy as np
from numpy.typing import NDArray

from normlab.common.cpu import cores
from normlab.common.errors import UserError
from normlab.data.damage import open_image
from normlab.data.folders import Listing
from normlab.runs.files import make_folder, write_atomically

if TYPE_CHECKING:  # Pillow is imported where an image is opened
    from PIL import Image

FORMAT = 2  # of what is kept; raise it when the same files would be measured otherwise
BIT_DEPTHS = (8, 10, 12, 14, 16)  # of the sensors and formats whose whole range is taken for that of the values
LEAST_OF_16_BITS = 64  # of 255, reached by 16-bit colors, of which Pillow keeps the upper 8 bits
QUANTILES = 1001  # of the values of training images
MOST_PIXELS = 2**22  # of which these are quantiles, the same number of each image
MOST_OF_8_BITS = 64  # images of 8 bits that are decoded for it, evenly spread
FEW_LEVELS = 16  # of 256: so few for all but 1 % of the pixels are too few for values that are more
NARROW = 1 / 16  # part of the range: all but 0.1 % of the pixels in so little of it are alike

ValueRange = tuple[float, float]


@dataclass(frozen=True)
class Extremes:
    """The smallest and largest finite values of the pixels of images that have more than 8 bits; one entry an image.

    Attributes:
        train: low and high of each training image; of one without a finite value, nothing.
        test: the same of the test images.
        val: the same of the images of a validation part of its own.
        whole: all values are whole numbers.
        not_finite: images with a NaN or an infinity.
        deepest_color: the largest value, 0 to 255, that Pillow reads from color images of 16 bits; None without them.
        quantiles: of pixels of the training images, ascending; of those of 8 bits in `quantiles_of_8_bits`.
    """

    train: list[ValueRange]
    test: list[ValueRange]
    whole: bool
    not_finite: int
    deepest_color: int | None
    quantiles: list[float] = field(default_factory=list)
    quantiles_of_8_bits: list[float] = field(default_factory=list)
    val: list[ValueRange] = field(default_factory=list)


@dataclass(frozen=True)
class Values:
    """What the values of a data set's images of more than 8 bits mean.

    Attributes:
        value_range: the values that become black and white; None if there are no such images.
        warnings: sentences about values that are clipped, or of which next to nothing is left.
    """

    value_range: ValueRange | None = None
    warnings: tuple[str, ...] = ()


def is_deep(image: "Image.Image") -> bool:
    """Return whether an image has one channel of more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def find(
    listing: Listing,
    chosen: Sequence[float] | None,
    contents: str,
    data_dir: Path,
    log: Callable[[str], None],
) -> Values:
    """Return the values that become black and white: those chosen, or the range of all training images.

    Without a choice that is the range of a bit depth, if the values fill half of it, or 0 to 1 for fractions, or the
    smallest and the largest finite value. What it is, is logged.

    Args:
        listing: the images. They are read once: what was found is kept below `data_dir` by `contents`.
        chosen: dataset.value_range.
        contents: the `contents_digest` of the images.

    Raises:
        UserError: an image cannot be read, has 16-bit colors of which Pillow keeps next to nothing, or a range is
            chosen that no image needs.
    """
    found = _measured(listing, contents, data_dir, log)
    if found.deepest_color is not None and found.deepest_color < LEAST_OF_16_BITS:
        raise UserError(
            f"The 16-bit color images of {listing.root} have no value above {found.deepest_color * 257} of 65535.\n"
            f"Of such files the upper 8 bits are read, which would leave {found.deepest_color + 1} levels.\n"
            "Scale their values to 8 bits, or to all of the 16."
        )
    if not (found.train or found.test or found.val or found.not_finite):
        if chosen:
            raise UserError(
                f"dataset.value_range={list(chosen)} is for gray images of more than 8 bits, and {listing.root} has"
                " none.\nLeave it out: dataset.value_range=null."
            )
        return Values(None, tuple(_remarks_on_8_bits(found, listing.root)))
    low, high = chosen if chosen else standard_range(found.train or found.test or found.val, whole=found.whole)
    text = f"Images of more than 8 bits: {low:.10g} becomes black and {high:.10g} white"
    log(f"{text} (dataset.value_range{'' if chosen else ' sets other values'}).")
    warnings = [*_remarks_on_range(found, (low, high), listing.root), *_remarks_on_8_bits(found, listing.root)]
    for part, extremes in (("training", found.train), ("test", found.test), ("validation", found.val)):
        beyond = sum(a < low or b > high for a, b in extremes)
        if beyond:
            warnings.append(
                f"{beyond:,} {part} images of {listing.root} have values beyond [{low:.10g}, {high:.10g}], which are"
                " clipped. dataset.value_range sets others."
            )
    if found.not_finite:
        warnings.append(
            f"{found.not_finite:,} images of {listing.root} have values that are not finite: NaN and -inf become black,"
            " inf white."
        )
    return Values((low, high), tuple(warnings))


def _remarks_on_range(found: Extremes, value_range: ValueRange, root: Path) -> Iterator[str]:
    """Yield a sentence if next to nothing of the range is used, because of a hot pixel or a value for no data, say."""
    if not found.quantiles:
        return
    values, (low, high) = np.asarray(found.quantiles), value_range
    ends, black_and_white = _narrowest(values), f"{low:.10g} is black and {high:.10g} white"
    levels = _fewest(scaled(values, value_range))
    if ends[1] - ends[0] < NARROW * (high - low):
        yield (
            f"The training images of {root} use {(ends[1] - ends[0]) / (high - low):.1%} of the range of values, in"
            f" which {black_and_white}: 99.9 % of their pixels are within [{ends[0]:.10g}, {ends[1]:.10g}]."
            f" {_proposal(ends)} spreads these."
        )
    elif levels < min(FEW_LEVELS, _fewest(values)):
        yield (
            f"The training images of {root} lose most of their values: 99 % of their pixels become {levels} of the 256"
            f" levels, as {black_and_white}. If a few odd pixels or a value for no data made this range,"
            " dataset.value_range=[LOW,HIGH] sets that of the others."
        )


def _remarks_on_8_bits(found: Extremes, root: Path) -> Iterator[str]:
    if not found.quantiles_of_8_bits:
        return
    low, high = _narrowest(np.asarray(found.quantiles_of_8_bits))
    if high - low < NARROW * 255:
        yield (
            f"The training images of 8 bits of {root} use {(high - low) / 255:.1%} of the range of values, in which 0"
            f" is black and 255 white: 99.9 % of their pixels are within [{low:.10g}, {high:.10g}]. Scale them to"
            " 0 to 255 (dataset.value_range is for images of more than 8 bits)."
        )


def _proposal(ends: ValueRange) -> str:
    low, high = ends
    return f"dataset.value_range={f'[{low:.10g},{high:.10g}]' if high > low else '[LOW,HIGH]'}"


def _narrowest(quantiles: NDArray[Any]) -> ValueRange:
    """Return the narrowest interval that holds all but one of ascending quantiles, 99.9 % of the pixels."""
    without_last, without_first = quantiles[:-1], quantiles[1:]
    kept = min((without_last, without_first), key=np.ptp)
    return float(kept[0]), float(kept[-1])


def _fewest(values: NDArray[Any]) -> int:
    """Return the smallest number of different values that make up 99 % of all."""
    counts = np.sort(np.unique(values, return_counts=True)[1])[::-1]
    return int(np.searchsorted(np.cumsum(counts), 0.99 * len(values))) + 1


def standard_range(extremes: Sequence[ValueRange], *, whole: bool) -> ValueRange:
    """Return the range of a bit depth or 0 to 1, if values fill half of it, or else that of the values.

    Args:
        extremes: low and high of each image.
        whole: the values are whole numbers. 0 to 255 then holds them without loss, whether they fill it or not.
    """
    if not extremes:
        return 0.0, 1.0
    low, high = min(a for a, _ in extremes), max(b for _, b in extremes)
    tops = [float(2**depth - 1) for depth in BIT_DEPTHS] if whole else [1.0, 255.0]
    if low >= 0:
        for top in tops:
            if high <= top and (high - low >= top / 2 or (whole and top == 255)):
                return 0.0, top
    return (low, high) if high > low else (low, low + 1)


def scaled(values: NDArray[Any], value_range: ValueRange) -> NDArray[np.uint8]:
    """Return values of any dtype as 0 to 255; those beyond the range are clipped, and NaN becomes 0."""
    low, high = value_range
    fractions = np.nan_to_num((values.astype(np.float64) - low) / (high - low), nan=0.0).clip(0, 1)
    return (fractions * 255).round().astype(np.uint8)


def _measured(listing: Listing, contents: str, data_dir: Path, log: Callable[[str], None]) -> Extremes:
    """Return the extremes of all images, from below `data_dir` if they were measured already."""
    kept = data_dir / "cache" / f"values-{contents}.json"
    try:
        known = json.loads(kept.read_text(encoding="utf-8"))
        if known.pop("format") == FORMAT:
            return Extremes(**known)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # none, or a damaged one
    found = _measure(listing)
    text = json.dumps({"format": FORMAT, **asdict(found)})
    try:
        make_folder(kept.parent)
        write_atomically(kept, lambda file: file.write(text.encode()))
    except UserError:  # a folder that cannot be written: the images are read again
        log(f"The range of the images' values cannot be kept in {kept.parent}.")
    return found


@dataclass(frozen=True)
class _Measured:
    extremes: ValueRange | None = None
    whole: bool = True
    finite: bool = True
    color: int | None = None
    pixels: NDArray[Any] | None = None
    deep: bool = True


def _measure(listing: Listing) -> Extremes:
    looked_at = set(listing.train[:: -(-len(listing.train) // MOST_OF_8_BITS)])
    most = max(1, MOST_PIXELS // len(listing.train))

    def measure(path: str) -> _Measured:
        return _of_image(listing.root / path, most, of_8_bits=path in looked_at)

    with ThreadPoolExecutor(4 * cores()) as pool, catch_warnings(action="ignore"):  # Pillow's remarks
        parts = [list(pool.map(measure, paths)) for paths in (listing.train, listing.test, listing.val)]
    every = [each for part in parts for each in part]
    train, test, val = ([each.extremes for each in part if each.extremes] for part in parts)
    colors = [each.color for each in every if each.color is not None]
    return Extremes(
        train,
        test,
        whole=all(each.whole for each in every),
        not_finite=sum(not each.finite for each in every),
        deepest_color=max(colors, default=None),
        quantiles=_quantiles(each.pixels for each in parts[0] if each.deep),
        quantiles_of_8_bits=_quantiles(each.pixels for each in parts[0] if not each.deep),
        val=val,
    )


def _quantiles(images: Iterable[NDArray[Any] | None]) -> list[float]:
    pixels = [image for image in images if image is not None and image.size]
    if not pixels:
        return []
    values = np.sort(np.concatenate(pixels))
    places = np.linspace(0, len(values) - 1, QUANTILES).round().astype(int)
    return [float(value) for value in values[places]]


def _of_image(file: Path, most: int, *, of_8_bits: bool) -> _Measured:
    """Measure an image. Of one of 8 bits the header alone is read, unless it is to be looked at."""
    with open_image(file) as image:
        if is_deep(image):
            values = np.asarray(image).astype(np.float64)
            finite = values[np.isfinite(values)]
            return _Measured(
                (float(finite.min()), float(finite.max())) if finite.size else None,
                whole=bool(np.all(finite == np.floor(finite))),
                finite=finite.size == values.size,
                pixels=_some(finite, most),
            )
        if any(re.search(";16[BLN]", str(tile[3])) for tile in getattr(image, "tile", ())):
            return _Measured(color=int(np.asarray(image.convert("RGB")).max()))
        if of_8_bits and not image.has_transparency_data:
            with suppress(Exception):  # of a damaged file, which decoding names
                return _Measured(pixels=_some(np.asarray(image.convert("RGB")).ravel(), most), deep=False)
    return _Measured()


def _some(pixels: NDArray[Any], most: int) -> NDArray[Any]:
    """Return `most` of the pixels, drawn at random but always the same."""
    return pixels if pixels.size <= most else pixels[np.random.default_rng(0).integers(pixels.size, size=most)]
