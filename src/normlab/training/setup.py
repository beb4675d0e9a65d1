"""From a configuration to all that a run trains with."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normlab import models
from normlab.common.errors import UserError, first_line
from normlab.config.schema import RunConfig
from normlab.data.datasets import Data, Loaded, load
from normlab.models.pretrained import Log
from normlab.norms import Steps, find_sites, independent_processes
from normlab.norms.layer_statistics import is_random
from normlab.probes import ProbedNetwork, Probes
from normlab.training import device, engines, shapes, taps
from normlab.training.average import Average
from normlab.training.distributed import checks
from normlab.training.distributed.process_group import ProcessGroup
from normlab.training.gradient_transforms import build_transform
from normlab.training.interleaving import Interleaver
from normlab.training.optimizers import build_optimizer
from normlab.training.record import Recorder
from normlab.training.state import Position, TrainingState
from normlab.training.step import TrainingStep
from normlab.training.tasks import SeenClasses, Task, task_of

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CHANNELS_LAST_FROM = 16  # pixels, on a CPU: smaller maps gain nothing or lose (docs/performance.md)


@dataclass(frozen=True)
class Resources:
    """A share of this machine that a launcher offers a run; the run's own settings go first.

    Attributes:
        device: for a run whose settings leave it open, e.g. "cuda:1".
        threads: share of the cores.
        interleaver: makes way for other runs of this process.
        loaded: images that runs of this process share.
        title: what the run is called in its sweep (`runs.Run.title`).
        say: called with a sentence for the terminal; of a sweep, whose networks are checked before, nothing is said.
    """

    device: str | None = None
    threads: int | None = None
    interleaver: Interleaver = field(default_factory=Interleaver)
    loaded: Loaded | None = None
    title: str = ""
    say: Log = lambda sentence: None


def set_up(
    config: RunConfig, recorder: Recorder, resources: Resources, group: ProcessGroup, saved: Mapping[str, Any] | None
) -> TrainingState:
    """Return the state of a run before its first step; a resumed one keeps its memory format and threads."""
    where = device.choose(config.device, resources.device)
    # Sums over threads depend on their number: a resumed run keeps it, so that it ends as if uninterrupted.
    kept = saved["threads"] if saved and saved["processes"] == group.world else resources.threads
    device.prepare(config, where, config.threads or kept, packed=resources.interleaver.packed)
    data = load(config, where, log=recorder.preparing, rank=group.rank, world=group.world, loaded=resources.loaded)
    make_way = resources.interleaver.make_way
    make_way()
    for warning in data.warnings:
        recorder.log.warning("%s", warning)
    if group.broadcast(data.fingerprint) != data.fingerprint:
        raise UserError(
            f"The processes of this run see different images of dataset={config.dataset.name}.\n"
            "Give all its machines the same files."
        )

    def log(sentence: str) -> None:
        recorder.preparing(sentence)
        resources.say(sentence)

    if config.device == "auto" and (idle := device.left_idle()):
        log(idle)
    network = build_network(config, data, where, group, new=saved is None, log=log)
    make_way()
    images = torch.zeros(1, data.channels, data.image_size, data.image_size, device=where)
    memory_format = saved["memory_format"] if saved else choose_memory_format(config, network, images)
    task: Task = task_of(data.task, config.label_smoothing)
    if data.train.tasks:
        task = SeenClasses(len(data.classes), where)
    step = build_step(config, network, task, images, group, memory_format)
    make_way()
    device.forget_peak_memory(where)
    position = Position.start(data.train.steps, where)
    probes = None
    if config.probe:
        subject = _probe_subject(config, network, data)
        probes = Probes(config.probe, subject, config.epochs * data.train.steps, recorder.measurement)
    packed = resources.interleaver.packed
    engine = engines.build(config, data.train, step, position, recorder.log.warning, packed=packed)
    return TrainingState(
        config, where, group, resources.interleaver, data, step, engine, probes, position, memory_format
    )


def build_network(
    config: RunConfig, data: Data, where: torch.device, group: ProcessGroup, *, new: bool, log: Log
) -> nn.Module:
    """Return the network of a run on its device, the same in all processes, checked against the sizes of its batches.

    Args:
        new: whether it starts to train; a resumed one needs no start from data or trained weights.
        log: called with a sentence about trained weights.

    Raises:
        UserError: if processes, images, batches, calibration images and network do not fit each other.
    """
    classes, size = len(data.classes), data.image_size
    network = models.build(config, num_classes=classes, image_size=size, trained=new, log=log)
    checks.prepare_layers(config, network, data, group.world)
    shapes.check(config, network, shapes.of_data(config, data))
    network = network.to(where)
    if new and config.starts_from_data:
        images = data.calibration(config.calibration_images)
        try:
            with independent_processes():
                models.start(config, network, images, num_classes=classes, image_size=size)
        except ValueError as error:
            raise UserError(
                f"The start that looks at {len(images)} calibration images does not fit {config.model.name} with"
                f" norm={config.norm.name}:\n{first_line(error)}\n"
                "Use another calibration_images (a norm over one value per channel is undefined), a multiple of"
                " norm_batch."
            ) from error
    group.broadcast_network(network)
    return network


def choose_memory_format(config: RunConfig, network: nn.Module, images: Tensor) -> str:
    """Return the memory format of a run, a key of `FORMATS`.

    memory_format=auto is channels_last where it is faster as a rule, the same on every machine: for images of 16 pixels
    and more on a CPU, and for reduced precision on a GPU.

    Args:
        network: on its device, before the format is applied.
        images: of the run's size, float32 (1, C, S, S) on the device.
    """
    if images.shape[-1] == 1 or not any(isinstance(module, nn.Conv2d) for module in network.modules()):
        return "contiguous"
    if config.memory_format != "auto":
        return config.memory_format
    if any(map(is_random, network.modules())):
        return "contiguous"  # numbers are drawn in the order of memory: another format is another run
    fast = images.shape[-1] >= CHANNELS_LAST_FROM if images.device.type == "cpu" else config.precision != "fp32"
    return "channels_last" if fast and _works_in_channels_last(network, images) else "contiguous"


def _works_in_channels_last(network: nn.Module, images: Tensor) -> bool:
    """Return whether a forward pass does: a network of the user's own may view its maps as contiguous ones."""
    converted = copy.deepcopy(network).to(memory_format=torch.channels_last).eval()
    try:
        with torch.no_grad(), independent_processes():
            converted(images)
    except (RuntimeError, ValueError):
        return False
    return True


