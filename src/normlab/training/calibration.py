"""What a run would cost, from a few of its steps on random images."""

from normlab.config.schema import RegressionDataset, RunConfig
from normlab.data.inventory import Inventory
from normlab.training import device
from normlab.training.trial import Trial

STEPS = 5
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
    else:
        side, channels, classes = dataset.crop_size or data.image_size or UNKNOWN_SIZE, 3, data.classes or 1000
    trial = Trial(config, where, side=side, channels=channels, classes=classes)
    step = trial.fastest(STEPS, limit_seconds)
    evaluation = data.test_images / config.batch * step / 3 / config.eval_every
    return step * data.train_images / config.batch + evaluation, device.peak_memory_bytes(where)
