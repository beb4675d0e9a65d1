import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from normlab import runs
from normlab.common.errors import UserError
from normlab.data import sources, values
from normlab.data.folders import images_of, scan
from normlab.data.values import standard_range
from normlab.training.run import train_run

SIZE = 8


def save(array: np.ndarray, file: Path) -> None:
    Image.fromarray(array).save(file)


@pytest.fixture
def folder_of(tmp_path):
    """`folder_of([(train arrays), ...], test, suffix)`: images of two classes, made of arrays (SIZE, SIZE)."""

    def make(train: list[np.ndarray], test: list[np.ndarray], suffix: str = ".tif") -> Path:
        root = tmp_path / "pics"
        for part, arrays in (("train", train), ("test", test)):
            for label in ("a", "b"):
                (root / part / label).mkdir(parents=True)
            for number, array in enumerate(arrays):
                save(array, root / part / "ab"[number % 2] / f"{number}{suffix}")
        return root

    return make


def constant(value: float, dtype: type) -> np.ndarray:
    return np.full((SIZE, SIZE), value, dtype)


def ramp(low: float, high: float, dtype: type) -> np.ndarray:
    return np.linspace(low, high, SIZE * SIZE).reshape(SIZE, SIZE).astype(dtype)


def in_memory_and_streamed(settings, root: Path, tmp_path: Path, lines: list[str], **changes) -> list[torch.Tensor]:
    """The training images, then those for testing, one channel of each."""
    found = []
    for storage in ("memory", "stream"):
        dataset = settings("image_folder", path=str(root), storage=storage, **changes)
        source = sources.folder(dataset, tmp_path / "data", 0, torch.device("cpu"), lines.append)
        read = [
            part.read(torch.arange(len(labels)), 100)
            for part, labels in ((source.train, source.train_labels), (source.test, source.test_labels))
        ]
        lines += source.values.warnings
        found.append(torch.cat([images for part in read for images in part])[:, 0])
    assert torch.equal(*found)
    return found[0]


@pytest.mark.parametrize(
    ("low", "high", "dtype", "suffix", "expected"),
    [
        pytest.param(0, 4095, np.uint16, ".png", (0, 4095), id="12 bits in 16"),
        pytest.param(5, 4000, np.uint16, ".tif", (0, 4095), id="12 bits in 16, not filled"),
        pytest.param(0, 1023, np.uint16, ".png", (0, 1023), id="10 bits in 16"),
        pytest.param(0, 65535, np.uint16, ".png", (0, 65535), id="16 bits"),
        pytest.param(30000, 31000, np.uint16, ".png", (30000, 31000), id="16 bits with an offset"),
        pytest.param(0, 250, np.int32, ".tif", (0, 255), id="I of 8 bits"),
        pytest.param(0, 9, np.int32, ".tif", (0, 255), id="I of few values, none of which is lost"),
        pytest.param(-1000, 2000, np.int32, ".tif", (-1000, 2000), id="I signed"),
        pytest.param(-1000, 2000, np.int16, ".tif", (-1000, 2000), id="16 bits signed"),
        pytest.param(0, 10**6, np.int32, ".tif", (0, 10**6), id="I beyond 16 bits"),
        pytest.param(0, 1, np.float32, ".tif", (0, 1), id="F fractions"),
        pytest.param(0, 0.125, np.float32, ".tif", (0, 0.125), id="F small fractions"),
        pytest.param(0, 2, np.float32, ".tif", (0, 2), id="F a little more than fractions"),
        pytest.param(0.5, 254.5, np.float32, ".tif", (0, 255), id="F to 255"),
        pytest.param(-1, 1, np.float32, ".tif", (-1, 1), id="F signed"),
    ],
)
def test_one_range_is_found_for_all_images(folder_of, settings, tmp_path, low, high, dtype, suffix, expected) -> None:
    """The darkest and the brightest value are those of one image; the others keep their place between them."""
    middle = (low + high) / 2
    arrays = [ramp(low, high, dtype), constant(middle, dtype), constant(low, dtype)]
    lines: list[str] = []
    found = in_memory_and_streamed(
        settings, folder_of([*arrays[:2], constant(high, dtype)], arrays[1:], suffix), tmp_path, lines
    )
    start, end = expected
    by_path = [arrays[0], constant(high, dtype), arrays[1], arrays[1], arrays[2]]  # class a before b
    oracle = np.stack([(array.astype(np.float64) - start) / (end - start) * 255 for array in by_path])
    assert np.abs(found.numpy() - oracle).max() <= 0.5 + 1e-9
    told = [line for line in lines if "becomes black" in line]
    assert (
        told
        == [
            f"Images of more than 8 bits: {start:.10g} becomes black and {end:.10g} white"
            " (dataset.value_range sets other values)."
        ]
        * 2
    )


