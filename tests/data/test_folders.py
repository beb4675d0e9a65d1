"""Folders as people have them: their layouts, the split of those without one, and files that cannot be read."""

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import composed
from PIL import Image

from normlab import runs
from normlab.common.errors import UserError
from normlab.data import images, inventory
from normlab.data.folders import Layout, images_of, scan
from normlab.data.inventory import check, usable_images
from normlab.data.recorded import ImageFiles


@pytest.fixture(autouse=True)
def _forget() -> None:
    inventory.forget()


def sizes(dataset, data_dir: Path = Path("absent")) -> tuple[int, int, int]:
    found = check(dataset, data_dir)
    return found.train_images, found.test_images, found.val_images


# --- Layouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("train", "valid"), (4, 6, 0)),
        (("Training", "VALIDATION"), (4, 6, 0)),
        (("train", "val", "test"), (4, 8, 6)),
        (("TRAIN", "Valid", "Testing"), (4, 8, 6)),
    ],
)
def test_parts_have_the_names_that_people_give_them(settings, image_folder, parts, expected) -> None:
    for number, part in enumerate(parts):
        path = image_folder(parts=(part,), count=2 + number)
    dataset = settings("image_folder", path=str(path))
    assert sizes(dataset) == expected
    if expected[2]:
        with pytest.raises(UserError, match="has 6 of its own"):
            check(dataset.model_copy(update={"val_size": 2}), Path())


