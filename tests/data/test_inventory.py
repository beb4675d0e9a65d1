import http.server
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from torchvision import datasets

from normlab.common.errors import UserError
from normlab.config.schema import BuiltinDataset, FolderDataset
from normlab.data import inventory
from normlab.data.inventory import Inventory, check, scan

Settings = Callable[..., BuiltinDataset | FolderDataset]
Folder = Callable[..., Path]


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    urllib.request.install_opener(None)  # it keeps the proxies that it was made with
    for cached in (inventory.scan, inventory.common_size, inventory.unreachable):
        cached.cache_clear()


def refused(dataset: BuiltinDataset | FolderDataset, data_dir: Path = Path("absent")) -> str:
    with pytest.raises(UserError) as caught:
        check(dataset, data_dir)
    message = str(caught.value)
    assert len(message.splitlines()) <= 5
    return message


def test_needs_no_torch() -> None:
    code = "import sys, normlab.data.inventory; print(sorted({'torch', 'torchvision', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_digits(settings: Settings) -> None:
    assert check(settings("digits"), Path("absent")) == Inventory(1438, 359, 10, 8)


def test_a_folder(settings: Settings, image_folder: Folder) -> None:
    found = check(settings("image_folder", path=str(image_folder())), Path("absent"))
    assert found == Inventory(train_images=10, test_images=10, classes=2, image_size=8)


def test_train_images_are_those_left_after_validation_and_subset(settings: Settings) -> None:
    assert check(settings("digits", val_size=100), Path()).train_images == 1338
    assert check(settings("digits", val_size=100, train_size=500), Path()).train_images == 500


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
def test_a_subset_that_does_not_fit_is_refused_with_the_nearest_that_does(
    settings: Settings, changes: dict[str, int], fix: str
) -> None:
    message = refused(settings("digits", **changes))
    assert f"Nearest valid: {fix}" in message
    assert next(iter(changes)) in message


# --- Folders ----------------------------------------------------------------------------------------


def test_a_missing_folder_is_named_with_its_likely_name(settings: Settings, image_folder: Folder) -> None:
    path = image_folder("imagenette")
    message = refused(settings("image_folder", path=str(path.with_name("imagenete"))))
    assert "does not exist" in message
    assert f"did you mean {path}?" in message


def test_a_file_instead_of_a_folder(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "images.zip").touch()
    assert "is a file" in refused(settings("image_folder", path=str(tmp_path / "images.zip")))


def test_an_empty_folder(settings: Settings, tmp_path: Path) -> None:
    assert "has no folders in it" in refused(settings("image_folder", path=str(tmp_path)))


@pytest.mark.parametrize(("part", "named"), [("train", "no folder train"), ("test", "no folder test or val")])
def test_a_missing_part(settings: Settings, image_folder: Folder, part: str, named: str) -> None:
    path = image_folder()
    shutil.rmtree(path / part)
    assert named in refused(settings("image_folder", path=str(path)))


def test_a_part_without_classes(settings: Settings, image_folder: Folder) -> None:
    path = image_folder()
    shutil.rmtree(path / "test")
    (path / "test").mkdir()
    assert "no class folders" in refused(settings("image_folder", path=str(path)))


def test_classes_that_differ_are_named(settings: Settings, image_folder: Folder) -> None:
    path = image_folder(classes=("cat", "dog", "emu"))
    (path / "train" / "emu").rename(path / "train" / "owl")
    message = refused(settings("image_folder", path=str(path)))
    assert "Only in train: owl." in message
    assert "Only in test: emu." in message


def test_a_class_without_images_is_named(settings: Settings, image_folder: Folder) -> None:
    path = image_folder()
    shutil.rmtree(path / "train" / "cat")
    (path / "train" / "cat").mkdir()
    (path / "train" / "cat" / "notes.txt").touch()
    message = refused(settings("image_folder", path=str(path)))
    assert "without images" in message
    assert "cat" in message


def test_sizes_that_differ_need_an_image_size(settings: Settings, image_folder: Folder) -> None:
    path = image_folder(sizes=((8, 8), (12, 10), (12, 14)))
    assert "dataset.image_size=" in refused(settings("image_folder", path=str(path)))
    assert check(settings("image_folder", path=str(path), image_size=8), Path()).image_size == 8