def test_a_range_that_is_set_goes_first_and_what_is_beyond_is_counted(folder_of, settings, tmp_path) -> None:
    root = folder_of(
        [constant(100, np.uint16), constant(4000, np.uint16)], [constant(200, np.uint16), constant(5, np.uint16)]
    )
    lines: list[str] = []
    found = in_memory_and_streamed(settings, root, tmp_path, lines, value_range=[100, 1120])
    assert found[:, 0, 0].tolist() == [0, 255, 25, 0]
    assert "Images of more than 8 bits: 100 becomes black and 1120 white (dataset.value_range)." in lines
    assert any(line.startswith("1 training images") and "have values beyond [100, 1120]" in line for line in lines)
    assert any(line.startswith("1 test images") and "have values beyond [100, 1120]" in line for line in lines)


def test_test_images_have_no_say_and_are_clipped(folder_of, settings, tmp_path) -> None:
    root = folder_of([ramp(0, 1000, np.uint16)] * 2, [constant(2046, np.uint16), constant(1023, np.uint16)], ".png")
    lines: list[str] = []
    found = in_memory_and_streamed(settings, root, tmp_path, lines)
    assert found[2:, 0, 0].tolist() == [255, 255]
    assert any(line.startswith("1 test images") and "have values beyond [0, 1023]" in line for line in lines)


def test_values_that_are_not_finite_have_no_say_and_are_counted(folder_of, settings, tmp_path) -> None:
    odd = ramp(0, 1, np.float32)
    odd[0, :3] = np.nan, np.inf, -np.inf
    lines: list[str] = []
    found = in_memory_and_streamed(
        settings, folder_of([odd, constant(np.nan, np.float32)], [ramp(0, 1, np.float32)] * 2), tmp_path, lines
    )
    assert found[0, 0, :3].tolist() == [0, 255, 0]
    assert found[0, -1, -1] == 255
    assert found[1].max() == 0
    assert any(line.startswith("2 images") and "not finite" in line for line in lines)


def patched(array: np.ndarray, value: float, pixels: int = 1) -> np.ndarray:
    return np.where(np.arange(SIZE * SIZE).reshape(SIZE, SIZE) < pixels, value, array).astype(array.dtype)


def masks(foreground: int, dtype: type) -> list[np.ndarray]:
    return [patched(constant(0, dtype), foreground, 20)] * 4


DIM = ramp(0, 300, np.uint16)
WASTED = {
    "a hot pixel": ([*[DIM] * 20, patched(DIM, 65535)], "0 is black and 65535 white", "value_range=[0,300]"),
    "no data, low": (
        [patched(ramp(0, 30, np.float32), -9999, 7)] * 4,
        "-9999 is black and 30 white",
        "value_range=[LOW,HIGH]",
    ),
    "no data, high": ([patched(DIM, 65535, 7)] * 4, "0 is black and 65535 white", "value_range=[LOW,HIGH]"),
    "no data, masks": (
        [patched(image, 65535, 7) for image in masks(1, np.uint16)],
        "0 is black and 65535 white",
        "value_range=[LOW,HIGH]",
    ),
    "one bright image": (
        [*[DIM] * 119, ramp(0, 65535, np.uint16)],
        "0 is black and 65535 white",
        "value_range=[LOW,HIGH]",
    ),
    "masks of 16 bits": (masks(1, np.uint16), "0 is black and 255 white", "within [0, 1]. dataset.value_range=[0,1]"),
    "masks of 8 bits": (masks(1, np.uint8), "0 is black and 255 white", "use 0.4% of the range"),
    "white": ([constant(251, np.uint8), constant(255, np.uint8)] * 2, "0 is black and 255 white", "use 1.6% of"),
}
USED = {
    "12 bits": [ramp(0, 4095, np.uint16)] * 4,
    "an offset": [ramp(30000, 30100, np.uint16)] * 4,
    "whole masks": masks(65535, np.uint16),
    "whole masks of 8 bits": masks(255, np.uint8),
    "few values": [ramp(0, 1, np.float32).round(1)] * 4,
    "a hot pixel that does little": [*[DIM] * 20, patched(DIM, 1000)],
    "8 bits": [ramp(0, 255, np.uint8)] * 4,
}


@pytest.mark.parametrize("case", [*WASTED, *USED])
def test_a_range_of_which_next_to_nothing_is_used_is_warned_of(folder_of, tmp_path, case) -> None:
    images, *words = WASTED.get(case) or (USED[case],)
    listing = images_of(scan(folder_of(images, images[:2], ".tif")), None, 0)
    for _ in ("measured", "kept"):
        warnings = values.find(listing, None, "contents", tmp_path / "data", lambda line: None).warnings
        assert len(warnings) == bool(words), warnings
        assert all(word in "".join(warnings) for word in words)
        assert all("dataset.value_range" in each and "of their pixels" in each for each in warnings)


