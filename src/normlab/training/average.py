"""A moving average of the weights, to be evaluated in their place."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Average(AveragedModel):
    """PyTorch's average, of which only the first update reads on the host how many there have been."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # of PyTorch
        # With a device, or the number of updates would be on the host, where no replay counts it.
        super().__init__(network, next(network.parameters()).device, multi_avg_fn=self.average)
        self.begun = False

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the parameters and buffers of `model` into the average."""
        if not self.begun:
            super().update_parameters(model)
            self.begun = True
            return
        self.average(list(self.module.parameters()), list(model.parameters()), None)
        if buffers := list(self.module.buffers()):
            torch._foreach_copy_(buffers, list(model.buffers()))
        self.n_averaged += 1
