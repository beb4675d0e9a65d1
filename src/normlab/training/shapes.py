"""Check that a network takes the batches of a run, and that its norms are the run's, where a forward pass is cheap."""

import copy
import json
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from normlab import models
from normlab.common.errors import UserError, first_line
from normlab.config.schema import ClassIncremental, Paired, RegressionDataset, RunConfig
from normlab.data.datasets import Data
from normlab.data.inventory import Inventory
from normlab.norms import batch_norm_refused, independent_processes

CHECKED_SECONDS = 20.0  # for a sweep before it starts; what is left over, each run finds out by itself
_NOT_THE_NETWORK = {
    *("study", "experiment", "budget", "output_dir", "data_dir", "seed", "epochs", "optimizer", "schedule"),
    *("batch", "eval_batch"),
}
_fitting: set[Hashable] = set()  # kinds of networks, each with a size of batch, that this process has checked

_KNOWN = ("torch.", "torchvision.", "normlab.")  # networks of which tests know what a rewrite leaves


@dataclass(frozen=True)
class Shapes:
    """The inputs of a run's network.

    Attributes:
        outputs: classes; components of y of a regression.
        batches: the numbers of images in a batch that occur, each with the setting that changes it; training's first.
    """

    channels: int
    image_size: int
    outputs: int
    batches: dict[int, str]


def of_data(config: RunConfig, data: Data) -> Shapes:
    """Return the shapes of a run whose data is loaded, in one of its processes."""
    images = [(part.images if part else 0) for part in (data.train, data.val, data.test)]
    return Shapes(data.channels, data.image_size, len(data.classes), _batches(config, images, data.train.processes))


