"""From a data set's settings to its batches."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normlab.config import BuiltinDataset, FolderDataset
from normlab.data import inventory, sources
from normlab.data.batches import Augmentation, Split, standardisation, unit_interval
from normlab.data.resident import Resident
from normlab.data.splits import stratified, training_rows
from normlab.data.streaming import Files


@dataclass(frozen=True)
class Data:
    """`fingerprint` names the content, so that a run is not resumed on other data."""

    classes: tuple[str, ...]
    image_size: int
    fingerprint: str
    train: Split
    test: Split
    val: Split | None


def load(
    dataset: BuiltinDataset | FolderDataset,
    *,
    data_dir: Path,
    seed: int,
    batch: int,
    eval_batch: int,
    drop_last: bool,
    input_norm: str,
    device: torch.device,
    log: Callable[[str], None],
) -> Data:
    """Read, download, decode or prepare to stream a data set, and split it.

    Images in memory are put on `device` once. `input_norm`: "dataset" or "none", as in `conf/config.yaml`.

    Raises:
        UserError: the data is missing, incomplete or unusable, or a subset does not fit it.
    """
    data_dir = data_dir.expanduser()
    inventory.scan.cache_clear()  # what counts from now on is what is there now
    inventory.check(dataset, data_dir)
    if isinstance(dataset, FolderDataset):
        source = sources.folder(dataset, data_dir, seed, device, log)
    elif dataset.kind == "digits":
        source = sources.digits()
    else:
        source = sources.cifar(dataset.kind, data_dir, log)

    rows, val_rows = training_rows(source.train_labels, dataset.train_size, dataset.val_size, dataset.split_seed)
    test_rows = stratified(source.test_labels, dataset.test_size, dataset.split_seed, "test")
    of_the_set = input_norm == "dataset"
    normalisation = standardisation(source.train, rows, device) if of_the_set else unit_interval(device)

    def split(images: Resident | Files, labels: Tensor, chosen: Tensor, **settings: Any) -> Split:
        labels = labels[chosen]
        if isinstance(images, Resident) and device.type != "cpu":  # only what is used goes to the device
            images, chosen = Resident(images.images[chosen].to(device)), torch.arange(len(chosen))
        return Split(images, chosen, labels, normalisation, device, **settings)

    augments = dataset.flip or dataset.crop_padding > 0
    return Data(
        source.classes,
        source.image_size,
        fingerprint=source.fingerprint,
        train=split(
            source.train,
            source.train_labels,
            rows,
            batch=batch,
            drop_last=drop_last,
            augmentation=Augmentation(dataset.flip, dataset.crop_padding) if augments else None,
            seed=seed,
        ),
        test=split(source.test, source.test_labels, test_rows, batch=eval_batch),
        val=split(source.train, source.train_labels, val_rows, batch=eval_batch) if len(val_rows) else None,
    )
