"""Optimizers with parameter groups by module type, and learning-rate schedules as pure functions."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from normlab.config import SGD, Adam, Cosine, OptimizerConfig, Polynomial, RunConfig, Step

WEIGHT_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def parameter_groups(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(weights of convolutions and linear layers, everything else: scales, shifts, biases).

    By the type of the owning module: shapes and names misfile a 1-output Linear or a 1-channel norm.
    """
    weights: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:  # shared between modules
                continue
            seen.add(parameter)
            is_weight = isinstance(module, WEIGHT_LAYERS) and name != "bias"
            (weights if is_weight else others).append(parameter)
    return weights, others


def build_optimizer(config: OptimizerConfig, network: nn.Module) -> torch.optim.Optimizer:
    weights, others = parameter_groups(network)
    decay = config.weight_decay
    groups = [
        {"params": weights, "weight_decay": decay},
        {"params": others, "weight_decay": decay if config.decay_norm_and_bias else 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if isinstance(config, SGD):
        return torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.nesterov)
    if isinstance(config, Adam):
        kind = torch.optim.AdamW if config.decoupled else torch.optim.Adam
        return kind(groups, config.lr, (config.betas[0], config.betas[1]), config.eps)
    return torch.optim.RMSprop(groups, config.lr, config.alpha, config.eps, momentum=config.momentum)


def learning_rate(config: RunConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of `step` (0-based) of a run.

    After a linear warm-up that reaches `base` at its end, the schedule runs over the rest, t in [0, 1):
    step: base · gamma^(milestones passed, as fractions of the whole run); cosine: from base to final_lr by
    half a cosine; polynomial: final_lr + (base - final_lr) · (1 - t)^power.
    """
    schedule, base, epochs = config.schedule, config.optimizer.lr, config.epochs
    warmup = schedule.warmup_epochs
    epoch = step / steps_per_epoch
    if epoch < warmup:
        return base * (step + 1) / math.ceil(warmup * steps_per_epoch)
    if schedule.per == "epoch":
        epoch = max(float(step // steps_per_epoch), warmup)
    t = (epoch - warmup) / (epochs - warmup)
    if isinstance(schedule, Step):
        return base * schedule.gamma ** sum(epoch + 1e-9 >= milestone * epochs for milestone in schedule.milestones)
    if isinstance(schedule, Cosine):
        final = min(schedule.final_lr, base)
        return final + (base - final) * (1 + math.cos(math.pi * t)) / 2
    if isinstance(schedule, Polynomial):
        final = min(schedule.final_lr, base)
        return final + (base - final) * (1 - t) ** schedule.power
    return base


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    groups: Iterable[dict[str, object]] = optimizer.param_groups
    for group in groups:
        group["lr"] = lr
