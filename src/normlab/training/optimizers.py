"""Optimizers with parameter groups by module type, and learning-rate schedules as pure functions."""

import math
from typing import Any

import torch
from torch import nn

from normlab.config import SGD, Adam, Cosine, OptimizerConfig, Polynomial, RunConfig, Step
from normlab.norms import parameter_roles


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """One group per role of parameters ("weight", "bias", "scale", "shift"; by the type of the owning module)
    and per divisor of the learning rate: `params`, `role`, `lr_divisor`."""
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for parameter, role, divisor in parameter_roles(network):
        groups.setdefault((role, divisor), []).append(parameter)
    return [{"params": params, "role": role, "lr_divisor": divisor} for (role, divisor), params in groups.items()]


def build_optimizer(config: OptimizerConfig, network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run. Weights decay; biases, shifts and scales only with `decay_norm_and_bias`."""
    groups = parameter_groups(network)
    for group in groups:
        decays = group["role"] == "weight" or config.decay_norm_and_bias
        group["weight_decay"] = config.weight_decay if decays else 0.0
    if isinstance(config, SGD):
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.nesterov)
    elif isinstance(config, Adam):
        kind = torch.optim.AdamW if config.decoupled else torch.optim.Adam
        optimizer = kind(groups, config.lr, (config.betas[0], config.betas[1]), config.eps)
    else:
        optimizer = torch.optim.RMSprop(groups, config.lr, config.alpha, config.eps, momentum=config.momentum)
    set_learning_rate(optimizer, config.lr)
    return optimizer


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
    """To each group its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr / group["lr_divisor"]