def of_inventory(config: RunConfig, data: Inventory) -> Shapes | None:
    """Return the shapes of a run before its data is read, in one process; None if the size is not known."""
    dataset, whole = config.dataset, data.train_images // config.batch * config.batch
    trained = whole if config.drop_last else data.train_images
    if isinstance(config.sampler, Paired):  # whose batches are all full, as those of the next
        trained = -(-data.train_images // config.batch) * config.batch
    elif isinstance(config.sampler, ClassIncremental):
        trained = config.batch
    if isinstance(dataset, RegressionDataset):
        batches = _batches(config, [trained, 0, data.test_images], 1)
        return Shapes(dataset.features, 1, dataset.features, batches)
    size = dataset.crop_size or data.image_size
    if size is None or data.classes is None:
        return None
    return Shapes(3, size, data.classes, _batches(config, [trained, data.val_images, data.test_images], 1))


def check_sweep(
    runs: Sequence[tuple[RunConfig, Inventory]], log: Callable[[str], None] = lambda sentence: None
) -> None:
    """Check each kind of network and batch among runs, for `CHECKED_SECONDS` at most.

    Args:
        runs: settings, and sizes of the data.
        log: called with a sentence about trained weights.

    Raises:
        UserError: for the first run whose network cannot be built, or does not take its batches.
    """
    deadline = time.monotonic() + CHECKED_SECONDS
    kinds: dict[str, list[tuple[RunConfig, Shapes]]] = defaultdict(list)
    for config, data in runs:
        if found := of_inventory(config, data):
            kinds[_network(config)].append((config, found))
    for alike in kinds.values():
        try:
            _check_kind(alike, log)
        except UserError:
            raise
        except (Exception, SystemExit):  # of the user's network: its run will record it with its traceback
            continue
        if time.monotonic() > deadline:
            return


def _check_kind(runs: Sequence[tuple[RunConfig, Shapes]], log: Callable[[str], None]) -> None:
    """Check runs of one network, which is built once."""
    config, shapes = runs[0]
    network = models.build(config, num_classes=shapes.outputs, image_size=shapes.image_size, log=log)
    for config, shapes in runs:
        check(config, network, shapes)


def _network(config: RunConfig) -> str:
    """Return the settings that make a network, as text."""
    return json.dumps(config.model_dump(mode="json", exclude=_NOT_THE_NETWORK, by_alias=True), sort_keys=True)


def check(config: RunConfig, network: nn.Module, shapes: Shapes) -> None:
    """Check each size of batch that will occur, and that nothing but normlab's layers normalizes by the batch.

    A process checks a kind of network, of code that it has seen, once for each size.

    Raises:
        UserError: if the images are too small for the network or too few for a layer's statistics, or the
            network's output is not one number per image and class; see `normlab.norms.batch_norm_refused`.
    """
    code = frozenset(each.code if isinstance(each, fx.GraphModule) else type(each) for each in network.modules())
    kind = (_network(config), code, shapes.channels, shapes.image_size, shapes.outputs)
    new = {size: setting for size, setting in shapes.batches.items() if (kind, size) not in _fitting}
    if new:
        _check_calls(network, shapes)
        _check_batches(config, network, replace(shapes, batches=new))
        _fitting.update((kind, size) for size in new)


def _check_batches(config: RunConfig, network: nn.Module, shapes: Shapes) -> None:
    shown = copy.deepcopy(network).to("meta").train()

    def run(images: int, side: int, channels: int = shapes.channels) -> Any:
        with independent_processes():
            return shown(torch.empty(images, channels, side, side, device="meta"))

    side = shapes.image_size
    for size in sorted(shapes.batches, reverse=True):  # an error of the whole batch is one that no other size mends
        try:
            output = run(size, side)
        except NotImplementedError:  # some operation of the user's network has no meta form
            return
        except (ValueError, RuntimeError) as error:
            if "device" in str(error):  # a tensor that the user's network keeps to itself
                return
            if other := next((channels for channels in (1, 2, 4) if _works(run, size, side, channels)), 0):
                raise UserError(
                    f"{config.model.name} takes images of {other} channel{'s' * (other > 1)}, and those of"
                    f" dataset={config.dataset.name} have {shapes.channels}.\n"
                    f"Give its first layer {shapes.channels}: gray images come with three equal channels."
                ) from error
            larger = side > 1 and any(_works(run, size, side * factor) for factor in (2, 4, 8, 16, 32))
            remedies = ["larger images"] * larger
            if str(error).startswith("Expected more than"):
                remedies.append("another norm (one over a single value is undefined)")
            if _works(run, 2 * size, side):
                remedies.append(shapes.batches[size])
            raise _does_not_fit(config, shapes, size, error, remedies) from error
        expected = (size, shapes.outputs)
        if not isinstance(output, Tensor) or tuple(output.shape) != expected:
            given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(
                f"{config.model.name} gives {given} for a batch of {size} images.\n"
                f"Expected a tensor {expected}: one number per image and class of {config.dataset.name}."
            )


def _check_calls(network: nn.Module, shapes: Shapes) -> None:
    """Check what a network that has code of the user's normalizes by the batch."""
    if all(type(module).__module__.startswith(_KNOWN) for module in network.modules()):
        return
    shape = (2, shapes.channels, shapes.image_size, shapes.image_size)
    for device in ("meta", "cpu"):  # not everything can be computed without numbers
        shown = copy.deepcopy(network).to(device)
        try:
            with independent_processes(), torch.random.fork_rng(devices=[]), torch.no_grad():
                for training in (True, False):
                    with batch_norm_refused(shown.train(training)):
                        shown(torch.zeros(shape, device=device))
        except UserError:
            raise
        except Exception:  # `check` says which batches do not fit, and of all else the run itself
            continue
        return


def _batches(config: RunConfig, images: Sequence[int], processes: int) -> dict[int, str]:
    """Return the sizes of batch of the images to train on, to validate on and to test on."""
    train, *evaluated = images
    shares = 1 if config.sync_stats else processes  # the smallest share, where statistics are of shares
    sizes = {min(config.batch, train) // shares: "another batch"}
    sizes.setdefault(train % config.batch // shares, "another batch or drop_last=true")
    for count in evaluated if config.eval_stats == "batch" else ():
        for size in (min(config.eval_batch, count), count % config.eval_batch):
            sizes.setdefault(size, "another eval_batch")
    sizes.pop(0, None)
    return sizes


def _works(run: Callable[..., Any], *sizes: int) -> bool:
    try:
        run(*sizes)
    except (ValueError, RuntimeError):
        return False
    return True


def _does_not_fit(config: RunConfig, shapes: Shapes, size: int, error: Exception, remedies: list[str]) -> UserError:
    side = shapes.image_size
    many = "s" * (size > 1)
    images = (
        f"sample{many}" if isinstance(config.dataset, RegressionDataset) else f"image{many} of {side}x{side} pixels"
    )
    last = "" if size in (config.batch, config.eval_batch) else ", the last of an epoch or evaluation,"
    return UserError(
        f"A batch of {size} {images}{last} does not fit {config.model.name} with norm={config.norm.name}:\n"
        f"{first_line(error)}\n"
        f"Use {' or '.join(remedies or ['another network'])}."
    )
