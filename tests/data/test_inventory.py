import http.server
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from torchvision import datasets

from normlab.common.errors import UserError
from normlab.config.schema import BuiltinDataset, FolderDataset
from normlab.data import inventory
from normlab.data.folders import images_of, scan
from normlab.data.inventory import Inventory, check


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    urllib.request.install_opener(None)  # it keeps the proxies that it was made with
    inventory.forget()
    inventory.unreachable.cache_clear()


def refused(dataset: BuiltinDataset | FolderDataset, data_dir: Path = Path("absent")) -> str:
    with pytest.raises(UserError) as caught:
        check(dataset, data_dir)
    message = str(caught.value)
    assert len(message.splitlines()) <= 5
    return message


def test_needs_no_torch() -> None:
    code = "import sys, normlab.data.inventory; print(sorted({'torch', 'torchvision', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_known_set_and_a_folder_are_counted(settings, image_folder) -> None:
    assert check(settings("digits"), Path("absent")) == Inventory(1438, 359, 10, 8)
    assert check(settings("digits", val_size=100), Path()).train_images == 1338
    assert check(settings("digits", val_size=100, train_size=500), Path()).train_images == 500
    found = check(settings("image_folder", path=str(image_folder())), Path("absent"))
    assert found == Inventory(train_images=10, test_images=10, classes=2, image_size=8)


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"train_size": 1439}, "dataset.train_size=1438"),
        ({"train_size": 9}, "dataset.train_size=10"),
        ({"train_size": 1400, "val_size": 100}, "dataset.train_size=1338"),
        ({"test_size": 360}, "dataset.test_size=359"),
        ({"test_size": 3}, "dataset.test_size=10"),
        ({"val_size": 1430}, "dataset.val_size=1428"),
        ({"val_size": 5}, "dataset.val_size=10"),
    ],
)
def test_a_subset_that_does_not_fit_is_refused_with_the_nearest_that_does(settings, changes, fix) -> None:
    message = refused(settings("digits", **changes))
    assert f"Nearest valid: {fix}" in message
    assert next(iter(changes)) in message


# --- Folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("mv images imagenes", "/imagenes?"),
        ("rm -r images; touch images", "is a file"),
        ("rm -r images/*", "has no folders in it"),
        ("rm -r images/train", "no folder train"),
        ("rm -r images/test", "no folder test or val"),
        ("rm -r images/test/*", "no class folders"),
        ("mv images/train/cat images/train/owl", "Only in train: owl.\nOnly in test: cat."),
        ("rm images/train/cat/*; touch images/train/cat/notes.txt", "/train: cat."),
    ],
)
def test_a_folder_that_is_no_data_set_is_refused_in_a_sentence(settings, image_folder, tmp_path, change, words) -> None:
    path = image_folder()
    subprocess.run(["sh", "-c", change], cwd=tmp_path, check=True)
    assert words in refused(settings("image_folder", path=str(path)))


def test_sizes_that_differ_and_rectangles_need_an_image_size(settings, image_folder) -> None:
    path = image_folder(sizes=((8, 8), (12, 10), (12, 14)))
    assert "dataset.image_size=" in refused(settings("image_folder", path=str(path)))
    assert check(settings("image_folder", path=str(path), image_size=8), Path()).image_size == 8
    path = image_folder("rectangles", sizes=((12, 10),))
    assert "dataset.image_size=10" in refused(settings("image_folder", path=str(path)))


def test_hidden_and_other_files_are_passed_over_and_folders_entered(image_folder) -> None:
    path = image_folder(count=1, parts=("train", "val"))
    for name in (".DS_Store", "._0.png", "labels.txt", "Thumbs.db"):
        (path / "train" / "cat" / name).touch()
    for name in ("@eaDir", ".thumbnails", "__MACOSX", ".ipynb_checkpoints", "#recycle", "$RECYCLE.BIN", "lost+found"):
        for above in (path, path / "train", path / "train" / "cat", path / "val" / "dog"):
            (above / name / "0.png").mkdir(parents=True)
            shutil.copy(path / "train" / "dog" / "0.png", above / name / "0.png" / "SYNOPHOTO_THUMB_M.png")
            shutil.copy(path / "train" / "dog" / "0.png", above / name / "1.png")
    (path / "train" / "dog" / "deeper").mkdir()
    shutil.copy(path / "train" / "dog" / "0.png", path / "train" / "dog" / "deeper" / "1.PNG")
    found = images_of(scan(path), None, 0)
    assert found.train == ("train/cat/0.png", "train/dog/0.png", "train/dog/deeper/1.PNG")
    assert found.train_labels == (0, 1, 1)
    assert found.test == ("val/cat/0.png", "val/dog/0.png")


def test_a_single_class_is_refused(settings, image_folder) -> None:
    path = image_folder(classes=("photos",))
    assert "a single class, photos" in refused(settings("image_folder", path=str(path)))


def test_sizes_are_those_that_are_shown(settings, image_folder) -> None:
    path = image_folder(sizes=((8, 12),))
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in (0, 2):  # 8x12 all, as they are shown
        Image.new("RGB", (12, 8)).save(path / "train" / "cat" / f"{number}.png", exif=exif)
    assert "all are 8x12 pixels" in refused(settings("image_folder", path=str(path)))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".bmp", ".tif", ".ppm"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "link to nothing"])
