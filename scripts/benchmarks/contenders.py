"""Who is compared by `scripts/bench speed`. Each measurement is a process of its own, started with a JSON object that
says what to do; it ends with a line of JSON on stdout.

plain      a loop in the style of torchvision's reference script: a DataLoader over single images, transforms of each,
           loss and accuracy read at every step
lightning  the same loader under Lightning's Trainer, with loss and accuracy logged at every step
tuned      what a skilled user would write instead: images in memory, augmented batch by batch on the device,
           channels_last, fused SGD, nothing read before the end of an epoch
compile    the plain loop, its network under torch.compile, on a GPU with mode="reduce-overhead" (CUDA graphs)
normlab    `python train.py`, as a user calls it

The opponents get their images and networks from normlab, so that all train the same; all else is their own. They
evaluate once per epoch, as a run does, outside of the time that counts. This file imports what every contender needs,
and each contender the rest: imports count in the time to the first step and in memory.
"""

import contextlib
import json
import math
import os
import runpy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab import models, runs
from normlab.config.schema import SGD, BuiltinDataset, Cosine, FolderDataset, RunConfig, parse
from normlab.data import sources
from normlab.data.batches import standardization
from normlab.data.resident import Resident
from normlab.data.splits import stratified, training_rows
from normlab.training.device import peak_memory_bytes

TRAIN = Path(__file__).parents[2] / "train.py"
AfterStep = Callable[[Tensor], None]  # is shown the loss of each step, which it need not read


@dataclass(frozen=True)
class Images:
    """uint8 (N, 3, S, S) and int64 (N,), in memory; mean and std (3,) of the training images, pixels in [0, 1]; and how
    training images are augmented."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    classes: int
    crop_padding: int
    flip: bool


@dataclass
class Trained:
    epoch_seconds: list[float]  # of training alone
    test_accuracy: float


def images_of(config: RunConfig) -> Images:
    """Those that a run with these settings has."""
    dataset = config.dataset
    if not isinstance(dataset, BuiltinDataset | FolderDataset) or dataset.crop_size or dataset.kind == "imagenet":
        raise SystemExit(f"dataset={dataset.name}: the opponents read whole images of digits, CIFAR and a folder.")
    data_dir = Path(config.data_dir).expanduser()
    if isinstance(dataset, FolderDataset):
        source = sources.folder(dataset, data_dir, config.seed, torch.device("cpu"), lambda line: None)
    else:
        cifar = dataset.kind != "digits"
        source = sources.cifar(dataset.kind, data_dir, lambda line: None) if cifar else sources.digits()
        source = sources.resized(source, dataset.image_size)
    assert isinstance(source.train, Resident)
    assert isinstance(source.test, Resident)
    rows, _ = training_rows(source.train_labels, dataset.train_size, dataset.val_size, dataset.split_seed)
    test = stratified(source.test_labels, dataset.test_size, dataset.split_seed, "test")
    found = standardization(source.train, rows, torch.device("cpu"))
    return Images(
        *(source.train.images[rows], source.train_labels[rows]),
        *(source.test.images[test], source.test_labels[test]),
        *(found.mean.flatten() / 255, found.std.flatten() / 255),
        classes=len(source.classes),
        crop_padding=dataset.crop_padding,
        flip=dataset.flip,
    )


def network_of(config: RunConfig, images: Images) -> nn.Module:
    """The network of the run, with its initial weights; of norm=bn torchvision's own, without layers of ours."""
    make = models.base if config.norm.name == "bn" and config.norm_batch is None else models.build
    return make(config, num_classes=images.classes, image_size=images.train.shape[-1])


