import errno
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from normlab.common.errors import UserError
from normlab.data import cache
from normlab.data.images import Decoder
from normlab.data.inventory import scan
from normlab.data.streaming import worker_context


class Decoding:
    """The arguments of `cache.decoded` for one folder, and what it logged."""

    def __init__(self, root: Path, data_dir: Path, size: int = 8) -> None:
        scan.cache_clear()
        found = scan(root)
        self.paths = [*found.train, *found.test]
        self.decoder = Decoder(root, size, size, one_size=False, crop_scale=None)
        self.data_dir = data_dir
        self.lines: list[str] = []

    def run(self) -> np.ndarray:
        return cache.decoded(self.decoder, self.paths, self.data_dir, self.lines.append)[0]

    @property
    def decoded(self) -> bool:
        return any(line.startswith("Decoded") for line in self.lines)


def test_the_array_holds_the_pixels_of_the_files_and_a_second_load_decodes_nothing(image_folder, tmp_path) -> None:
    root = image_folder()
    first, second = Decoding(root, tmp_path), Decoding(root, tmp_path)
    array = first.run()
    assert array.shape == (20, 3, 8, 8)
    for pixels, path in zip(array, scan(root).train, strict=False):
        assert np.array_equal(pixels.transpose(1, 2, 0), np.array(Image.open(root / path)))
    assert first.decoded
    array_again = second.run()
    assert np.array_equal(array_again, array)
    assert second.lines == []
    array_again[:] = 0
    assert Decoding(root, tmp_path).run().any(), "writing to the array leaves the file as it is"


@pytest.mark.parametrize("change", ["content", "content at the same time", "name", "addition", "size"])
def test_any_change_of_the_folder_decodes_again(image_folder, tmp_path, change) -> None:
    root = image_folder()
    Decoding(root, tmp_path).run()
    file = root / "train" / "cat" / "0.png"
    if change.startswith("content"):
        before = file.stat()
        Image.new("RGB", (8, 8), "red").save(file)
        if change != "content":
            with file.open("ab") as opened:
                opened.write(bytes(before.st_size - file.stat().st_size))
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    elif change == "name":
        file.rename(file.with_name("00.png"))
    elif change == "addition":
        shutil.copy2(file, file.with_name("9.png"))
    again = Decoding(root, tmp_path, size=4 if change == "size" else 8)
    array = again.run()
    assert again.decoded
    if change.startswith("content"):
        assert array[0, :, 0, 0].tolist() == [255, 0, 0]


def folder_of(color: str, root: Path) -> Path:
    """Images of one color; names, sizes and times are the same for every color."""
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            file = root / part / label / "0.bmp"
            Image.new("RGB", (8, 8), color).save(file)
            os.utime(file, ns=(1, 1))
    return root


def test_folders_of_one_name_and_listing_are_kept_apart(tmp_path) -> None:
    red, blue = (folder_of(color, tmp_path / color / "pics") for color in ("red", "blue"))
    first, second = Decoding(red, tmp_path).run(), Decoding(blue, tmp_path).run()
    assert first[0, :, 0, 0].tolist() == [255, 0, 0]
    assert second[0, :, 0, 0].tolist() == [0, 0, 255]


def test_a_link_that_is_set_to_another_folder_is_read_anew(tmp_path) -> None:
    red, blue = (folder_of(color, tmp_path / color / "pics") for color in ("red", "blue"))
    link = tmp_path / "pics"
    link.symlink_to(red)
    assert Decoding(link, tmp_path).run()[0, :, 0, 0].tolist() == [255, 0, 0]
    link.unlink()
    link.symlink_to(blue)
    assert Decoding(link, tmp_path).run()[0, :, 0, 0].tolist() == [0, 0, 255]


def test_a_copy_and_files_that_were_touched_are_not_decoded_again(tmp_path) -> None:
    red = folder_of("red", tmp_path / "red")
    Decoding(red, tmp_path).run()
    os.utime(red / "train" / "cat" / "0.bmp", ns=(7, 7))
    touched = Decoding(red, tmp_path)
    touched.run()
    assert not touched.decoded
    copy = Decoding(Path(shutil.copytree(red, tmp_path / "copy" / "red")), tmp_path)
    copy.run()
    assert not copy.decoded