def test_rectangles_need_an_image_size(settings: Settings, image_folder: Folder) -> None:
    path = image_folder(sizes=((12, 10),))
    assert "dataset.image_size=10" in refused(settings("image_folder", path=str(path)))


def test_val_stands_in_for_test(image_folder: Folder) -> None:
    assert scan(image_folder(parts=("train", "val"))).test[0] == "val/cat/0.png"


def test_hidden_and_other_files_are_passed_over_and_folders_entered(image_folder: Folder) -> None:
    path = image_folder(count=1)
    for name in (".DS_Store", "._0.png", "labels.txt"):
        (path / "train" / "cat" / name).touch()
    (path / "train" / ".ipynb_checkpoints").mkdir()
    (path / "train" / "dog" / "deeper").mkdir()
    shutil.copy(path / "train" / "dog" / "0.png", path / "train" / "dog" / "deeper" / "1.PNG")
    found = scan(path)
    assert found.train == ("train/cat/0.png", "train/dog/0.png", "train/dog/deeper/1.PNG")
    assert found.train_labels == (0, 1, 1)


def test_the_listing_equals_torchvisions(image_folder: Folder) -> None:
    path = image_folder(count=12, classes=("b", "a", "c"))
    found, oracle = scan(path), datasets.ImageFolder(path / "train")
    assert list(found.classes) == oracle.classes
    assert [str(path / name) for name in found.train] == [name for name, _ in oracle.samples]
    assert list(found.train_labels) == oracle.targets


def test_a_sweep_looks_once(settings: Settings, image_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = settings("image_folder", path=str(image_folder()))
    found = check(dataset, Path())
    monkeypatch.setattr("os.scandir", lambda path: pytest.fail("looked again"))
    monkeypatch.setattr("PIL.Image.open", lambda path: pytest.fail("opened again"))
    assert [check(dataset, Path()) for _ in range(12)] == [found] * 12


# --- CIFAR and ImageNet -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "reader"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
def test_cifars_files_are_torchvisions(kind: str, reader: type[datasets.CIFAR10]) -> None:
    cifar = inventory.CIFARS[kind]
    assert cifar.url == reader.url
    assert cifar.archive == reader.filename
    assert cifar.folder == reader.base_folder
    names = [name for name, _ in [*reader.train_list, *reader.test_list]]
    assert sorted(cifar.files) == sorted([*names, reader.meta["filename"]])


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_without_files_or_network_says_where_they_go(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    message = refused(settings(kind), tmp_path)
    assert str(tmp_path) in message
    assert inventory.CIFARS[kind].archive in message
    assert "dataset=digits" in message


def test_cifar_in_its_place_needs_no_network(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_host_that_answers_is_reachable_also_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert inventory.unreachable(f"{address}/file") is None
        urllib.request.install_opener(None)
        monkeypatch.setenv("http_proxy", address)
        assert inventory.unreachable("http://nowhere.invalid/file") is None
        server.shutdown()


def test_a_host_that_is_silent_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "ANSWER_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.perf_counter()
        assert inventory.unreachable(f"http://127.0.0.1:{silent.getsockname()[1]}/file")
    assert time.perf_counter() - started < 2


def test_imagenet_without_its_files_says_which_go_where(settings: Settings, tmp_path: Path) -> None:
    message = refused(settings("imagenet", path=str(tmp_path / "imagenet"), image_size=224))
    assert str(tmp_path / "imagenet") in message
    for archive in ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        assert archive in message


def test_imagenet_before_it_is_unpacked_has_its_known_size(settings: Settings, tmp_path: Path) -> None:
    for archive in inventory.IMAGENET_ARCHIVES.values():
        (tmp_path / archive).touch()
    dataset = settings("imagenet", path=str(tmp_path), image_size=224, val_size=1167)
    assert check(dataset, Path()) == Inventory(1_280_000, 50_000, 1000, 224)


def test_imagenets_file_names_are_torchvisions() -> None:
    from torchvision.datasets.imagenet import ARCHIVE_META

    assert set(inventory.IMAGENET_ARCHIVES.values()) == {name for name, _ in ARCHIVE_META.values()}