def test_a_folders_own_validation_part_is_where_val_size_would_be(settings, image_folder, load_it) -> None:
    path = image_folder(parts=("train", "val", "test"), count=3)
    for storage in ("memory", "stream"):
        data = load_it("image_folder", path=str(path), storage=storage, input_norm="none", eval_stats="batch", batch=6)
        assert data.val is not None
        pixels, labels = (torch.cat(each) for each in zip(*data.val.batches(), strict=True))
        own = [
            images.read(path / "val" / label / f"{n}.png").getpixel((0, 0))
            for label in ("cat", "dog")
            for n in range(3)
        ]
        found = {
            tuple((255 * image[:, 0, 0]).round().int().tolist()): int(y)
            for image, y in zip(pixels, labels, strict=True)
        }
        assert found == {pixel: number // 3 for number, pixel in enumerate(own)}


@pytest.mark.parametrize(
    ("change", "fraction", "words"),
    [
        ("mv train/* .; rm -r train test", None, "dataset.test_fraction=0.2"),
        ("rm -r test", None, "dataset.test_fraction=0.2"),
        ("true", 0.2, "has a split already, train/ and test/"),
        ("cp -r test val; cp -r test Valid", None, "has Valid and val"),
        ("cp -r test val; mv val/cat val/owl", None, "Not in train: owl.\nNot in val: cat.\nNot in test: owl."),
        ("cp -r test val; rm val/cat/*", None, "without images in {path}/val: cat"),
        ("mkdir photos; mv train test photos; mkdir __MACOSX", None, "Use dataset.path={path}/photos."),
        ("mkdir photos; mv train/* photos; rm -r train test", 0.2, "Use dataset.path={path}/photos."),
        ("mv train/cat/* train; rm -r train/*/; touch labels.csv", None, "Labels in a table (labels.csv) are not read"),
        ("mv test/cat/* test; rm -r test/*/", None, "dataset.path={path}/train dataset.test_fraction=0.2"),
        ("mv train/cat/* .; rm -r train test; touch labels.csv", 0.2, "Labels in a table (labels.csv) are not read"),
        ("mv test/cat test/images; rm -r test/dog; touch test/a.txt", None, "labels of {path}/test are in a.txt"),
        ("for c in cat dog; do mkdir $c; mv train/$c $c/train; mv test/$c $c/test; done; rmdir t*", 0.2, "cat/train"),
        ("for p in *; do rm -r $p/cat; ln -s gone $p/cat; done", None, "the link leads nowhere"),
        ("mv train/* .; rm -r train test/*/; mv cat/0.png test", 0.2, "{path}/test has images without classes"),
        ("mv train seg_train; mv test seg_test", 0.2, "look like a split"),
        ("mv train/* .; rm -r train test; rm dog/[1-9]*", 0.2, "there is one of dog"),
    ],
)
def test_a_layout_that_is_not_read_is_refused_with_what_to_do(settings, image_folder, change, fraction, words) -> None:
    path = image_folder()
    subprocess.run(["bash", "-c", change], cwd=path, check=True)
    with pytest.raises(UserError) as caught:
        check(settings("image_folder", path=str(path), test_fraction=fraction), Path())
    assert words.format(path=path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 5


def test_files_in_formats_that_are_not_read_are_counted(settings, image_folder) -> None:
    path = image_folder()
    for name in (
        "train/cat/a.HEIC",
        "test/dog/b.heic",
        "train/dog/c.jfif",
        "train/dog/._d.heic",
        "train/dog/notes.txt",
    ):
        (path / name).touch()
    (remark,) = check(settings("image_folder", path=str(path)), Path()).remarks
    assert remark.endswith("passed over: 2 .heic, 1 .jfif.")


def test_links_are_followed_and_loops_of_them_end(settings, image_folder, tmp_path) -> None:
    path = image_folder(parts=("a", "b"))
    linked = tmp_path / "linked"
    for part, source in (("train", "a"), ("test", "b")):
        (linked / part).mkdir(parents=True)
        for label in ("cat", "dog"):
            (linked / part / label).symlink_to(path / source / label)
    for number in range(8):  # 8 ways to go on in each folder
        (path / "a" / "cat" / f"self{number}").symlink_to(".")
    for place in ("train/loop", "train/me", "train/cat/up", "top"):
        (linked / place).symlink_to({"train/me": "me", "train/cat/up": linked}.get(place, "."))
    assert sizes(settings("image_folder", path=str(linked))) == (10, 10, 0)


# --- The split --------------------------------------------------------------------------------------


def layout(counts: dict[str, int], part: str = "") -> Layout:
    classes = {
        name: tuple(f"{part and part + '/'}{name}/{n}.jpg" for n in range(count)) for name, count in counts.items()
    }
    return Layout(Path("photos"), {"train": part}, {"train": classes}, frozenset())


COUNTS = {"cat": 101, "dog": 10, "owl": 2, "yak": 3}


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_the_split_is_stratified_and_has_every_image_once(fraction) -> None:
    found = images_of(layout(COUNTS), fraction, 3)
    assert sorted(found.train + found.test) == sorted(f"{name}/{n}.jpg" for name, c in COUNTS.items() for n in range(c))
    for part, labels, share in (
        (found.train, found.train_labels, 1 - fraction),
        (found.test, found.test_labels, fraction),
    ):
        assert [found.classes[label] for label in labels] == [path.partition("/")[0] for path in part]
        for name, count in COUNTS.items():
            number = sum(path.startswith(name) for path in part)
            assert number >= 1
            assert abs(number - share * count) <= 1


def test_the_split_depends_on_names_and_seed_alone() -> None:
    def test_images(layout: Layout, fraction: float = 0.2, seed: int = 0) -> set[str]:
        return set(images_of(layout, fraction, seed).test)

    chosen = test_images(layout(COUNTS))
    assert {path for path in chosen if "cat" not in path} == {
        *("dog/5.jpg", "dog/9.jpg", "owl/0.jpg", "yak/1.jpg"),  # by sha256sum
    }
    assert {f"Train/{path}" for path in chosen} == test_images(layout(COUNTS, "Train"))
    shuffled = {
        name: tuple(random.Random(1).sample(paths, len(paths))) for name, paths in layout(COUNTS).parts["train"].items()
    }
    assert test_images(Layout(Path("photos"), {"train": ""}, {"train": shuffled}, frozenset())) == chosen
    assert chosen < test_images(layout(COUNTS), 0.6)
    assert len(chosen & test_images(layout(COUNTS), seed=1)) < 15
    fewer = images_of(layout(COUNTS), 0.2, 0, left_out=frozenset({"cat/0.jpg"}))
    assert len(chosen ^ set(fewer.test)) <= 2


def test_the_new_settings_make_other_runs_and_their_neutral_values_none() -> None:
    def run_id(**changes: object) -> str:
        config = composed("dataset=image_folder", "dataset.path=photos").as_dict()
        return runs.run_id(config | {"dataset": {**config["dataset"], **changes}})

    before = composed("dataset=image_folder", "dataset.path=photos").as_dict()
    for name in ("test_fraction", "skip_unreadable"):
        del before["dataset"][name]
    assert runs.run_id(before) == run_id()
    assert len({run_id(), run_id(test_fraction=0.2), run_id(test_fraction=0.3), run_id(skip_unreadable=True)}) == 4


# --- Files that cannot be read ----------------------------------------------------------------------


def bomb(file: Path) -> None:
    Image.new("1", (150, 150)).save(file)


KINDS: dict[str, Callable[[Path], object]] = {
    "train/cat/cut.png": lambda file: file.write_bytes((file.parent / "0.png").read_bytes()[:-40]),
    "train/cat/page.jpg": lambda file: file.write_text("<html>not found</html>"),
    "train/dog/bomb.png": bomb,
    "train/dog/empty.jpg": Path.touch,
    "train/dog/pipe.jpg": os.mkfifo,
    "test/cat/nowhere.png": lambda file: file.symlink_to("nowhere"),
    "test/cat/zero.png": lambda file: file.symlink_to("/dev/zero"),
    "test/dog/\udcff\x1b[31m.png": Path.touch,
}


@pytest.fixture
def damaged(image_folder, monkeypatch) -> Path:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 5_000)
    path = image_folder(count=25)
    for name, make in KINDS.items():
        make(path / name)
    return path


@pytest.mark.parametrize("split", [False, True])
def test_what_cannot_be_read_is_left_out_as_if_it_were_not_there(damaged, load_it, tmp_path, split) -> None:
    with pytest.raises(UserError, match=r"cannot be read.*\n.*dataset\.skip_unreadable=true"):
        load_it("image_folder", path=str(damaged))
    clean = shutil.copytree(damaged, tmp_path / "clean", symlinks=True, ignore=lambda *_: {Path(n).name for n in KINDS})
    if split:
        shutil.rmtree(damaged / "train"), shutil.rmtree(clean / "train")
        damaged, clean = damaged / "test", clean / "test"
    for storage in ("memory", "stream"):
        changes = {"storage": storage, "test_fraction": 0.2 if split else None, "flip": True}
        data = load_it("image_folder", path=str(damaged), skip_unreadable=True, **changes)
        oracle = load_it("image_folder", path=str(clean), **changes)
        assert (len(data.train), len(data.test), data.fingerprint) == (
            len(oracle.train),
            len(oracle.test),
            oracle.fingerprint,
        )
        for ours, theirs in (
            (data.train.batches(1), oracle.train.batches(1)),
            (data.test.batches(), oracle.test.batches()),
        ):
            for (a, y), (b, z) in zip(ours, theirs, strict=True):
                assert torch.equal(a, b)
                assert torch.equal(y, z)
    number, whole = (3, 53) if split else (8, 108)
    (warning,) = data.warnings
    assert f"{number} of {whole} images of {damaged} ({100 * number / whole:.2g} %) cannot be read" in warning
    assert warning.isprintable()


def test_too_many_of_them_or_a_whole_class_are_refused(damaged, image_folder, settings) -> None:
    for number in range(4):
        (damaged / "test" / "dog" / f"{number}.png").write_bytes(b"")
    dataset = settings("image_folder", path=str(damaged), skip_unreadable=True)
    with pytest.raises(UserError, match=r"11 of the 108 .* cannot be read.*\n.*a tenth at most"):
        check(dataset, Path())
    path = image_folder("lost", classes=("cat", "dog"), count=40)
    shutil.rmtree(path / "test" / "dog")
    (path / "test" / "dog").mkdir()
    (path / "test" / "dog" / "1.png").touch()
    with pytest.raises(UserError, match=r"No image of dog in .*test can be read"):
        check(settings("image_folder", path=str(path), skip_unreadable=True), Path())


def test_files_are_decoded_once_and_one_that_is_mended_is_told(damaged, settings, tmp_path, monkeypatch) -> None:
    dataset = settings("image_folder", path=str(damaged), skip_unreadable=True, image_size=8)
    lines: list[str] = []
    found = usable_images(dataset, tmp_path / "data", lines.append)
    assert set(found.left_out) == set(KINDS)
    recorded = ImageFiles(dataset, tmp_path / "data").describe()
    assert recorded["left_out"]["images"] == 8
    with monkeypatch.context() as patched:
        patched.setattr(images, "read", lambda *_: pytest.fail("decoded again"))
        inventory.forget()
        assert usable_images(dataset, tmp_path / "data", lines.append) == found
        assert usable_images(dataset.model_copy(update={"path": str(damaged)}), tmp_path / "data") == found
        assert ImageFiles(dataset, tmp_path / "other").change(recorded) == ""
        shutil.copy(damaged / "train/cat/0.png", damaged / "train/cat/cut.png")
        inventory.forget()
        assert ImageFiles(dataset, tmp_path / "other").change(recorded) == "other files or contents"
    assert set(usable_images(dataset, tmp_path / "data", lines.append).left_out) == set(KINDS) - {"train/cat/cut.png"}


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_an_error_that_may_pass_is_no_fault_of_the_file(settings, image_folder, tmp_path, monkeypatch, number) -> None:
    path = image_folder(count=20)
    dataset = settings("image_folder", path=str(path), skip_unreadable=True)
    real, readings = Image.open, iter([OSError(number, os.strerror(number))])

    def once(file: Path, **options: object) -> Image.Image:
        if Path(file).name == "3.png" and (error := next(readings, None)):
            raise error
        return real(file, **options)

    monkeypatch.setattr("PIL.Image.open", once)
    with pytest.raises(UserError, match=r"3\.png cannot be read: .*\n.*not left out\.\nStart again"):
        usable_images(dataset, tmp_path, lambda line: None)
    assert not usable_images(dataset, tmp_path, lambda line: None).left_out


def test_a_validation_part_is_no_change_of_a_record_that_knows_of_none(settings, image_folder, tmp_path) -> None:
    dataset = settings("image_folder", path=str(image_folder()))
    recorded = ImageFiles(dataset, tmp_path / "data").describe()
    image_folder(parts=("val",))
    inventory.forget()
    now = ImageFiles(dataset, tmp_path / "data")
    assert now.change(recorded) == "20 images then, 30 now"
    del recorded["validation_images"]
    assert now.change(recorded) == ""
    assert now.change(recorded | {"listing": "", "contents": ""}) == "other files or contents"


def test_pipes_and_links_to_nothing_are_named_and_never_opened(damaged, settings) -> None:
    assert scan(damaged).no_files == {"train/dog/pipe.jpg", "test/cat/nowhere.png", "test/cat/zero.png"}
    with pytest.raises(UserError, match=r"test/cat/nowhere\.png cannot be read: it is a pipe(.|\n)* more cannot be"):
        check(settings("image_folder", path=str(damaged)), Path())