def test_damaged_images_are_named_before_a_run(settings, image_folder, suffix, damage) -> None:
    path = image_folder(count=1)
    for number in range(30):
        file = path / "test" / "cat" / f"{number:02}{suffix}"
        Image.new("RGB", (8, 8), (number, 200, 9)).save(file)
        if number in (7, 20):
            content = {"cut": file.read_bytes()[:-30], "empty": b"", "text": b"no image"}.get(damage)
            file.unlink()
            file.symlink_to("nowhere") if content is None else file.write_bytes(content)
    message = refused(settings("image_folder", path=str(path), image_size=8))
    assert f"test/cat/07{suffix} cannot be read" in message
    assert damage != "empty" or "it is empty" in message
    assert f"1 more cannot be read, e.g. test/cat/20{suffix}" in message


def test_what_follows_an_images_end_is_no_damage(settings, image_folder) -> None:
    path = image_folder(count=1)
    for suffix in (".jpg", ".png", ".gif", ".webp", ".bmp"):
        file = path / "train" / "cat" / f"more{suffix}"
        Image.new("RGB", (8, 8)).save(file)
        file.write_bytes(file.read_bytes() + bytes(300) + b"trailer")
    assert check(settings("image_folder", path=str(path)), Path()).train_images == 7


def test_the_listing_equals_torchvisions(image_folder) -> None:
    path = image_folder(count=12, classes=("b", "a", "c"))
    found, oracle = images_of(scan(path), None, 0), datasets.ImageFolder(path / "train")
    assert list(found.classes) == oracle.classes
    assert [str(path / name) for name in found.train] == [name for name, _ in oracle.samples]
    assert list(found.train_labels) == oracle.targets


@pytest.mark.parametrize("skip_unreadable", [False, True])
def test_a_sweep_looks_once(settings, image_folder, tmp_path, monkeypatch, skip_unreadable) -> None:
    dataset = settings("image_folder", path=str(image_folder()), skip_unreadable=skip_unreadable)
    inventory.usable_images(dataset, tmp_path, lambda line: None)
    found = check(dataset, tmp_path)
    monkeypatch.setattr("normlab.data.unreadable.listing_digest", lambda *_, **__: pytest.fail("listed again"))
    monkeypatch.setattr("os.scandir", lambda path: pytest.fail("looked again"))
    monkeypatch.setattr("PIL.Image.open", lambda path: pytest.fail("opened again"))
    assert [check(dataset, tmp_path) for _ in range(12)] == [found] * 12


# --- CIFAR and ImageNet -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "reader"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
def test_cifars_files_are_torchvisions(kind, reader) -> None:
    cifar = inventory.CIFARS[kind]
    assert cifar.url == reader.url
    assert cifar.archive == reader.filename
    assert cifar.folder == reader.base_folder
    names = [name for name, _ in [*reader.train_list, *reader.test_list]]
    assert sorted(cifar.files) == sorted([*names, reader.meta["filename"]])


def test_cifar_without_files_or_network_says_where_they_go(settings, tmp_path, monkeypatch) -> None:
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    message = refused(settings("cifar100"), tmp_path)
    assert all(words in message for words in (str(tmp_path), inventory.CIFARS["cifar100"].archive, "dataset=digits"))


def test_cifar_in_its_place_needs_no_network(settings, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(inventory, "unreachable", lambda url: pytest.fail("the network was asked"))
    (tmp_path / "cifar-10-python.tar.gz").touch()
    assert check(settings("cifar10"), tmp_path) == Inventory(50_000, 10_000, 10, 32)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in inventory.CIFARS["cifar100"].files:
        (folder / name).touch()
    assert check(settings("cifar100"), tmp_path) == Inventory(50_000, 10_000, 100, 32)


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_a_host_that_answers_is_reachable_also_through_a_proxy(monkeypatch) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert inventory.unreachable(f"{address}/file") is None
        urllib.request.install_opener(None)
        monkeypatch.setenv("http_proxy", address)
        assert inventory.unreachable("http://nowhere.invalid/file") is None
        server.shutdown()


def test_a_host_that_is_silent_is_given_up_in_time(monkeypatch) -> None:
    monkeypatch.setattr("normlab.common.download.ANSWER_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.perf_counter()
        assert inventory.unreachable(f"http://127.0.0.1:{silent.getsockname()[1]}/file")
    assert time.perf_counter() - started < 2


def test_imagenet_without_its_files_says_which_go_where(settings, tmp_path) -> None:
    dataset = settings("imagenet", path=str(tmp_path / "imagenet"), image_size=224, val_size=1167)
    message = refused(dataset)
    (tmp_path / "imagenet").mkdir()
    for archive in inventory.IMAGENET_ARCHIVES.values():
        assert archive in message
        (tmp_path / "imagenet" / archive).touch()
    assert str(tmp_path / "imagenet") in message
    assert check(dataset, Path()) == Inventory(1_280_000, 50_000, 1000, 224, 1167), "known before it is unpacked"


def test_imagenets_file_names_are_torchvisions() -> None:
    from torchvision.datasets.imagenet import ARCHIVE_META

    assert set(inventory.IMAGENET_ARCHIVES.values()) == {name for name, _ in ARCHIVE_META.values()}
