"""A few training steps on random images, to see how fast they are."""

import time

import torch

from normlab import models
from normlab.config.schema import RunConfig
from normlab.norms import Steps
from normlab.training import taps
from normlab.training.gradient_transforms import build_transform
from normlab.training.optimizers import build_optimizer
from normlab.training.step import Step
from normlab.training.tasks import task_of


class Trial:
    """Steps of a run's own network, optimizer and batch on `device`; for images of `side` pixels. Nothing is kept."""

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        *,
        side: int,
        channels: int,
        classes: int,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.device, self.made = device, 0
        regression = config.dataset.kind == "linear_regression"
        network = models.build(config, num_classes=classes, image_size=side).to(device).train()
        network = network.to(memory_format=memory_format)
        if device.type == "cpu":
            taps.trim(network, torch.zeros(1, channels, side, side))
        self.step = Step(
            config,
            device,
            task_of("regression" if regression else "classification", config.label_smoothing),
            network,
            network,
            Steps(network),
            build_optimizer(config.optimizer, network),
            torch.amp.GradScaler(device.type, enabled=False),
            build_transform(config.optimizer, network),
        )
        self.images = torch.randn(config.batch, channels, side, side, device=device)
        shape, kind = ((config.batch, classes), torch.float32) if regression else ((config.batch,), torch.int64)
        self.labels = torch.zeros(shape, dtype=kind, device=device)

    def seconds(self) -> float:
        """Of one more step."""
        begun = time.monotonic()
        self.step.layers.begin(self.made, 1000)
        loss, _ = self.step(self.images, self.labels, len(self.images))
        float(loss)  # waits for the device
        self.made += 1
        return time.monotonic() - begun

    def fastest(self, steps: int, limit_seconds: float) -> float:
        """Seconds of the fastest of `steps` steps after one that warms up, or of as many as fit into the time: one."""
        begun = time.monotonic()
        self.seconds()
        times = [self.seconds()]
        while len(times) < steps and time.monotonic() - begun < limit_seconds:
            times.append(self.seconds())
        return min(times)