def test_images_that_change_while_they_are_decoded_are_not_kept(tmp_path, monkeypatch) -> None:
    ours = Decoding(folder_of("red", tmp_path / "red"), tmp_path)

    def and_change(chunks, text, log):
        yield from chunks
        Image.new("RGB", (8, 8), "blue").save(tmp_path / "red" / "train" / "cat" / "0.bmp")

    monkeypatch.setattr(cache, "with_progress", and_change)
    with pytest.raises(UserError, match="changed while they were read"):
        ours.run()
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_what_was_decoded_at_a_chosen_size_does_not_hide_that_sizes_differ(image_folder, load_it) -> None:
    root = image_folder(count=70)
    Image.new("RGB", (8, 12)).save(root / "train" / "dog" / "33.png")  # where no glance at a few images falls
    load_it("image_folder", path=str(root), image_size=8)
    with pytest.raises(UserError, match=r"33\.png is 8x12"):
        load_it("image_folder", path=str(root))


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "header", "empty", "text"])
def test_a_damaged_file_is_decoded_again(image_folder, tmp_path, damage) -> None:
    root = image_folder()
    intact = np.array(Decoding(root, tmp_path).run())
    (file,) = (tmp_path / "cache").glob("*.npy")
    content = bytearray(file.read_bytes())
    if damage == "flipped bit":
        content[-100] ^= 1
    elif damage == "header":
        content[20] ^= 1
    file.write_bytes({"truncated": content[:-50], "empty": b"", "text": b"hello"}.get(damage, content))
    again = Decoding(root, tmp_path)
    assert np.array_equal(again.run(), intact)
    assert any("damaged" in line for line in again.lines)


@pytest.mark.slow
def test_two_processes_at_once_decode_once(image_folder, tmp_path) -> None:
    ours = Decoding(image_folder(), tmp_path)
    file = tmp_path / "cache" / f"images-8px-{cache._key(ours.decoder, ours.paths, tmp_path)}.lock"
    context = worker_context()
    with context.Manager() as manager:
        lines = manager.Queue()
        arguments = (ours.decoder, ours.paths, tmp_path, lines.put)
        others = [context.Process(target=cache.decoded, args=arguments) for _ in range(2)]
        with cache.locked(file, print):
            for other in others:
                other.start()
            assert all("Waiting" in lines.get(timeout=60) for _ in others)
        for other in others:
            other.join()
        logged = [lines.get() for _ in range(lines.qsize())]
    assert [other.exitcode for other in others] == [0, 0]
    assert sum(line.startswith("Decoded") for line in logged) == 1


def test_an_unreadable_image_is_named_and_leaves_nothing_behind(image_folder, tmp_path) -> None:
    root = image_folder()
    (root / "test" / "dog" / "3.png").write_text("no image")
    with pytest.raises(UserError, match=r"test/dog/3\.png cannot be read"):
        Decoding(root, tmp_path).run()
    left = {file.suffix for file in (tmp_path / "cache").iterdir() if not file.name.startswith("contents-")}
    assert left <= {".lock"}


def test_an_image_of_another_size_is_named(image_folder, load_it) -> None:
    root = image_folder(count=70)
    Image.new("RGB", (8, 12)).save(root / "train" / "dog" / "33.png")  # where no glance at a few images falls
    with pytest.raises(UserError, match=r"33\.png is 8x12.*\n.*dataset\.image_size=8"):
        load_it("image_folder", path=str(root))


def test_a_full_disk(image_folder, tmp_path) -> None:
    """Stood in for by the kernel's limit on a file's size: the same failure of the same call."""
    ours = Decoding(image_folder(), tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(UserError, match=os.strerror(errno.EFBIG)):
            ours.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "cache").glob("*.tmp")) == []


def test_pillows_remarks_are_not_errors(image_folder, tmp_path) -> None:
    root = image_folder()
    image = Image.new("P", (8, 8), 0)
    image.putpalette([9, 9, 9])
    image.save(root / "train" / "cat" / "0.png", transparency=b"\xff")
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00\x12\x01"  # breaks off
    Image.new("RGB", (8, 8)).save(root / "train" / "cat" / "1.jpg", exif=exif)
    assert Decoding(root, tmp_path).run()[0, :, 0, 0].tolist() == [9, 9, 9]


def test_the_log_has_the_progress_of_the_decoding(image_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "CHUNK", 8)
    monkeypatch.setattr("normlab.common.download.PROGRESS_SECONDS", 0.0)
    ours = Decoding(image_folder(), tmp_path)
    ours.run()
    expected = [f"Decoding images, once: {number} of 20 images" for number in (0, 8, 16, 20)]
    assert [line for line in ours.lines if line.startswith("Decoding")] == expected
