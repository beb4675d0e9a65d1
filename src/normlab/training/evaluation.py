"""The evaluation of a network after an epoch."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from normlab.data.batches import Split
from normlab.norms import apart, batch_statistics, precise_statistics
from normlab.training.device import autocast
from normlab.training.optimizers import learning_rate
from normlab.training.state import TrainingState
from normlab.training.supervision import Supervisor


def evaluate_epoch(state: TrainingState, supervisor: Supervisor) -> dict[str, Any]:
    """Evaluate the network, or the average of its weights; return the epoch's row of metrics.

    Training loss and accuracy are those seen while training this epoch.

    Raises:
        InterruptedRunError: when a stop was requested.
    """
    config, data, position, task = state.config, state.data, state.position, state.step.task
    network = state.step.averaged.module if state.step.averaged else state.step.network
    end = state.steps_until(position.epoch + 1)
    sizes = torch.full_like(position.losses, config.batch)
    sizes[-1] = data.train.images_of(data.train.steps - 1)
    loss, correct = task.train_loss(position.losses, sizes), int(position.correct.sum())
    row = {"epoch": position.epoch + 1, "step": end, **task.metrics("train", loss, correct, data.train.images)}
    with apart(), _statistics(state, network, supervisor):
        for name, split in (("val", data.val), ("test", data.test)):
            if split is not None:
                row |= task.metrics(name, *evaluate(state, network, split, supervisor), len(split))
    supervisor.stopwatch.lap(training=False)
    row["lr"] = learning_rate(config, end - 1, data.train.steps)
    row["images_per_second"] = position.train_images / position.train_seconds
    row["wall_seconds"] = position.wall_seconds
    position.train_seconds, position.train_images = 0.0, 0
    return row


def _statistics(state: TrainingState, network: nn.Module, supervisor: Supervisor) -> AbstractContextManager[None]:
    """Return a context in which `network` normalizes by the statistics of `eval_stats`.

    Every process measures precise statistics by itself.
    """
    config = state.config
    if config.eval_stats == "batch":
        return batch_statistics(network)
    if config.eval_stats == "precise":
        batches = supervisor.watch(state.data.train.plain_batches(config.precise_batches))
        return precise_statistics(network, batches, within=autocast(config, state.device))
    return nullcontext()


@torch.inference_mode()
def evaluate(state: TrainingState, network: nn.Module, split: Split, supervisor: Supervisor) -> tuple[float, int]:
    """Return the sums over `split` of the loss (without label smoothing) and of correct classifications."""
    network.eval()
    loss = torch.zeros((), dtype=torch.float64, device=state.device)
    correct = torch.zeros((), dtype=torch.int64, device=state.device)
    for images, labels in supervisor.watch(split.batches(), split.shared_batches):
        with autocast(state.config, state.device):
            outputs = network(images)
        loss += state.step.task.test_loss(outputs, labels)
        correct += state.step.task.correct(outputs, labels)
        state.interleaver.after_step()
    state.interleaver.synchronize()
    if split.processes > 1:  # else every process has evaluated all of it
        state.group.all_reduce(loss)
        state.group.all_reduce(correct)
    return float(loss), int(correct)
