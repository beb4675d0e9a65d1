"""The sources of images. One function per kind of data set; all return a `Source`."""

import hashlib
import importlib.util
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.imagenet import ImageNet, load_meta_file
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import functional

from normlab.common.download import fetch
from normlab.common.errors import UserError
from normlab.config.schema import ArrayDataset, FolderDataset
from normlab.data import arrays, cache, inventory
from normlab.data.cache import Log
from normlab.data.contents import known_contents_digest
from normlab.data.images import Decoder
from normlab.data.resident import Resident
from normlab.data.splits import stratified, without
from normlab.data.streaming import Files
from normlab.data.values import Values, find


@dataclass(frozen=True)
class Source:
    """All images of a data set. In memory: uint8 (N, 3, H, W) on the CPU. Labels: int64 (N,) on the CPU.

    Attributes:
        values: of images of more than 8 bits.
        val: of a validation part of its own, like `train`; None without.
        remarks: sentences about files that are left out.
    """

    classes: tuple[str, ...]
    image_size: int
    fingerprint: str
    train: Resident | Files
    train_labels: Tensor
    test: Resident | Files
    test_labels: Tensor
    values: Values = field(default_factory=Values)
    val: Resident | Files | None = None
    val_labels: Tensor | None = None
    remarks: tuple[str, ...] = ()


