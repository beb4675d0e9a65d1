import hashlib
import http.server
import pickle
import tarfile
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from normlab.common.download import fetch
from normlab.common.errors import UserError
from normlab.data import inventory, sources
from normlab.data.inventory import check

# --- digits -----------------------------------------------------------------------------------------


def test_digits_are_scikit_learns(monkeypatch) -> None:
    bunch = load_digits()
    table = sources._digits_table()
    assert np.array_equal(table[:, :64], bunch.data)
    assert np.array_equal(table[:, 64], bunch.target)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert np.array_equal(sources._digits_table(), table), "without its file in its place"


def test_digits_pixels_are_linear_in_the_gray_values_and_splits_what_the_inventory_knows(settings) -> None:
    source, known = sources.digits(), check(settings("digits"), Path())
    everything = torch.cat([source.train.images, source.test.images])  # type: ignore[union-attr]
    assert everything.dtype == torch.uint8
    assert everything.shape == (1797, 3, 8, 8)
    assert everything.unique().tolist() == [15 * gray for gray in range(17)]
    assert torch.equal(everything[:, 0], everything[:, 2])
    assert len(source.train_labels) == known.train_images == 1438
    assert len(source.test_labels) == 359
    assert len(source.classes) == known.classes
    shares = torch.bincount(source.test_labels) / torch.bincount(torch.cat([source.train_labels, source.test_labels]))
    assert (shares - 0.2).abs().max() < 0.005


# --- CIFAR ------------------------------------------------------------------------------------------


