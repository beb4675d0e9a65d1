"""Checks that several processes train the same run that one process would."""

from torch import nn

from normlab.common.errors import UserError
from normlab.config.schema import ClassIncremental, RunConfig
from normlab.data.datasets import Data
from normlab.norms import BatchStatistics, Noise

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def check_settings(config: RunConfig, world: int) -> None:
    """Check the settings of a run that `world` processes train.

    Raises:
        UserError: for settings with which several processes would train another run than one.
    """
    if world == 1:
        return
    if config.batch % world:
        nearest = max(1, round(config.batch / world)) * world
        raise UserError(
            f"batch={config.batch} is the batch of all processes together, and {world} do not divide it.\n"
            f"Nearest valid: batch={nearest}, or another number of processes."
        )
    if config.probe:
        raise UserError(
            f"probe=[{','.join(config.probe)}] measures in one process, and this run has {world}.\n"
            "Use one process, or probe=[]."
        )
    if isinstance(config.sampler, ClassIncremental):
        raise UserError(
            f"sampler=class_incremental makes batches of two parts, which {world} processes would not divide alike.\n"
            "Use one process, or sampler=iid."
        )
    if config.optimizer.precondition:
        raise UserError(
            f"optimizer.precondition={config.optimizer.precondition} needs the statistics of the whole batch, and each"
            f" of {world} processes has its own.\nUse one process, or optimizer.precondition=null with another norm."
        )
    if config.device.startswith("cuda:"):
        raise UserError(
            f"device={config.device} is one GPU, and each of {world} processes needs its own.\n"
            "Use device=cuda: the processes of a machine take its GPUs in order."
        )


def prepare_layers(config: RunConfig, network: nn.Module, data: Data, world: int) -> None:
    """Let the layers of `network`, in `world` processes together, compute what they do in one; in place.

    With `norm_batch` every group lies in one process, and is the one of a single process. Only the smaller last batch
    of an epoch (without drop_last) can fall into other groups: each process groups its own images of it.

    Raises:
        UserError: if they cannot.
    """
    if world == 1:
        return
    last = data.train.images % config.batch
    if 0 < last < world:
        raise UserError(
            f"The last batch of an epoch has {last} of {data.train.images} images, fewer than the {world} processes.\n"
            "Use drop_last=true, another batch, or fewer processes."
        )
    layers = []
    for name, module in network.named_modules():
        if isinstance(module, BatchStatistics):
            layers.append(module)
        elif hasattr(module, "track_running_stats") and not isinstance(module, INSTANCE_NORMS):
            raise UserError(
                f"{name} is a {type(module).__name__} of PyTorch, whose statistics are of one process's images.\n"
                "Use normlab.norms.GroupedBatchNorm2d in its place, or one process."
            )
        elif isinstance(module, Noise):
            raise UserError(
                f"norm={config.norm.name} draws noise that all images of a batch share, in one process.\n"
                "Use one process, or another norm."
            )
    share = config.batch // world
    if not layers or config.sync_stats:
        return
    if config.norm_batch is None:
        raise UserError(
            f"norm={config.norm.name} normalizes by statistics of the whole batch, and each of {world} processes has"
            f" {share} of its {config.batch} images.\n"
            "Use sync_stats=true: the same statistics, taken over all processes;\n"
            f"or norm_batch={share}: those of each process's own images."
        )
    group = config.norm_batch
    if share % group:
        nearest = min((k for k in range(1, share + 1) if share % k == 0), key=lambda k: abs(k - group))
        raise UserError(
            f"norm_batch={group} makes groups of images across processes: each of {world} has {share} of"
            f" batch={config.batch}.\nNearest valid: norm_batch={nearest}, a divisor of {share}."
        )
    if last % world and any(layer.slides_over_groups for layer in layers):
        raise UserError(
            f"norm={config.norm.name} averages over as many groups of each of {world} processes, and the last batch of"
            f" an epoch has {last} images.\nUse drop_last=true, or one process."
        )
    for layer in layers:
        layer.averages_over_processes = True
