"""A moving average of the weights, to be evaluated in their place."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Average(AveragedModel):
    """PyTorch's, but that only its first update asks the device how many there have been."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.decay, self.begun = decay, False

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        if not self.begun:
            super().update_parameters(model)
            self.begun = True
            return
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - self.decay)
        for own, new in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(new)
        self.n_averaged += 1