class _OldDtype:
    """Pickled as NumPy 1 under Python 2 pickled a dtype, which NumPy 2.4 remarks on."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("u1", 0, 1)


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data_dir with an archive of 20 training and 10 test images, whose checksums torchvision is told."""
    draw = np.random.default_rng(0)
    made = tmp_path / "made" / "cifar-10-batches-py"
    made.mkdir(parents=True)

    def md5(name: str, content: dict[str, Any]) -> str:
        (made / name).write_bytes(pickle.dumps(content | {"old": _OldDtype()}))
        return hashlib.md5((made / name).read_bytes()).hexdigest()

    def batch() -> dict[str, Any]:
        pixels = draw.integers(0, 256, (10, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": list(range(10))}

    reader = datasets.CIFAR10
    names = {"label_names": [f"class{n}" for n in range(10)]}
    monkeypatch.setattr(reader, "meta", reader.meta | {"md5": md5("batches.meta", names)})
    monkeypatch.setattr(reader, "train_list", [[n, md5(n, batch())] for n in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(reader, "test_list", [["test_batch", md5("test_batch", batch())]])
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    with tarfile.open(data_dir / reader.filename, "w:gz") as archive:
        archive.add(made, made.name)
    monkeypatch.setattr(reader, "tgz_md5", hashlib.md5((data_dir / reader.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(reader, "url", f"http://127.0.0.1:9/{reader.filename}")  # nothing listens there
    return data_dir


def test_cifar_is_unpacked_from_its_archive_once_and_without_a_network(small_cifar, load_it, monkeypatch) -> None:
    data = load_it("cifar10", input_norm="none")
    assert (len(data.train), len(data.test), data.image_size) == (20, 10, 32)
    assert data.classes[3] == "class3"
    pickled = pickle.loads((small_cifar / "cifar-10-batches-py" / "test_batch").read_bytes())
    images, labels = next(data.test.batches())
    assert torch.equal(images, torch.from_numpy(pickled["data"]).view(10, 3, 32, 32) / 255)
    assert labels.tolist() == pickled["labels"]
    assert images.is_contiguous()
    monkeypatch.setattr(sources, "_download_cifar", lambda *a: pytest.fail("unpacked again"))
    load_it("cifar10")


def test_a_download_that_is_cut_short_leaves_nothing(tmp_path) -> None:
    class Cut(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "9")
            self.end_headers()
            self.wfile.write(b"half")

    with http.server.HTTPServer(("127.0.0.1", 0), Cut) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(OSError, match="4 of 9 bytes came"):
            fetch(f"http://127.0.0.1:{server.server_port}", tmp_path / "file", "it", lambda line: None)
        server.shutdown()
    assert not any(tmp_path.iterdir())


def test_cifar_is_downloaded_with_its_progress_in_the_log(small_cifar, tmp_path, monkeypatch, capsys) -> None:
    served = partial(http.server.SimpleHTTPRequestHandler, directory=str(small_cifar))
    lines: list[str] = []
    monkeypatch.setattr("normlab.common.download.PROGRESS_SECONDS", 0.0)
    with http.server.HTTPServer(("127.0.0.1", 0), served) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reader = datasets.CIFAR10
        monkeypatch.setattr(reader, "url", f"http://127.0.0.1:{server.server_port}/{reader.filename}")
        source = sources.cifar("cifar10", tmp_path / "empty", lines.append)
        server.shutdown()
    assert (len(source.train_labels), len(source.test_labels)) == (20, 10)
    assert [line for line in lines if line.startswith("Downloading")] == ["Downloading CIFAR-10: 0 of 0 MB"] * 2
    assert "%" not in capsys.readouterr().err  # no bar


@pytest.mark.parametrize("damage", ["archive cut", "file cut and no archive"])
def test_a_damaged_cifar_without_a_network_says_where_files_go(small_cifar, load_it, monkeypatch, damage) -> None:
    archive = small_cifar / datasets.CIFAR10.filename
    if damage == "archive cut":
        archive.write_bytes(archive.read_bytes()[:-100])
    else:
        load_it("cifar10")
        archive.unlink()
        (small_cifar / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"")
        monkeypatch.setattr(inventory, "unreachable", lambda url: None)
    with pytest.raises(UserError) as caught:
        load_it("cifar10")
    message = str(caught.value)
    for words in ("cifar-10-python.tar.gz", str(small_cifar), "dataset=digits", "refused"):
        assert words in message
    assert len(message.splitlines()) <= 5


def test_a_data_dir_for_cifar_that_cannot_be_written(tmp_path, load_it, monkeypatch) -> None:
    monkeypatch.setattr(inventory, "unreachable", lambda url: None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="data_dir="):
        load_it("cifar10", data_dir=tmp_path / "file" / "data")


# --- ImageNet ---------------------------------------------------------------------------------------


@pytest.fixture
def small_imagenet(tmp_path: Path) -> Path:
    """A folder as torchvision leaves it: two classes of three images, the names in meta.bin."""
    root = tmp_path / "imagenet"
    for part in ("train", "val"):
        for number, wnid in enumerate(("n01440764", "n02102040")):
            (root / part / wnid).mkdir(parents=True)
            for image in range(3):
                Image.new("RGB", (30, 20), (number * 100, image * 50, 0)).save(
                    root / part / wnid / f"{part}_{image}.JPEG"
                )
    names = {"n01440764": ("tench", "Tinca tinca"), "n02102040": ("English springer",)}
    torch.save((names, ["n01440764", "n02102040"]), root / "meta.bin")
    return root


def test_imagenet_is_torchvisions(small_imagenet, load_it) -> None:
    data = load_it("imagenet", path=str(small_imagenet), image_size=14, input_norm="none", crop_scale=[0.5, 1.0])
    oracle = datasets.ImageNet(small_imagenet, "val")
    assert data.classes == ("tench (n01440764)", "English springer (n02102040)")
    images, labels = next(data.test.batches())
    assert labels.tolist() == oracle.targets
    for image, (path, _) in zip(images, oracle.samples, strict=True):
        color = torch.tensor(Image.open(path).getpixel((0, 0))) / 255
        assert torch.allclose(image, color.view(3, 1, 1).expand(3, 14, 14))
    assert sum(len(labels) for _, labels in data.train.batches(0)) == len(datasets.ImageNet(small_imagenet)) == 6


@pytest.mark.parametrize("left", ["train/n02102041.tar", "val/ILSVRC2012_val_00000001.JPEG"])
def test_imagenet_that_is_unpacked_in_part_is_refused(small_imagenet, load_it, left) -> None:
    (small_imagenet / left).touch()
    with pytest.raises(UserError, match=f"unpacked in part: .*{left}"):
        load_it("imagenet", path=str(small_imagenet), image_size=14)


def test_a_broken_archive_of_imagenet_is_a_sentence(tmp_path, load_it) -> None:
    root = tmp_path / "imagenet"
    root.mkdir()
    for archive in inventory.IMAGENET_ARCHIVES.values():
        (root / archive).write_bytes(b"half of it")
    with pytest.raises(UserError, match="ILSVRC2012_devkit_t12"):
        load_it("imagenet", path=str(root), image_size=14)


def test_images_of_another_size_are_those_of_pillow(make) -> None:
    """Pillow's bilinear filter is the same antialiased triangle, computed in fixed point."""
    config = make("dataset.image_size=5")
    source = sources.digits()
    small = sources.resized(source, config.dataset.image_size)
    assert sources.resized(source, 8) is sources.resized(source, None) is source
    assert small.image_size == 5
    assert small.train.images.shape == (1438, 3, 5, 5)
    assert torch.equal(small.test_labels, source.test_labels)
    for found, image in zip(small.train.images[:50], source.train.images[:50], strict=True):
        expected = Image.fromarray(image[0].numpy()).resize((5, 5), Image.Resampling.BILINEAR)
        assert (found[0].int() - torch.from_numpy(np.array(expected)).int()).abs().max() <= 1