def optimizer_of(config: RunConfig, network: nn.Module, **kind: bool) -> torch.optim.Optimizer:
    """SGD that spares norms and biases from weight decay."""
    sgd = config.optimizer
    assert isinstance(sgd, SGD)
    weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    groups = [{"params": weights, "weight_decay": sgd.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, sgd.lr, sgd.momentum, nesterov=sgd.nesterov, **kind)


def schedule_of(
    config: RunConfig, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Half a cosine, to be stepped as often as `schedule.per` says; `steps` in an epoch."""
    assert isinstance(config.schedule, Cosine)
    changes = config.epochs * (steps if config.schedule.per == "step" else 1)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, changes, config.schedule.final_lr)


def device_of(config: RunConfig) -> torch.device:
    """The run's device, with the settings of the process that a run makes."""
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    torch.backends.cudnn.benchmark = config.device != "cpu"
    return torch.device(config.device)


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# A plain loop


class SingleImages(torch.utils.data.Dataset[Any]):
    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.labels, self.transform = images, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


Loader = torch.utils.data.DataLoader[Any]


def loaders(config: RunConfig, images: Images, workers: int) -> tuple[Loader, Loader]:
    """Of training and of evaluation."""
    from torchvision.transforms import v2

    augmentation: list[nn.Module] = []
    if images.crop_padding:
        augmentation.append(v2.RandomCrop(images.train.shape[-1], padding=images.crop_padding))
    if images.flip:
        augmentation.append(v2.RandomHorizontalFlip())
    # Of tensors, not of PIL images: torchvision advises it, and it takes less time.
    pixels = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(images.mean.tolist(), images.std.tolist())]
    options: dict[str, Any] = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": config.device != "cpu",
    }
    train = SingleImages(images.train, images.train_labels, v2.Compose([*augmentation, *pixels]))
    test = SingleImages(images.test, images.test_labels, v2.Compose(pixels))
    return (
        torch.utils.data.DataLoader(train, config.batch, shuffle=True, drop_last=config.drop_last, **options),
        torch.utils.data.DataLoader(test, config.eval_batch, **options),
    )


class Average:
    """A running average over images."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: float, images: int) -> None:
        self.total += value * images
        self.count += images

    @property
    def value(self) -> float:
        return self.total / self.count


def plain(
    config: RunConfig, images: Images, workers: int, after_step: AfterStep, *, is_compiled: bool = False
) -> Trained:
    device = device_of(config)
    train, test = loaders(config, images, workers)
    network = network_of(config, images).to(device)
    forward = compiled(network, device) if is_compiled else network  # of evaluation not: it would compile once more
    optimizer = optimizer_of(config, network)
    schedule = schedule_of(config, optimizer, len(train))
    seconds, test_accuracy = [], 0.0
    for _ in range(config.epochs):
        network.train()
        losses, accuracies = Average(), Average()
        begun = time.perf_counter()
        for batch, labels in train:
            batch, labels = batch.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with autocast(config, device):
                outputs = forward(batch)
                loss = F.cross_entropy(outputs, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if config.schedule.per == "step":
                schedule.step()
            losses.update(loss.item(), len(labels))
            accuracies.update((outputs.argmax(1) == labels).float().mean().item(), len(labels))
            after_step(loss)
        wait_for(device)
        seconds.append(time.perf_counter() - begun)
        if config.schedule.per == "epoch":
            schedule.step()
        test_accuracy = plain_accuracy(config, network, test, device)
    return Trained(seconds, test_accuracy)


def compiled(network: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    mode = "reduce-overhead" if device.type == "cuda" else None
    compiled: Callable[[Tensor], Tensor] = torch.compile(network, dynamic=False, mode=mode)
    return compiled


@torch.inference_mode()
def plain_accuracy(config: RunConfig, network: nn.Module, test: Loader, device: torch.device) -> float:
    network.eval()
    losses, accuracies = Average(), Average()
    for batch, labels in test:
        batch, labels = batch.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast(config, device):
            outputs = network(batch)
            loss = F.cross_entropy(outputs, labels)
        losses.update(loss.item(), len(labels))
        accuracies.update((outputs.argmax(1) == labels).float().mean().item(), len(labels))
    return accuracies.value


# Lightning


def lightning(config: RunConfig, images: Images, workers: int, after_step: AfterStep) -> Trained:
    with warnings.catch_warnings(action="ignore"):  # advice on workers and logging intervals
        return _lightning(config, images, workers, after_step)


def _lightning(config: RunConfig, images: Images, workers: int, after_step: AfterStep) -> Trained:
    import logging

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import lightning.pytorch as pl

    device = device_of(config)
    train, test = loaders(config, images, workers)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network_of(config, images)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            outputs = self.network(batch[0])
            loss = F.cross_entropy(outputs, batch[1])
            self.log("train_loss", loss)
            self.log("train_accuracy", (outputs.argmax(1) == batch[1]).float().mean())
            return loss

        def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            outputs = self.network(batch[0])
            self.log("test_loss", F.cross_entropy(outputs, batch[1]))
            self.log("test_accuracy", (outputs.argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self) -> Any:
            optimizer = optimizer_of(config, self.network)
            schedule = schedule_of(config, optimizer, len(train))
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": config.schedule.per},
            }

    class Clock(pl.Callback):
        """The training of each epoch; Lightning evaluates before it ends one."""

        def __init__(self) -> None:
            self.begun, self.seconds = 0.0, list[float]()

        def on_train_epoch_start(self, *event: Any) -> None:
            self.begun = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            after_step(outputs["loss"])
            if index + 1 == len(train):
                wait_for(device)
                self.seconds.append(time.perf_counter() - self.begun)

    clock = Clock()
    trainer = pl.Trainer(
        max_epochs=config.epochs,
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1,
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        benchmark=torch.backends.cudnn.benchmark,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Module(), train, test)
    return Trained(clock.seconds, float(trainer.callback_metrics["test_accuracy"]))


# A tuned loop


def cropped(images: Tensor, padding: int) -> Tensor:
    """torchvision's RandomCrop(S, padding) of each image, (B, 3, S, S) -> the same, channels_last."""
    count, side, device = len(images), images.shape[-1], images.device
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1), device=device)
    span = torch.arange(side, device=device)
    image = torch.arange(count, device=device)[:, None, None]
    return padded[image, :, (top + span)[:, :, None], (left + span)[:, None, :]].permute(0, 3, 1, 2)