def build_step(
    config: RunConfig, network: nn.Module, task: Task, images: Tensor, group: ProcessGroup, memory_format: str
) -> TrainingStep:
    """Return the step that trains `network`, which is changed in place (memory format, trimmed convolutions).

    Args:
        images: of the run's size, float32 (1, C, S, S) on the device.
    """
    where = images.device
    network = network.to(memory_format=FORMATS[memory_format])
    transform = build_transform(config.optimizer, network)
    if where.type == "cpu" and config.engine != "compile":
        taps.trim(network, images)
    return TrainingStep(
        config,
        where,
        task,
        network,
        engines.compiled(config, group.data_parallel(network)),
        Steps(network),
        build_optimizer(config.optimizer, network, for_graph=engines.may_capture(config, where)),
        torch.amp.GradScaler(where.type, enabled=config.precision == "fp16"),
        transform,
        None if config.weight_average is None else Average(network, config.weight_average),
    )


def _probe_subject(config: RunConfig, network: nn.Module, data: Data) -> ProbedNetwork:
    """Return what probes look at, with the sites that the network had before its norms were rewritten."""
    base = models.base(config, num_classes=len(data.classes), image_size=data.image_size, trained=False)
    prefix = "network." if config.input_norm == "bn" else ""
    return ProbedNetwork(network, tuple(prefix + site.norm for site in find_sites(base)), prefix)
