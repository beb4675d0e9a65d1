"""From a data set's settings to its batches."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from normlab.common.rng import stream
from normlab.config.schema import FolderDataset, ImageDataset, Paired, RegressionDataset, SamplerConfig
from normlab.data import inventory, regression, sources
from normlab.data.batches import Augmentation, Normalization, Split, standardization, unit_interval
from normlab.data.resident import Resident
from normlab.data.samplers import evaluation_order
from normlab.data.splits import stratified, training_rows
from normlab.data.streaming import Files

Loaded = dict[object, Any]  # sources, and what of them is on a device: for several runs of one process


@dataclass(frozen=True)
class Data:
    """`classes` names what the network has an output for: of a regression the components of y.

    `fingerprint` names the content, so that a run is not resumed on other data.
    """

    classes: tuple[str, ...]
    image_size: int
    fingerprint: str
    train: Split
    test: Split
    val: Split | None
    task: Literal["classification", "regression"] = "classification"
    channels: int = 3

    def calibration(self, count: int) -> Tensor:
        """The training images that a data-dependent start looks at, normalised and not augmented: `count` of
        them, or all if there are fewer, the same ones for every arm; float32 (n, channels, S, S) on the device.
        """
        chosen = torch.randperm(len(self.train), generator=stream(self.train.seed, "calibration"))[:count]
        return torch.cat([images for images, _ in self.train.plain(chosen)])


def load(
    dataset: ImageDataset | RegressionDataset,
    *,
    data_dir: Path,
    seed: int,
    batch: int,
    eval_batch: int,
    drop_last: bool,
    sampler: SamplerConfig,
    input_norm: str,
    eval_stats: str,
    device: torch.device,
    log: Callable[[str], None],
    rank: int = 0,
    processes: int = 1,
    loaded: Loaded | None = None,
) -> Data:
    """Read, download, decode or prepare to stream a data set, and split it.

    Images in memory are put on `device` once. `sampler`, `input_norm` and `eval_stats` are those of
    `conf/config.yaml`; with eval_stats=batch, test and validation come in the sampler's manner, in an order that
    depends on the split alone [A], so that every arm and seed is evaluated on the same batches.
    Of several `processes`, each trains on and evaluates its share (see `Split`), but evaluates all with
    eval_stats=batch, whose batches are not to be divided. Images in memory are taken from, and added to, `loaded`.

    Raises:
        UserError: the data is missing, incomplete or unusable, or a subset does not fit it.
    """
    of_each = {"rank": rank, "processes": processes}
    evaluated_by_each = {} if eval_stats == "batch" else of_each
    if isinstance(dataset, RegressionDataset):
        training = {"batch": batch, "drop_last": drop_last, "seed": seed, **of_each}
        return _regression(dataset, training, {"batch": eval_batch, **evaluated_by_each}, device)
    data_dir, loaded = data_dir.expanduser(), {} if loaded is None else loaded
    name = (dataset.model_dump_json(), str(data_dir))
    inventory.scan.cache_clear()  # what counts from now on is what is there now
    inventory.check(dataset, data_dir)
    if name in loaded:
        source = loaded[name]
    elif isinstance(dataset, FolderDataset):
        source = sources.folder(dataset, data_dir, seed, device, log)
    elif dataset.kind == "digits":
        source = sources.resized(sources.digits(), dataset.image_size)
    else:
        source = sources.resized(sources.cifar(dataset.kind, data_dir, log), dataset.image_size)

    if isinstance(source.train, Resident):  # a stream belongs to a run, as its random crops do
        loaded[name] = source

    rows, val_rows = training_rows(source.train_labels, dataset.train_size, dataset.val_size, dataset.split_seed)
    test_rows = stratified(source.test_labels, dataset.test_size, dataset.split_seed, "test")
    each = sampler.images_per_label if isinstance(sampler, Paired) else None
    of_the_set = input_norm == "dataset"
    normalization = standardization(source.train, rows, device) if of_the_set else unit_interval(device)
    cut = source.image_size - (dataset.crop_size or source.image_size)

    def split(images: Resident | Files, labels: Tensor, chosen: Tensor, **settings: Any) -> Split:
        labels = labels[chosen]
        if isinstance(images, Resident) and device.type != "cpu":  # only what is used goes to the device
            part = (name, str(device), hashlib.sha256(chosen.numpy().tobytes()).digest(), images is source.train)
            if part not in loaded:
                loaded[part] = Resident(images.images[chosen].to(device))
                torch.cuda.synchronize(device)  # other runs will read them on streams of their own
            images, chosen = loaded[part], torch.arange(len(chosen))
        return Split(images, chosen, labels, normalization, device, cut=cut, **settings)

    def evaluated(part: str, images: Resident | Files, labels: Tensor, chosen: Tensor) -> Split:
        if eval_stats == "batch":
            order = evaluation_order(labels[chosen], each, stream(dataset.split_seed, part, "order"))
            chosen = chosen[order]
        return split(images, labels, chosen, batch=eval_batch, **evaluated_by_each)

    augments = dataset.flip or dataset.crop_padding > 0 or cut > 0
    return Data(
        source.classes,
        source.image_size - cut,
        fingerprint=source.fingerprint,
        train=split(
            source.train,
            source.train_labels,
            rows,
            batch=batch,
            images_per_label=each,
            drop_last=drop_last,
            augmentation=Augmentation(dataset.flip, dataset.crop_padding, cut) if augments else None,
            seed=seed,
            **of_each,
        ),
        test=evaluated("test", source.test, source.test_labels, test_rows),
        val=evaluated("val", source.train, source.train_labels, val_rows) if len(val_rows) else None,
    )


def _regression(
    dataset: RegressionDataset, training: dict[str, Any], evaluation: dict[str, Any], device: torch.device
) -> Data:
    """x stands for the images, 1x1 pixels of `features` channels, and y for the labels."""
    train, test = regression.samples(dataset)
    unchanged = Normalization(torch.zeros((), device=device), torch.ones((), device=device))

    def split(x: Tensor, y: Tensor, **settings: Any) -> Split:
        return Split(Resident(x.to(device)), torch.arange(len(x)), y, unchanged, device, **settings)

    return Data(
        classes=tuple(f"y{component}" for component in range(dataset.features)),
        image_size=1,
        fingerprint=regression.fingerprint(*train, *test),
        train=split(*train, **training),
        test=split(*test, **evaluation),
        val=None,
        task="regression",
        channels=dataset.features,
    )
