"""Where the images come from. One function per kind of data set; all give the same `Source`."""

import hashlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normlab.common.errors import UserError
from normlab.config.schema import FolderDataset
from normlab.data import cache, inventory
from normlab.data.images import Decoder
from normlab.data.resident import Resident
from normlab.data.splits import stratified, without
from normlab.data.streaming import Files

Log = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """All images of a data set. In memory: uint8 (N, 3, H, W) on the CPU. Labels: int64 (N,) on the CPU."""

    classes: tuple[str, ...]
    image_size: int
    fingerprint: str
    train: Resident | Files
    train_labels: Tensor
    test: Resident | Files
    test_labels: Tensor


def digits() -> Source:
    """scikit-learn's 1,797 digits; grey values 0 to 16 become 0 to 240 (times 15, so exactly linear).

    The test set is one fixed stratified fifth, the same for every seed and every user.
    """
    table = _digits_table()
    grey = torch.from_numpy((table[:, :64] * 15).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(table[:, 64].astype(np.int64))
    test = stratified(labels, len(labels) // 5, "digits", "test")
    train = without(len(labels), test)
    images = grey.repeat(1, 3, 1, 1)
    return Source(
        classes=tuple("0123456789"),
        image_size=8,
        fingerprint=hashlib.sha256(table.tobytes()).hexdigest(),
        train=Resident(images[train]),
        train_labels=labels[train],
        test=Resident(images[test]),
        test_labels=labels[test],
    )


def _digits_table() -> np.ndarray[Any, np.dtype[np.float64]]:
    """(1797, 65): 64 pixels and the digit. Read from scikit-learn's own file where it is in its place,
    because importing scikit-learn takes a second and 100 MB that nothing else in a run needs.
    """
    package = importlib.util.find_spec("sklearn")
    folders = (package.submodule_search_locations if package else None) or []
    for file in (Path(folder) / "datasets" / "data" / "digits.csv.gz" for folder in folders):
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


def cifar(kind: str, data_dir: Path, log: Log) -> Source:
    """CIFAR through torchvision, which compares every file's checksum; downloaded if need be."""
    from torchvision import datasets

    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    with warnings.catch_warnings(action="ignore"):  # NumPy's remarks on arrays pickled so long ago
        try:
            train = reader(data_dir, train=True)
        except RuntimeError:  # not there, or not whole
            with cache.locked(data_dir / f"{kind}.lock", log):
                train = _download_cifar(reader, kind, data_dir, log)
        test = reader(data_dir, train=False)
    return Source(
        classes=tuple(train.classes),
        image_size=32,
        fingerprint=reader.tgz_md5,
        train=Resident(_planar(train.data)),
        train_labels=torch.tensor(train.targets),
        test=Resident(_planar(test.data)),
        test_labels=torch.tensor(test.targets),
    )


def _download_cifar(reader: Any, kind: str, data_dir: Path, log: Log) -> Any:
    """Fetch and unpack what another process has not fetched while this one waited for the lock."""
    from torchvision.datasets import utils

    title = inventory.CIFARS[kind].title

    @contextmanager
    def words(total: int | None = None, **options: Any) -> Iterator[SimpleNamespace]:
        of = f" of {total / 1e6:.0f}" if total else ""
        with cache.progress(log, lambda count: f"Downloading {title}: {count / 1e6:.0f}{of} MB") as advance:
            yield SimpleNamespace(update=advance)

    log(f"Preparing {title} in {data_dir}.")
    bar, utils.tqdm = utils.tqdm, words  # a bar is nothing for a log, and would land amid the lines about runs
    try:
        return reader(data_dir, train=True, download=True)
    except Exception as error:  # of the network, the archive, the disk: whatever urllib and tarfile meet
        reason = str(getattr(error, "reason", error))
        raise inventory.cifar_missing(kind, data_dir, reason) from None
    finally:
        utils.tqdm = bar


def _planar(images: np.ndarray[Any, Any]) -> Tensor:
    """(N, H, W, 3) as torchvision has it to (N, 3, H, W): a view back of what the files hold, no copy."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def resized(source: Source, size: int | None) -> Source:
    """Images in memory at another size, bilinear with antialiasing, as torchvision resizes tensors."""
    if size is None or size == source.image_size:
        return source
    from torchvision.transforms import functional

    def resize(images: Resident | Files) -> Resident:
        assert isinstance(images, Resident)
        parts = images.images.split(1000)  # in floating point on the way
        return Resident(torch.cat([functional.resize(part, [size, size], antialias=True) for part in parts]))

    return replace(source, image_size=size, train=resize(source.train), test=resize(source.test))


def folder(dataset: FolderDataset, data_dir: Path, seed: int, device: torch.device, log: Log) -> Source:
    """Images in ImageNet's layout, decoded into memory or streamed, with the same pixels either way."""
    root = Path(dataset.path).expanduser()
    names = _unpack_imagenet(root, log) if dataset.kind == "imagenet" else {}
    found = inventory.scan(root, ("val",) if dataset.kind == "imagenet" else ("test", "val"))
    size = dataset.image_size or inventory.common_size(found)
    decoder = Decoder(
        root,
        size,
        # The evaluation that goes with random resized crops sees the central 224/256 of an image.
        short_side=round(size * 256 / 224) if dataset.crop_scale else size,
        one_size=dataset.image_size is None,
        crop_scale=(dataset.crop_scale[0], dataset.crop_scale[1]) if dataset.crop_scale else None,
    )
    count, decoded_bytes = len(found.train), (len(found.train) + len(found.test)) * 3 * size**2
    streams = dataset.storage == "stream" or (
        dataset.storage == "auto" and (dataset.crop_scale is not None or decoded_bytes > dataset.memory_limit_gb * 1e9)
    )
    train: Resident | Files
    test: Resident | Files
    if streams:
        log(f"Streaming {count:,} training images from {root} with {dataset.workers} workers.")
        train, test = (Files(decoder, paths, seed, dataset.workers, device) for paths in (found.train, found.test))
        fingerprint = _fingerprint(found, with_sizes=dataset.kind != "imagenet")
    else:
        array, fingerprint = cache.decoded(decoder, [*found.train, *found.test], data_dir, log)
        images = torch.from_numpy(array)
        train, test = Resident(images[:count]), Resident(images[count:])
    return Source(
        classes=tuple(names.get(name, name) for name in found.classes),
        image_size=size,
        fingerprint=fingerprint,
        train=train,
        train_labels=torch.tensor(found.train_labels),
        test=test,
        test_labels=torch.tensor(found.test_labels),
    )


def _fingerprint(found: inventory.Listing, with_sizes: bool) -> str:
    """Of names and, if asked for, sizes: a set copied elsewhere stays itself. (A million sizes of ImageNet,
    whose content is known, would take minutes on a network's file system.)
    """
    digest = hashlib.sha256()
    for path in (*found.train, *found.test):
        digest.update(repr((path, (found.root / path).stat().st_size if with_sizes else 0)).encode())
    return digest.hexdigest()


def _unpack_imagenet(root: Path, log: Log) -> dict[str, str]:
    """Let torchvision unpack the archives on first use; the classes' names by their folders'."""
    from torchvision.datasets.imagenet import ImageNet, load_meta_file

    try:
        if not all((root / name).exists() for name in ("meta.bin", "train", "val")):
            with cache.locked(root / "normlab.lock", log):
                log(f"Unpacking ImageNet in {root}; this takes a while, once.")
                for split in ("train", "val"):
                    ImageNet(root, split)
        return {wnid: f"{names[0]} ({wnid})" for wnid, names in load_meta_file(root)[0].items()}
    except Exception as error:  # of the archives, the disk: whatever tarfile and torch.load meet
        raise UserError(f"ImageNet in {root} cannot be unpacked or read: {error}") from None
