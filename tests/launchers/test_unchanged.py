"""A finished run is skipped only while what lies behind it is what it was made of."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from launchers.commands import by_two_tasks
from PIL import Image

NET = """
import torch
from small import SmallNet

class MyNet(SmallNet):
    pass

class Other(torch.nn.Module):
    pass
"""
NORM = """
from normlab.norms.batch import BatchNorm

class MyNorm(BatchNorm):
    pass
"""
RUN = (
    *("dataset=image_folder", "dataset.path=photos", "model=custom", "model.target=my_nets.MyNet", "model.name=mine"),
    *("norm._target_=my_norms.MyNorm", "batch=4", "epochs=1", "device=cpu", "threads=1"),
)


@pytest.fixture
def finished(tmp_path, command) -> Path:
    """A folder with images, a network and a norm of the user's own, and a run that is finished."""
    for split in ("train", "test"):
        for label, shade in (("a", 0), ("b", 90)):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (16, 16), (40 * number, shade, 30)).save(folder / f"{number}.png")
    (tmp_path / "my_nets.py").write_text(NET)
    (tmp_path / "my_norms.py").write_text(NORM)
    status, _, error = command("train.py", *RUN)
    assert status == 0, error
    return tmp_path


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def add_a_class(folder: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(folder / "photos" / split / "a", folder / "photos" / split / "c")


def replace_an_image(folder: Path) -> None:
    """With one of the same size in bytes."""
    path = folder / "photos" / "train" / "a" / "0.png"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def swap_labels(folder: Path) -> None:
    (folder / "photos/train/a/2.png").rename(folder / "photos/train/b/.2.png")
    (folder / "photos/train/b/0.png").rename(folder / "photos/train/a/2.png")
    (folder / "photos/train/b/.2.png").rename(folder / "photos/train/b/0.png")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a class": (add_a_class, "2 classes then, 3 now"),
    "an image less": (lambda folder: (folder / "photos/train/a/0.png").unlink(), "12 images then, 11 now"),
    "an image replaced": (replace_an_image, "other files or contents"),
    "labels swapped": (swap_labels, "other files or contents"),
    "the network": (
        lambda folder: rewrite(folder / "my_nets.py", "Net):\n    pass", "Net):\n    x = 1"),
        "module my_nets",
    ),
    "the norm": (lambda folder: rewrite(folder / "my_norms.py", "pass", "x = 1"), "module my_norms"),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_told_and_nothing_is_trained(finished, command, change) -> None:
    make, words = CHANGES[change]
    make(finished)
    before = sorted(finished.glob("outputs/**/*"))
    for sweep in ((), ("-m", "seed=0,1"), ("-m", "seed=0,1", "hydra/launcher=plan")):
        status, out, error = command("train.py", *sweep, *RUN)
        assert status == 1, out
        assert words in error
        assert "To keep it" in error
        assert "To train anew, delete" in error
        assert len(error.splitlines()) <= 5
    assert sorted(finished.glob("outputs/**/*")) == before
    pattern = error.splitlines()[-1].rpartition(" ")[2]
    assert len(list(finished.glob(pattern))) == 1


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a class renamed in one part": (
        lambda photos: (photos / "train/a").rename(photos / "train/c"),
        "Only in train: c.",
    ),
    "a class emptied": (lambda photos: [file.unlink() for file in (photos / "test/a").iterdir()], "without images"),
    "no test images": (lambda photos: shutil.rmtree(photos / "test"), "has no folder test or val"),
    "a single class": (lambda photos: [shutil.rmtree(photos / part / "a") for part in ("train", "test")], "single"),
    "a file": (lambda photos: [shutil.rmtree(photos), photos.touch()], "is a file"),
}


@pytest.mark.slow
def test_a_folder_that_is_no_data_set_any_more_is_told(finished, command) -> None:
    photos = finished / "photos"
    shutil.copytree(photos, finished / "kept")
    for make, words in BROKEN.values():
        make(photos)
        for sweep in ((), ("-m", "seed=0,1", "hydra/launcher=plan")):
            status, out, error = command("train.py", *sweep, *RUN)
            assert status == 1, out
            assert error.startswith("bn seed=0 is finished, ")
            assert "is finished, but its images cannot be read any more as they were.\n" in error
            assert words in error
            assert len(error.splitlines()) <= 5
        photos.unlink() if photos.is_file() else shutil.rmtree(photos)
        shutil.copytree(finished / "kept", photos)
    status, out, error = command("train.py", *RUN)
    assert (status, error) == (0, "")
    for remove in (lambda: shutil.rmtree(photos), photos.mkdir):  # deleted, or not mounted
        remove()
        status, out, error = command("train.py", *RUN)
        assert status == 0, error
        assert "Nothing to do" in out
        assert error == "photos has no images now: they are not compared.\n"


@pytest.mark.slow
def test_several_processes_are_told_as_well(finished) -> None:
    replace_an_image(finished)
    rewrite(finished / "my_norms.py", "pass", "x = 1")
    status, out, error = by_two_tasks(finished, *RUN)
    assert status == 1, out
    assert "other files or contents" in error
    assert len(error.splitlines()) <= 5


@pytest.mark.slow
def test_hydras_own_launcher_ends_with_the_error_of_one_run(finished, command) -> None:
    add_a_class(finished)
    status, _, error = command("train.py", "-m", "seed=1,0", "hydra/launcher=basic", *RUN)
    assert status == 1
    assert "2 classes then, 3 now" in error


@pytest.mark.slow
def test_what_makes_no_difference_is_none(finished, command) -> None:
    for path in finished.glob("photos/*/*/*.png"):
        os.utime(path, (1, 1))
    rewrite(finished / "my_nets.py", "class Other", "# mine\nclass Other")
    (finished / "photos" / "notes.txt").touch()
    status, out, error = command("train.py", *RUN)
    assert status == 0, error
    assert "Nothing to do" in out
    shutil.copytree(finished / "photos", finished / "elsewhere" / "photos")
    status, out, error = command("train.py", *RUN, "dataset.path=elsewhere/photos")
    assert "Nothing to do" in out
    (finished / "my_nets.py").unlink()
    status, out, error = command("train.py", *RUN)
    assert "Nothing to do" in out
    assert error == "The code of model.target=my_nets.MyNet is not found now: it is not compared.\n"


@pytest.mark.slow
def test_what_is_found_by_importing_alone_is_not_compared_and_that_is_told(tmp_path, command) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "own_widths.py").write_text("WIDTH = 4\n")
    add = "import sys\nfrom pathlib import Path\nsys.path.insert(0, str(Path(__file__).with_name('lib')))\n"
    (tmp_path / "my_nets.py").write_text(f"{add}import own_widths\n{NET}")
    run = ("model=custom", "model.target=my_nets.MyNet", "dataset.train_size=20", "batch=4", "epochs=1", "device=cpu")
    status, _, error = command("train.py", *run)
    assert status == 0, error
    status, out, error = command("train.py", *run)
    assert status == 0, error
    assert "Nothing to do" in out
    assert "module own_widths is not found without importing it, and is not compared.\n" in error
