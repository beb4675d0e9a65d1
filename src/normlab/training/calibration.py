"""What a run would cost, from a few of its steps on random images."""

import time

import torch

from normlab import models
from normlab.config import RegressionDataset, RunConfig
from normlab.data.inventory import Inventory
from normlab.norms import Steps
from normlab.training import device
from normlab.training.gradients import build_transform
from normlab.training.optimizers import build_optimizer
from normlab.training.tasks import task_of

STEPS = 5  # after one that warms up
UNKNOWN_SIZE = 224  # pixels, of images that have no common size


def calibrate(config: RunConfig, data: Inventory, share: str, threads: int, limit_seconds: float) -> tuple[float, int]:
    """Seconds that one epoch and its evaluation would take, and the peak memory in bytes.

    Probes, precise statistics and reading images from files are left out. An evaluated image counts as a third of a
    trained one [A: a forward pass of three of its length].
    """
    where = device.choose(config.device, share)
    device.prepare(config, where, config.threads or threads)
    dataset = config.dataset
    if isinstance(dataset, RegressionDataset):
        side, channels, classes = 1, dataset.features, dataset.features
        targets = torch.randn(config.batch, classes, device=where)
        task = task_of("regression", 0.0)
    else:
        side, channels, classes = dataset.crop_size or data.image_size or UNKNOWN_SIZE, 3, data.classes or 1000
        targets = torch.randint(classes, (config.batch,), device=where)
        task = task_of("classification", config.label_smoothing)
    network = models.build(config, num_classes=classes, image_size=side).to(where).train()
    optimizer = build_optimizer(config.optimizer, network)
    transform, layers = build_transform(config.optimizer, network), Steps(network)
    images = torch.randn(config.batch, channels, side, side, device=where)
    times: list[float] = []
    begun = time.monotonic()
    while len(times) < 1 + STEPS and (len(times) < 2 or time.monotonic() - begun < limit_seconds):
        clock = time.monotonic()
        layers.begin(len(times), 1000)
        optimizer.zero_grad(set_to_none=True)
        with device.autocast(config, where):
            loss = task.loss(network(images), targets)
        loss.backward()
        if transform:
            transform()
        optimizer.step()
        layers.end()
        float(loss.detach())  # waits for the device
        times.append(time.monotonic() - clock)
    step = min(times[1:])
    evaluation = data.test_images / config.batch * step / 3 / config.eval_every
    return step * data.train_images / config.batch + evaluation, device.peak_memory_bytes(where)
