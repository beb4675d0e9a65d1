"""From a data set's settings to its batches."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from normlab.common.rng import stream
from normlab.config.schema import (
    ArrayDataset,
    ClassIncremental,
    FolderDataset,
    ImageDataset,
    Paired,
    RegressionDataset,
    RunConfig,
)
from normlab.data import inventory, regression, sources
from normlab.data.batches import Augmentation, Normalization, Split, standardization, unit_interval
from normlab.data.image_order import ImageOrder
from normlab.data.incremental import TaskSequence
from normlab.data.resident import Resident
from normlab.data.samplers import evaluation_order
from normlab.data.sources import Source
from normlab.data.splits import stratified, training_rows
from normlab.data.streaming import Files
from normlab.data.values import Values

Loaded = dict[object, Any]  # sources, and what of them is on a device: for several runs of one process


@dataclass(frozen=True)
class Data:
    """The parts of a data set, in the batches of a run.

    Attributes:
        classes: names of the network's outputs: of a regression the components of y.
        fingerprint: of the content, so that a run is not resumed on other data.
        values: of images of more than 8 bits.
        warnings: sentences about images that are left out, or whose values are clipped.
        test_order: in which the test images are recorded; None of a regression.
    """

    classes: tuple[str, ...]
    image_size: int
    fingerprint: str
    train: Split
    test: Split
    val: Split | None
    task: Literal["classification", "regression"] = "classification"
    channels: int = 3
    values: Values = field(default_factory=Values)
    warnings: tuple[str, ...] = ()
    test_order: ImageOrder | None = None

    def calibration(self, count: int) -> Tensor:
        """Return the training images for a start from data, normalized and not augmented.

        `count` of them, or all if there are fewer, the same ones for every arm; float32 (n, channels, S, S) on the
        device.
        """
        chosen = torch.randperm(len(self.train), generator=stream(self.train.seed, "calibration"))[:count]
        return torch.cat([images for images, _ in self.train.plain(chosen)])


def load(
    config: RunConfig,
    device: torch.device,
    *,
    log: Callable[[str], None],
    rank: int = 0,
    world: int = 1,
    loaded: Loaded | None = None,
) -> Data:
    """Read, download, decode or prepare to stream the data set of a run, and split it into batches.

    Images in memory are put on `device` once. With eval_stats=batch, test and validation come in the sampler's manner,
    in an order that depends on the split alone [A], so that every arm and seed is evaluated on the same batches.
    Of `world` processes, each trains on and evaluates its share (see `Split`), but evaluates all with eval_stats=batch,
    whose batches are not to be divided.

    Args:
        log: called with a sentence before work that takes a while.
        loaded: images in memory are taken from it, and added to it.

    Raises:
        UserError: the data is missing, incomplete or unusable, or a subset does not fit it.
    """
    share = {"rank": rank, "processes": world}
    training = {"batch": config.batch, "drop_last": config.drop_last, "seed": config.seed, **share}
    evaluation = {"batch": config.eval_batch, **({} if config.eval_stats == "batch" else share)}
    if isinstance(config.dataset, RegressionDataset):
        return _regression(config.dataset, training, evaluation, device)
    loaded = {} if loaded is None else loaded
    source = _source(config, config.dataset, device, log, loaded)
    return _Images(config, config.dataset, device, source, loaded).data(training, evaluation)


def _name(config: RunConfig) -> tuple[str, str]:
    """Return the key of a data set in `loaded`."""
    return config.dataset.model_dump_json(), str(Path(config.data_dir).expanduser())


def _source(
    config: RunConfig, dataset: ImageDataset, device: torch.device, log: Callable[[str], None], loaded: Loaded
) -> Source:
    """Return all images of a data set, from `loaded` if they are there."""
    name, data_dir = _name(config), Path(config.data_dir).expanduser()
    inventory.forget()  # files count as they are from now on
    inventory.check(dataset, data_dir, log)
    if name in loaded:
        source: Source = loaded[name]
    elif isinstance(dataset, FolderDataset):
        source = sources.folder(dataset, data_dir, config.seed, device, log)
    elif isinstance(dataset, ArrayDataset):
        source = sources.resized(sources.of_arrays(dataset, data_dir, log), dataset.image_size)
    elif dataset.kind == "digits":
        source = sources.resized(sources.digits(), dataset.image_size)
    else:
        source = sources.resized(sources.cifar(dataset.kind, data_dir, log), dataset.image_size)
    if isinstance(source.train, Resident):  # a stream belongs to a run, as its random crops do
        loaded[name] = source
    return source


class _Images:
    """Splits the images of a source."""

    def __init__(
        self, config: RunConfig, dataset: ImageDataset, device: torch.device, source: Source, loaded: Loaded
    ) -> None:
        self.config, self.dataset, self.device, self.source, self.loaded = config, dataset, device, source, loaded
        self.each = config.sampler.images_per_label if isinstance(config.sampler, Paired) else None
        self.cut = source.image_size - (dataset.crop_size or source.image_size)

    def data(self, training: dict[str, Any], evaluation: dict[str, Any]) -> Data:
        """Return the splits, with the given settings of those that are trained on and of those that are evaluated."""
        source, dataset = self.source, self.dataset
        rows, val_rows = training_rows(source.train_labels, dataset.train_size, dataset.val_size, dataset.split_seed)
        test_rows = stratified(source.test_labels, dataset.test_size, dataset.split_seed, "test")
        test_rows = self._in_order("test", source.test_labels, test_rows)
        if self.config.input_norm == "dataset":
            self.normalization = standardization(source.train, rows, self.device)
        else:
            self.normalization = unit_interval(self.device)
        augments = dataset.flip or dataset.crop_padding > 0 or self.cut > 0
        augmentation = Augmentation(dataset.flip, dataset.crop_padding, self.cut) if augments else None
        tasks = self._tasks(source.train_labels[rows])
        more = {"images_per_label": self.each, "tasks": tasks, "augmentation": augmentation}
        return Data(
            source.classes,
            source.image_size - self.cut,
            fingerprint=source.fingerprint,
            train=self._split(source.train, source.train_labels, rows, training | more),
            test=self._split(source.test, source.test_labels, test_rows, evaluation),
            val=self._validation(val_rows, evaluation),
            values=source.values,
            warnings=(*source.remarks, *source.values.warnings),
            test_order=ImageOrder.of(source.fingerprint, test_rows, source.test_labels[test_rows], source.classes),
        )

    def _tasks(self, labels: Tensor) -> TaskSequence | None:
        """Return the tasks that the classes of images with `labels` (int64, (N,)) come in; None: all at once."""
        sampler, classes = self.config.sampler, len(self.source.classes)
        if not isinstance(sampler, ClassIncremental):
            return None
        inventory.check_tasks(sampler, classes)
        return TaskSequence(labels, classes, self.config.scheduled_epochs, sampler, self.config.seed)

    def _validation(self, rows: Tensor, settings: dict[str, Any]) -> Split | None:
        """Return the validation part that a folder has, or the `rows` of the training images."""
        source = self.source
        if source.val is not None and source.val_labels is not None:
            rows = self._in_order("val", source.val_labels, torch.arange(len(source.val_labels)))
            return self._split(source.val, source.val_labels, rows, settings)
        if not len(rows):
            return None
        rows = self._in_order("val", source.train_labels, rows)
        return self._split(source.train, source.train_labels, rows, settings)

    def _in_order(self, part: str, labels: Tensor, chosen: Tensor) -> Tensor:
        """Return the chosen images of a part that is evaluated in the order of its batches."""
        if self.config.eval_stats != "batch":
            return chosen
        generator = stream(self.dataset.split_seed, part, "order")
        return chosen[evaluation_order(labels[chosen], self.each, generator)]

    def _split(self, images: Resident | Files, labels: Tensor, chosen: Tensor, settings: dict[str, Any]) -> Split:
        labels = labels[chosen]
        if isinstance(images, Resident) and self.device.type != "cpu":  # only the images of a split go to the device
            rows = hashlib.sha256(chosen.numpy().tobytes()).digest()
            part = (_name(self.config), str(self.device), rows, id(images))
            if part not in self.loaded:
                self.loaded[part] = Resident(images.images[chosen].to(self.device))
                torch.cuda.synchronize(self.device)  # other runs will read them on streams of their own
            images, chosen = self.loaded[part], torch.arange(len(chosen))
        return Split(images, chosen, labels, self.normalization, self.device, cut=self.cut, **settings)


def _regression(
    dataset: RegressionDataset, training: dict[str, Any], evaluation: dict[str, Any], device: torch.device
) -> Data:
    """Return x as images, 1x1 pixels of `features` channels, and y as labels."""
    train, test = regression.samples(dataset)
    unchanged = Normalization(torch.zeros((), device=device), torch.ones((), device=device))

    def split(x: Tensor, y: Tensor, settings: dict[str, Any]) -> Split:
        return Split(Resident(x.to(device)), torch.arange(len(x)), y, unchanged, device, **settings)

    return Data(
        classes=tuple(f"y{component}" for component in range(dataset.features)),
        image_size=1,
        fingerprint=regression.fingerprint(*train, *test),
        train=split(*train, training),
        test=split(*test, evaluation),
        val=None,
        task="regression",
        channels=dataset.features,
    )
