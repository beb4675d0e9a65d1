"""What sampler=class_incremental does between epochs: a task's start, and the images that are kept at its end."""

import torch
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.data.incremental import TaskSequence
from normlab.training.device import autocast
from normlab.training.optimizers import restart_optimizer
from normlab.training.state import TrainingState
from normlab.training.tasks import SeenClasses


def start_epoch(state: TrainingState, tasks: TaskSequence) -> None:
    """Let the run learn and evaluate the classes that have come; with a new task its optimizer starts anew."""
    task, position = state.step.task, state.position
    assert isinstance(task, SeenClasses)
    task.seen.copy_(tasks.seen(tasks.task_of(position.epoch)))
    if position.batch == 0 and position.epoch % tasks.epochs == 0:
        restart_optimizer(state.step.optimizer)


def classifier(network: nn.Module) -> nn.Linear:
    """Return the last linear layer of a network, whose inputs are its features.

    Raises:
        UserError: if it has none.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UserError(
            f"sampler.exemplars=herding looks at the inputs of the last linear layer, and {type(network).__name__} has"
            " none.\nUse sampler.exemplars=random."
        )
    return layers[-1]


@torch.inference_mode()
def choose_exemplars(state: TrainingState, tasks: TaskSequence) -> None:
    """Rank the images of the task that ends by `TaskSequence.herd`, by their features in the evaluated network."""
    network = state.step.averaged.module if state.step.averaged else state.step.network
    network.eval()
    found: list[Tensor] = []
    hook = classifier(network).register_forward_pre_hook(
        lambda layer, inputs: found.append(inputs[0].flatten(1).float())
    )
    with hook, autocast(state.config, state.device):
        for label in tasks.classes[tasks.task_of(state.position.epoch)].tolist():
            positions = (tasks.labels == label).nonzero().flatten()
            found.clear()
            for images, _ in state.data.train.plain(positions):
                network(images)
            if found:
                tasks.herd(positions, torch.cat(found).cpu())