def digits() -> Source:
    """Read scikit-learn's 1,797 digits; gray values 0 to 16 become 0 to 240 (times 15, so exactly linear).

    The test set is one fixed stratified fifth, the same for every seed and every user.
    """
    table = _digits_table()
    gray = torch.from_numpy((table[:, :64] * 15).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(table[:, 64].astype(np.int64))
    test = stratified(labels, len(labels) // 5, "digits", "test")
    train = without(len(labels), test)
    images = gray.repeat(1, 3, 1, 1)
    fingerprint = hashlib.sha256(table.tobytes()).hexdigest()
    return _in_memory("0123456789", fingerprint, (images[train], labels[train]), (images[test], labels[test]))


def _in_memory(
    classes: Iterable[str], fingerprint: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> Source:
    """Return a source of (images, labels) to train on and to test on."""
    (images, labels), (test_images, test_labels) = train, test
    size = images.shape[-1]
    return Source(tuple(classes), size, fingerprint, Resident(images), labels, Resident(test_images), test_labels)


def _digits_table() -> NDArray[np.float64]:
    """Read 64 pixels and the digit of each image, (1797, 65).

    From scikit-learn's own file where it is in its place, because importing scikit-learn takes a second and 100 MB
    that nothing else in a run needs.
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
    """Read CIFAR through torchvision, which compares every file's checksum; downloaded if need be.

    Raises:
        UserError: it is not complete and cannot be downloaded, or `data_dir` cannot be written.
    """
    reader = {"cifar10": CIFAR10, "cifar100": CIFAR100}[kind]
    with warnings.catch_warnings(action="ignore"):  # NumPy's remarks on arrays pickled so long ago
        try:
            train = reader(data_dir, train=True)
        except RuntimeError:  # not there, or not whole
            with cache.locked(data_dir / f"{kind}.lock", log):
                train = _download_cifar(reader, kind, data_dir, log)
        test = reader(data_dir, train=False)
    return _in_memory(train.classes, reader.tgz_md5, _images_and_labels(train), _images_and_labels(test))


def _images_and_labels(part: CIFAR10) -> tuple[Tensor, Tensor]:
    # From (N, H, W, 3) as torchvision has it back to the layout of the files, so without a copy.
    return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)


def _download_cifar(reader: type[CIFAR10], kind: str, data_dir: Path, log: Log) -> CIFAR10:
    """Download, unless another process did while this one waited for the lock, and let torchvision unpack."""
    title, archive = inventory.CIFARS[kind].title, data_dir / reader.filename
    log(f"Preparing {title} in {data_dir}.")
    try:
        if not check_integrity(archive, reader.tgz_md5):
            fetch(reader.url, archive, title, log)
        return reader(data_dir, train=True, download=True)
    except Exception as error:  # of the network, the archive, the disk: whatever urllib and tarfile meet
        raise inventory.cifar_missing(kind, data_dir, str(getattr(error, "reason", error))) from None


def resized(source: Source, size: int | None) -> Source:
    """Resize images in memory, bilinear with antialiasing, as torchvision resizes tensors."""
    if size is None or size == source.image_size:
        return source

    def resize(images: Resident | Files) -> Resident:
        assert isinstance(images, Resident)
        parts = torch.split(images.images, 1000)  # in floating point on the way
        return Resident(torch.cat([functional.resize(part, [size, size], antialias=True) for part in parts]))

    val = None if source.val is None else resize(source.val)
    return replace(source, image_size=size, train=resize(source.train), test=resize(source.test), val=val)


def of_arrays(dataset: ArrayDataset, data_dir: Path, log: Log) -> Source:
    """Read a user's own arrays; gray images get three equal channels.

    Raises:
        UserError: they are others than expected, or cannot be read.
    """
    path = Path(dataset.path).expanduser()
    found = arrays.scan(path)
    fingerprint = known_contents_digest(found.root, found.paths, data_dir, log)
    parts = {}
    for part, place in found.images.items():
        images = torch.from_numpy(arrays.read(place))
        images = images.view(*images.shape[:3], -1).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()
        if len(images) != len(found.labels[part]) or images.shape[-1] != found.image_size:
            raise UserError(f"{place} changed while it was read.\nStart again.")
        if images.eq(images[0, 0, 0, 0]).all():
            raise UserError(
                f"All pixels of {place} are {images[0, 0, 0, 0]}.\n255 is white; of 1, write np.round(255 * x)."
            )
        parts[part] = images, torch.from_numpy(found.labels[part])
    if "test" not in parts:
        images, labels = parts["train"]
        test = stratified(labels, arrays.check_split(found, path, dataset.test_fraction), dataset.split_seed, "test")
        train = without(len(labels), test)
        parts = {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
    source = _in_memory(found.classes, fingerprint, parts["train"], parts["test"])
    if "val" not in parts:
        return source
    return replace(source, val=Resident(parts["val"][0]), val_labels=parts["val"][1])


def folder(dataset: FolderDataset, data_dir: Path, seed: int, device: torch.device, log: Log) -> Source:
    """Decode the images of a folder into memory, or prepare to stream them; the same pixels either way.

    Raises:
        UserError: the layout is another, a file cannot be read, or `data_dir` cannot be written.
    """
    root = Path(dataset.path).expanduser()
    names = _unpack_imagenet(root, log) if dataset.kind == "imagenet" else {}
    listing = inventory.usable_images(dataset, data_dir, log)
    paths = list(listing.paths)
    if dataset.kind == "imagenet":  # a million files whose content is known are not read for a digest
        contents, chosen = _names_digest(paths), dataset.value_range
        values = Values((chosen[0], chosen[1]) if chosen else None)
    else:
        contents = known_contents_digest(root, paths, data_dir, log)
        values = find(listing, dataset.value_range, contents, data_dir, log)
    size = dataset.image_size or inventory.common_size(listing)
    decoder = Decoder(
        root,
        size,
        # The evaluation that goes with random resized crops sees the central 224/256 of an image.
        short_side=round(size * 256 / 224) if dataset.crop_scale else size,
        one_size=dataset.image_size is None,
        crop_scale=(dataset.crop_scale[0], dataset.crop_scale[1]) if dataset.crop_scale else None,
        value_range=values.value_range,
    )
    parts = (listing.train, listing.test, listing.val)
    decoded_bytes = len(paths) * 3 * size**2
    streams = dataset.storage == "stream" or (
        dataset.storage == "auto" and (dataset.crop_scale is not None or decoded_bytes > dataset.memory_limit_gb * 1e9)
    )
    loaded: list[Resident | Files]
    if streams:
        log(f"Streaming {len(listing.train):,} training images from {root} with {dataset.workers} workers.")
        loaded = [Files(decoder, part, seed, dataset.workers, device) for part in parts]
        fingerprint = contents
    else:
        array, fingerprint = cache.decoded(decoder, paths, data_dir, log)
        loaded = [Resident(images) for images in torch.split(torch.from_numpy(array), [len(part) for part in parts])]
    train, test, val = loaded
    return Source(
        classes=tuple(names.get(name, name) for name in listing.classes),
        image_size=size,
        fingerprint=fingerprint,
        train=train,
        train_labels=torch.tensor(listing.train_labels),
        test=test,
        test_labels=torch.tensor(listing.test_labels),
        values=values,
        val=val if listing.val else None,
        val_labels=torch.tensor(listing.val_labels, dtype=torch.int64) if listing.val else None,
        remarks=inventory.remarks(listing),
    )


def _names_digest(paths: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(repr((path, 0)).encode())
    return digest.hexdigest()


def _unpack_imagenet(root: Path, log: Log) -> dict[str, str]:
    """Let torchvision unpack the archives on first use, and return the classes' names by their folders'."""
    try:
        if not all((root / name).exists() for name in inventory.IMAGENET_ARCHIVES):
            with cache.locked(root / "normlab.lock", log):
                log(f"Unpacking ImageNet in {root}; this takes a while, once.")
                for split in ("train", "val"):
                    ImageNet(root, split)
        return {wnid: f"{names[0]} ({wnid})" for wnid, names in load_meta_file(root)[0].items()}
    except Exception as error:  # of the archives, the disk: whatever tarfile and torch.load meet
        raise UserError(f"ImageNet in {root} cannot be unpacked or read: {error}") from None
