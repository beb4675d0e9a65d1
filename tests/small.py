"""Networks small enough for tests that are about something else."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


class SmallNet(nn.Module):
    """Two convolutions with BatchNorm2d, dropout, and a classifier; 8x8 images become 4x4 maps."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Dropout(0.1),
        )
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)))


class SmallResNet(nn.Module):
    """Two of torchvision's residual blocks, 32 and 64 channels; 8x8 images become 4x4 maps."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        downsample = nn.Sequential(nn.Conv2d(32, 64, 1, 2, bias=False), nn.BatchNorm2d(64))
        self.blocks = nn.Sequential(BasicBlock(32, 32), BasicBlock(32, 64, 2, downsample))
        self.fc = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.blocks(self.relu(self.bn1(self.conv1(images)))).mean((2, 3)))


class Net(nn.Module):
    """Layers of a dictionary, called one after another, or by a function of ours."""

    def __init__(self, call: Callable[["Net", Tensor], Tensor] | None = None, **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        if self.call:
            return self.call(self, x)
        for layer in self.children():
            x = layer(x)
        return x


def conv_bn(**layers: nn.Module) -> nn.Module:
    return Net(conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4), **layers)


def state(network: nn.Module) -> tuple[Any, ...]:
    """Modules, parameters, buffers, their values and flags, attributes, hooks and modes, by identity."""
    modules = [(name, id(module), type(module), module.training) for name, module in network.named_modules()]
    tensors = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    values = [
        (name, id(tensor), tensor.requires_grad, "lazy" if "Uninit" in type(tensor).__name__ else tensor.tolist())
        for name, tensor in tensors
    ]
    attributes = [
        (name, key, id(value), [*map(id, value.values())] if isinstance(value, dict) else None)
        for name, module in network.named_modules()
        for key, value in vars(module).items()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    return modules, values, attributes
