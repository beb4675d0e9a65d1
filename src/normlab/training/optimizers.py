"""Optimizers with parameter groups by module type, and learning-rate schedules as pure functions."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normlab.config.schema import SGD, Adam, Cosine, OptimizerConfig, Polynomial, RunConfig, Step
from normlab.norms import decayed_parameters, parameter_roles

_FUSED = (torch.ops.aten._fused_sgd_, torch.ops.aten._fused_adam_, torch.ops.aten._fused_adamw_)


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Return one group per role of parameters and per divisor of the learning rate: `params`, `role`, `lr_divisor`.

    Roles are "weight", "bias", "scale" and "shift", by the type of the owning module. `decays` says whether a group
    decays whatever the settings say of its role.
    """
    groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    always = decayed_parameters(network)
    for parameter, role, divisor in parameter_roles(network):
        groups.setdefault((role, divisor, role == "weight" or parameter in always), []).append(parameter)
    return [
        {"params": params, "role": role, "lr_divisor": divisor, "decays": decays}
        for (role, divisor, decays), params in groups.items()
    ]


def build_optimizer(config: OptimizerConfig, network: nn.Module, *, for_graph: bool = False) -> torch.optim.Optimizer:
    """Return the optimizer of a run.

    Weights decay, and what a variant lets decay; other biases, shifts and scales only with `decay_norm_and_bias`.

    An update is one operation for all parameters where PyTorch has one (SGD and Adam).

    Args:
        for_graph: learning rates are scalars on the parameters' device, and no step needs the host.
    """
    groups = parameter_groups(network)
    for group in groups:
        decays = group["decays"] or config.decay_norm_and_bias
        group["weight_decay"] = config.weight_decay if decays else 0.0
    device = next(network.parameters()).device
    on_gpu = for_graph and device.type == "cuda"  # the only ones that PyTorch lets be capturable
    if isinstance(config, SGD):
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            groups, config.lr, config.momentum, nesterov=config.nesterov, fused=True
        )
    elif isinstance(config, Adam):
        kind = torch.optim.AdamW if config.decoupled else torch.optim.Adam
        betas = (config.betas[0], config.betas[1])
        optimizer = kind(groups, config.lr, betas, config.eps, fused=True, capturable=on_gpu)
    else:
        momentum, foreach = config.momentum, on_gpu or None  # one by one, it would read the learning rate
        optimizer = torch.optim.RMSprop(
            groups, config.lr, config.alpha, config.eps, momentum=momentum, foreach=foreach, capturable=on_gpu
        )
    if on_gpu:  # else it warns of the steps before the capture
        optimizer._warned_capturable_if_run_uncaptured = True  # noqa: SLF001  # there is no public way
    if for_graph:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(config.lr, device=device)
    set_learning_rate(optimizer, config.lr)
    return optimizer


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Give `optimizer` the state that another one, perhaps on another device, `saved` by state_dict.

    Raises:
        ValueError: if it had other parameters.
    """
    groups = zip(optimizer.param_groups, saved["param_groups"], strict=True)
    optimizer.load_state_dict({**saved, "param_groups": [{**own, "params": other["params"]} for own, other in groups]})
    for parameter, state in optimizer.state.items():  # which may have been laid out in memory in another way
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def updating(device: torch.device) -> AbstractContextManager[object]:
    """Return a context for an update on `device`."""
    return _InMemoryOrder() if device.type == "cpu" else nullcontext()  # type: ignore[no-untyped-call]


class _InMemoryOrder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives an update that is one operation its tensors as they are in memory.

    PyTorch's own on a CPU copy each gradient that is not contiguous, and pair values as they are in memory also where
    a parameter, its gradient and its state are laid out in different ways (2.14).
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket not in _FUSED:
            return func(*args, **(kwargs or {}))
        rows = zip(*(tensors for tensors in args if tensors), strict=True)  # a parameter, its gradient, its state
        views = list(zip(*map(_in_memory_order, rows), strict=True))
        contiguous = [[view.contiguous() for view in each] for each in views]
        lists = iter(contiguous)
        func(*(next(lists) if tensors else tensors for tensors in args), **(kwargs or {}))
        for view, updated in zip(chain(*views), chain(*contiguous), strict=True):
            if updated is not view:
                view.copy_(updated)
        return None


def _in_memory_order(row: tuple[Tensor, ...]) -> list[Tensor]:
    """Return views of tensors of one shape, or of none, in the order of the first one's values in memory."""
    order = sorted(range(row[0].dim()), key=row[0].stride, reverse=True)
    return [one.permute(order) if one.dim() else one for one in row]


def restart_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Set an optimizer to where one that is new would be, in place: a captured step keeps its tensors."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


def learning_rate(config: RunConfig, step: int, steps_per_epoch: int, divisor: float = 1.0) -> float:
    """Return the learning rate of `step` (0-based) of a run, of parameters that learn at the rate over `divisor`.

    After a linear warm-up that reaches `base` at its end, the schedule runs over the rest, t in [0, 1):
    step: base · gamma^(milestones passed, as fractions of the whole run); cosine: from base to final_lr by
    half a cosine; polynomial: final_lr + (base - final_lr) · (1 - t)^power. `divisor` divides base, and final_lr only
    with `divide_final_lr`: in the code of Davis & Frank 2021 all parameters end at one rate. With `cycles` this
    holds of each of the equal parts that the run is then made of.
    """
    return _undivided_rate(config, step, steps_per_epoch, divisor) / divisor


def _undivided_rate(config: RunConfig, step: int, steps_per_epoch: int, divisor: float) -> float:
    schedule, base = config.schedule, config.optimizer.lr
    steps = config.scheduled_epochs * steps_per_epoch
    step %= steps  # each task has a schedule of its own
    cycles = getattr(schedule, "cycles", 1)
    step -= math.ceil(step * cycles // steps * steps / cycles)  # the first of its cycle
    epochs = config.scheduled_epochs / cycles
    warmup = schedule.warmup_epochs
    epoch = step / steps_per_epoch
    if epoch < warmup:
        return base * (step + 1) / math.ceil(warmup * steps_per_epoch)
    if schedule.per == "epoch":
        epoch = max(float(step // steps_per_epoch), warmup)
    t = (epoch - warmup) / (epochs - warmup)
    if isinstance(schedule, Step):
        return base * math.pow(schedule.gamma, sum(epoch + 1e-9 >= one * epochs for one in schedule.milestones))
    if isinstance(schedule, Cosine):
        final = _final_rate(schedule, base, divisor)
        return final + (base - final) * (1 + math.cos(math.pi * t)) / 2
    if isinstance(schedule, Polynomial):
        final = _final_rate(schedule, base, divisor)
        return final + (base - final) * math.pow(1 - t, schedule.power)
    return base


def _final_rate(schedule: Cosine | Polynomial, base: float, divisor: float) -> float:
    return min(schedule.final_lr if schedule.divide_final_lr else schedule.final_lr * divisor, base)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float | Callable[[float], float]) -> None:
    """Give each group its learning rate: a function of its divisor, or its share of one number."""
    for group in optimizer.param_groups:
        rate = lr(group["lr_divisor"]) if callable(lr) else lr / group["lr_divisor"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
