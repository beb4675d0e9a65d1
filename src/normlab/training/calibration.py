"""The cost of a run, estimated from a few of its steps on random images."""

import time

import torch

from normlab import models
from normlab.config.schema import RegressionDataset, RunConfig
from normlab.data.inventory import Inventory
from normlab.training import device
from normlab.training.distributed.process_group import SingleProcess
from normlab.training.setup import build_step, choose_memory_format
from normlab.training.tasks import task_of

STEPS = 5
UNKNOWN_SIZE = 224  # pixels, of images that have no common size


def calibrate(config: RunConfig, data: Inventory, share: str, threads: int, limit_seconds: float) -> tuple[float, int]:
    """Return the seconds that one epoch and its evaluation would take, and the peak memory in bytes.

    Probes, precise statistics and reading images from files are left out. An evaluated image counts as a third of a
    trained one [A: a forward pass of three of its length].
    """
    where = device.choose(config.device, share)
    device.prepare(config, where, config.threads or threads)
    dataset = config.dataset
    if isinstance(dataset, RegressionDataset):
        trial = Trial(config, where, side=1, channels=dataset.features, classes=dataset.features)
    else:
        side = dataset.crop_size or data.image_size or UNKNOWN_SIZE
        trial = Trial(config, where, side=side, classes=data.classes or 1000)
    begun = time.monotonic()
    trial.seconds()  # warms up
    times = [trial.seconds()]
    while len(times) < STEPS and time.monotonic() - begun < limit_seconds:
        times.append(trial.seconds())
    step = min(times)
    evaluation = data.test_images / config.batch * step / 3 / config.eval_every
    return step * data.train_images / config.batch + evaluation, device.peak_memory_bytes(where)


class Trial:
    """Steps of a run's own network, optimizer and batch on random images of `side` pixels."""

    def __init__(
        self,
        config: RunConfig,
        where: torch.device,
        *,
        side: int,
        classes: int,
        channels: int = 3,
    ) -> None:
        config = config.model_copy(update={"engine": "eager"})  # a trial is no time to compile
        network = models.build(config, num_classes=classes, image_size=side).to(where).train()
        regression = isinstance(config.dataset, RegressionDataset)
        task = task_of("regression" if regression else "classification", config.label_smoothing)
        self.images = torch.randn(config.batch, channels, side, side, device=where)
        memory_format = choose_memory_format(config, network, self.images[:1])
        self.step = build_step(config, network, task, self.images[:1], SingleProcess(), memory_format)
        shape, kind = ((config.batch, classes), torch.float32) if regression else ((config.batch,), torch.int64)
        self.labels = torch.zeros(shape, dtype=kind, device=where)
        self._steps = 0

    def seconds(self) -> float:
        """Return the seconds of one more step."""
        begun = time.monotonic()
        self.step.layers.begin(self._steps, 1000)
        loss, _ = self.step(self.images, self.labels, len(self.images))
        float(loss)  # waits for the device
        self._steps += 1
        return time.monotonic() - begun