def test_images_of_8_bits_stay_beside_those_of_more(folder_of, settings, tmp_path) -> None:
    root = folder_of([ramp(0, 4095, np.uint16), constant(10, np.uint8)], [constant(255, np.uint8)] * 2, ".png")
    assert in_memory_and_streamed(settings, root, tmp_path, [])[1:, 0, 0].tolist() == [10, 255, 255]


def test_a_range_that_no_image_needs_is_refused(image_folder, load_it) -> None:
    with pytest.raises(UserError, match=r"has none\.\n.*dataset\.value_range=null"):
        load_it("image_folder", path=str(image_folder()), value_range=[0, 15])


@pytest.mark.parametrize("bad", [[5, 5], [9, 0], [1], [0, float("nan")]])
def test_a_range_that_is_none_is_refused(settings, bad) -> None:
    with pytest.raises(ValueError, match="value_range"):
        settings("image_folder", path="pics", value_range=bad)


def write_16_bit_color(file: Path, top: int) -> None:
    """By the TIFF 6.0 specification: 8 entries, one strip, little-endian; Pillow writes no such file itself."""
    pixels = np.full((SIZE, SIZE, 3), top, "<u2").tobytes()
    bits, data = 8 + 2 + 12 * 9 + 4, 8 + 2 + 12 * 9 + 4 + 6
    entries = [
        *((256, 3, 1, SIZE), (257, 3, 1, SIZE), (258, 3, 3, bits), (259, 3, 1, 1), (262, 3, 1, 2)),
        *((273, 4, 1, data), (277, 3, 1, 3), (278, 3, 1, SIZE), (279, 4, 1, len(pixels))),
    ]
    head = b"II*\0" + (8).to_bytes(4, "little") + len(entries).to_bytes(2, "little")
    for tag, kind, count, value in entries:
        fields = ((tag, 2), (kind, 2), (count, 4), (value, 4))
        head += b"".join(number.to_bytes(size, "little") for number, size in fields)
    file.write_bytes(head + bytes(4) + np.array([16, 16, 16], "<u2").tobytes() + pixels)


@pytest.mark.parametrize(("top", "fits"), [(4095, False), (65535, True)])
def test_16_bit_colors_of_which_pillow_leaves_nothing_are_refused(image_folder, load_it, top, fits) -> None:
    root = image_folder(count=1)
    for file in root.glob("*/*/*.png"):
        file.unlink()
        write_16_bit_color(file.with_suffix(".tif"), top)
    if fits:
        load_it("image_folder", path=str(root))
        return
    with pytest.raises(UserError, match="no value above 3855 of 65535"):
        load_it("image_folder", path=str(root))


def test_the_range_is_read_once_for_each_content(folder_of, tmp_path, monkeypatch) -> None:
    root = folder_of([ramp(0, 4095, np.uint16)] * 2, [ramp(0, 4095, np.uint16)] * 2)
    listing = images_of(scan(root), None, 0)

    def find(contents: str) -> values.ValueRange | None:
        return values.find(listing, None, contents, tmp_path / "data", lambda line: None).value_range

    assert find("one") == (0, 4095)
    with monkeypatch.context() as patched:
        patched.setattr(values, "_measure", lambda listing: pytest.fail("read again"))
        assert find("one") == (0, 4095)
    (kept,) = (tmp_path / "data" / "cache").glob("values-*")
    kept.write_text("damaged")
    assert find("one") == (0, 4095)
    other = values.Extremes([(0, 9999)], [], whole=True, not_finite=0, deepest_color=None)
    monkeypatch.setattr(values, "_measure", lambda listing: other)
    assert find("two") == (0, 16383), "other contents"


def test_a_range_without_width() -> None:
    assert standard_range([(7.0, 7.0)], whole=False) == (7, 8)
    assert standard_range([], whole=True) == (0, 1)


def test_a_run_tells_and_records_the_range(folder_of, tiny) -> None:
    root = folder_of([ramp(0, 1000, np.uint16)] * 2, [constant(2046, np.uint16)] * 2, ".png")
    config = tiny(
        *("dataset=image_folder", f"dataset.path={root}", "dataset.train_size=2", "dataset.test_size=2"),
        *("batch=2", "epochs=1", "eval_batch=2", "norm=none"),
    )
    train_run(config)
    (record,) = runs.find(config.study_folder)
    assert json.loads((record / "provenance.json").read_text())["value_range"] == [0, 1023]
    told = (record / "run.log").read_text()
    assert "INFO Images of more than 8 bits: 0 becomes black and 1023 white" in told
    assert "WARNING 2 test images" in told
