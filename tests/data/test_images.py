import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from normlab.common.errors import UserError
from normlab.data import images
from normlab.data.damage import open_image
from normlab.data.inventory import shown_size

RED = (255, 0, 0)


def color(image: Image.Image, value_range: tuple[float, float] | None = None) -> tuple[int, ...]:
    rgb = images.to_rgb(image, value_range)
    assert rgb.mode == "RGB"
    pixel = rgb.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel


def palette(transparent: int | bytes | None = None) -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 255, *RED])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def gray16(value: int, mode: str = "I;16") -> Image.Image:
    order = ">" if mode == "I;16B" else "<"
    return Image.frombytes(mode, (2, 2), np.full((2, 2), value, f"{order}u2").tobytes())


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        pytest.param(Image.new("1", (2, 2), 1), (255, 255, 255), id="1"),
        pytest.param(Image.new("L", (2, 2), 77), (77, 77, 77), id="L"),
        pytest.param(Image.new("LA", (2, 2), (77, 255)), (77, 77, 77), id="LA"),
        pytest.param(Image.new("LA", (2, 2), (77, 0)), (255, 255, 255), id="LA transparent"),
        pytest.param(palette(), RED, id="P"),
        pytest.param(palette(0), RED, id="P, another color transparent"),
        pytest.param(palette(1), (255, 255, 255), id="P, this color transparent"),
        pytest.param(palette(b"\xff\x00"), (255, 255, 255), id="P with alpha"),
        pytest.param(Image.new("RGB", (2, 2), RED), RED, id="RGB"),
        pytest.param(Image.new("RGBA", (2, 2), (*RED, 255)), RED, id="RGBA"),
        pytest.param(Image.new("RGBA", (2, 2), (*RED, 0)), (255, 255, 255), id="RGBA transparent"),
        pytest.param(Image.new("RGBA", (2, 2), (0, 0, 0, 127)), (128, 128, 128), id="RGBA half transparent"),
        pytest.param(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), RED, id="CMYK"),
        pytest.param(Image.new("YCbCr", (2, 2), (128, 128, 128)), (128, 128, 128), id="YCbCr"),
        pytest.param(Image.new("HSV", (2, 2), (0, 255, 255)), RED, id="HSV"),
    ],
)
def test_every_mode_of_8_bits_becomes_its_color(image, expected) -> None:
    assert color(image) == expected
    assert color(image, (0, 15)) == expected, "a range is of images of more than 8 bits"


@pytest.mark.parametrize(
    ("image", "value_range", "expected"),
    [
        pytest.param(gray16(65535), (0, 65535), 255, id="I;16 white"),
        pytest.param(gray16(100 * 257), (0, 65535), 100, id="I;16"),
        pytest.param(gray16(4095 // 3), (0, 4095), 85, id="I;16 of 12 bits"),
        pytest.param(gray16(100 * 257, "I;16B"), (0, 65535), 100, id="I;16B"),
        pytest.param(Image.new("I", (2, 2), 77), (0, 255), 77, id="I of 8 bits"),
        pytest.param(Image.new("I", (2, 2), 0), (-1000, 1000), 128, id="I signed"),
        pytest.param(Image.new("I", (2, 2), -1001), (-1000, 1000), 0, id="I below"),
        pytest.param(Image.new("I", (2, 2), 2**31 - 1), (-1000, 1000), 255, id="I above"),
        pytest.param(Image.new("F", (2, 2), 0.2), (0, 1), 51, id="F fraction"),
        pytest.param(Image.new("F", (2, 2), 0.2), (0, 0.4), 128, id="F of small fractions"),
        pytest.param(Image.new("F", (2, 2), float("nan")), (-1, 1), 0, id="F not a number"),
        pytest.param(Image.new("F", (2, 2), float("inf")), (-1, 1), 255, id="F infinite"),
        pytest.param(Image.new("F", (2, 2), -float("inf")), (-1, 1), 0, id="F minus infinite"),
    ],
)
def test_values_of_more_than_8_bits_are_scaled_by_the_range(image, value_range, expected) -> None:
    assert color(image, value_range) == (expected,) * 3


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_16_bit_file_is_scaled_and_needs_a_range(tmp_path, suffix) -> None:
    file = tmp_path / f"gray{suffix}"
    gray16(100 * 257).save(file)
    assert images.read(file, (0, 65535)).getpixel((0, 0)) == (100, 100, 100)
    with pytest.raises(UserError, match=r"dataset\.value_range=\[0,65535\]"):
        images.read(file)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("number", range(1, 9))
def test_exif_orientation_is_applied_to_pixels_and_size(tmp_path, suffix, number) -> None:
    """By EXIF: row 0 is shown at the top, top, bottom, bottom, left, right, right, left; column 0 at the left, right,
    right, left, top, top, bottom, bottom.
    """
    exif = Image.Exif()
    exif[0x0112] = number
    pixels = np.full((32, 48, 3), 255, np.uint8)
    bottom, right = number in (3, 4, 6, 7), number in (2, 3, 7, 8)
    corner = (slice(16, None) if bottom else slice(0, 16), slice(32, None) if right else slice(0, 16))
    pixels[corner] = 0
    file = tmp_path / f"turned{suffix}"
    Image.fromarray(pixels).save(file, exif=exif)
    shown = images.read(file)
    assert shown.size == ((32, 48) if number >= 5 else (48, 32))
    dark = np.asarray(shown.convert("L")) < 128
    assert dark[:16, :16].mean() > 0.9
    assert dark.sum() < 1.2 * 16 * 16
    with open_image(file) as image:
        assert shown_size(image) == shown.size


def broken_files(folder: Path) -> dict[str, Path]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    files = {name: folder / name for name in ("text.jpg", "empty.png", "cut.jpg", "cut.png", "bomb.png")}
    files["text.jpg"].write_text("this is no image")
    files["empty.png"].touch()
    for name in ("cut.jpg", "cut.png"):
        noise.save(files[name])
        files[name].write_bytes(files[name].read_bytes()[:-2000])
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    files["bomb.png"].write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )
    return files


@pytest.mark.parametrize("name", ["text.jpg", "empty.png", "cut.jpg", "cut.png", "bomb.png", "absent.png"])
def test_a_file_that_cannot_be_decoded_is_named(tmp_path, name) -> None:
    file = broken_files(tmp_path).get(name, tmp_path / name)
    with pytest.raises(UserError, match=name):
        images.read(file)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (20, 20)])
def test_fit_equals_torchvisions_resize_and_center_crop(size) -> None:
    oracle = transforms.Compose([transforms.Resize(23), transforms.CenterCrop(20)])
    assert images.fit(noise(*size), 20, 23).tobytes() == oracle(noise(*size)).tobytes()


def test_random_crop_equals_torchvisions_at_the_same_seed() -> None:
    oracle = transforms.RandomResizedCrop(16, (0.3, 0.9), interpolation=InterpolationMode.BILINEAR)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = oracle(noise(40, 30))
        assert images.random_crop(noise(40, 30), 16, (0.3, 0.9), seed).tobytes() == expected.tobytes()


def test_random_crop_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    images.random_crop(noise(40, 30), 16, (0.3, 0.9), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_pixels_are_planar(tmp_path) -> None:
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "a.png")
    decoded = images.Decoder(tmp_path, 4, 4, one_size=True, crop_scale=None)("a.png")
    assert decoded.dtype == np.uint8
    assert decoded.shape == (3, 4, 4)
    assert decoded[:, 0, 0].tolist() == [1, 2, 3]