def flipped(images: Tensor) -> Tensor:
    """torchvision's RandomHorizontalFlip of each image."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(3), images)


def shuffled(
    pixels: Tensor, labels: Tensor, batch_size: int, *, drop_last: bool, crop_padding: int, flip: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch."""
    order = torch.randperm(len(labels), device=labels.device)
    for rows in order.split(batch_size):
        if drop_last and len(rows) < batch_size:
            return
        batch = pixels[rows]
        if crop_padding:
            batch = cropped(batch, crop_padding)
        if flip:
            batch = flipped(batch)
        yield batch, labels[rows]


def tuned(config: RunConfig, images: Images, workers: int, after_step: AfterStep) -> Trained:
    device = device_of(config)
    mean, std = (value.view(1, 3, 1, 1).to(device) * 255 for value in (images.mean, images.std))

    def normalized(pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)

    pixels, labels = images.train.to(device, memory_format=torch.channels_last), images.train_labels.to(device)
    augments = images.crop_padding or images.flip  # with black borders: before the normalization
    pixels = pixels if augments else normalized(pixels)
    test, test_labels = normalized(images.test.to(device)), images.test_labels.to(device)
    augmentation: dict[str, Any] = {"crop_padding": images.crop_padding, "flip": images.flip}
    epoch = partial(shuffled, pixels, labels, config.batch, drop_last=config.drop_last, **augmentation)

    network = network_of(config, images).to(device).to(memory_format=torch.channels_last)
    optimizer = optimizer_of(config, network, fused=True)
    steps = (math.floor if config.drop_last else math.ceil)(len(labels) / config.batch)
    schedule = schedule_of(config, optimizer, steps)
    seconds, test_accuracy = [], 0.0
    for _ in range(config.epochs):
        network.train()
        losses, hits = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
        begun = time.perf_counter()
        for batch, targets in epoch():
            batch = normalized(batch) if augments else batch
            with autocast(config, device):
                outputs = network(batch)
                loss = F.cross_entropy(outputs, targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if config.schedule.per == "step":
                schedule.step()
            losses += loss.detach() * len(targets)
            hits += (outputs.argmax(1) == targets).sum()
            after_step(loss)
        float(losses), int(hits)  # the epoch's metrics; reading them waits for the device
        seconds.append(time.perf_counter() - begun)
        if config.schedule.per == "epoch":
            schedule.step()
        test_accuracy = tuned_accuracy(config, network, test, test_labels, device)
    return Trained(seconds, test_accuracy)


@torch.inference_mode()
def tuned_accuracy(config: RunConfig, network: nn.Module, test: Tensor, labels: Tensor, device: torch.device) -> float:
    network.eval()
    loss, hits = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
    for batch, targets in zip(test.split(config.eval_batch), labels.split(config.eval_batch), strict=True):
        with autocast(config, device):
            outputs = network(batch)
            loss += F.cross_entropy(outputs, targets, reduction="sum")
        hits += (outputs.argmax(1) == targets).sum()
    float(loss)
    return int(hits) / len(labels)


OPPONENTS = {"plain": plain, "lightning": lightning, "tuned": tuned, "compile": partial(plain, is_compiled=True)}


# What a process measures


def one_run(contender: str, settings: dict[str, Any], overrides: list[str], workers: int) -> dict[str, Any]:
    """Train one network; every batch of it is full."""
    config, steps = parse(settings), 0

    def count(loss: Tensor) -> None:
        nonlocal steps
        steps += 1

    if contender == "normlab":
        return normlab(config, overrides)
    trained = OPPONENTS[contender](config, images_of(config), workers, count)
    return {
        "steps": steps,
        "epoch_seconds": trained.epoch_seconds,
        "test_accuracy": trained.test_accuracy,
        "capture_seconds": None,
    }


def normlab(config: RunConfig, overrides: list[str]) -> dict[str, Any]:
    """The command itself, in this process, and then what its record says."""
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [str(TRAIN), *overrides, f"output_dir={folder}"]
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what is printed there is the measurement's
                runpy.run_path(str(TRAIN), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        (run,) = runs.find(Path(folder) / config.study)
        status, (rows, _) = runs.read_status(run), runs.read_metrics(run)
    assert status
    images = status["step"] // config.epochs * config.batch
    return {
        "steps": status["step"],
        "epoch_seconds": [images / row["images_per_second"] for row in rows],
        "test_accuracy": status["test_accuracy"],
        "capture_seconds": status.get("capture_seconds"),
    }


def many_runs(contender: str, settings: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    """Train one network after the other."""
    configs = [parse(each) for each in settings]
    images = images_of(configs[0])  # the same for all
    begun = time.perf_counter()
    found = [OPPONENTS[contender](config, images, workers, lambda loss: None) for config in configs]
    trained_seconds = time.perf_counter() - begun  # the rest is the process's start
    return {"test_accuracy": [trained.test_accuracy for trained in found], "trained_seconds": trained_seconds}


def first_step(contender: str, settings: dict[str, Any], workers: int) -> dict[str, Any]:
    """Say so as soon as one step of training is done, and end."""

    def leave(loss: Tensor) -> None:
        float(loss.detach())  # waits for the device
        print("{}", flush=True)
        os._exit(0)

    config = parse(settings)
    OPPONENTS[contender](config, images_of(config), workers, leave)
    raise AssertionError("there was no step")


def main() -> None:
    wanted = json.loads(sys.argv[1])
    do: dict[str, Callable[..., dict[str, Any]]] = {
        "one run": one_run,
        "many runs": many_runs,
        "first step": first_step,
    }
    found = do[wanted.pop("do")](**wanted)
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    found["peak_memory_bytes"] = peak_memory_bytes(torch.device("cpu"))  # of this process: not of a loader's workers
    found["peak_device_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
