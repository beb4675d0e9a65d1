"""The binary residual network of Chen et al. 2021."""

from functools import partial

import torch
from torch import Tensor, nn

from normlab.norms import BinaryActivation, BinaryConv2d, Clock, RPReLU, Shift

LATENT = 1e-3  # weights that are binary from the start begin as U(0, LATENT), as in the authors' code


class BinaryResNet(nn.Module):
    """ReActNet-18 as Chen et al. 2021 (2104.08215) have it for CIFAR, for images (N, 3, H, W) of 8 pixels or more.

    A 3x3 stem of 64 filters, four stages of four blocks with 64, 128, 256 and 512 channels, the mean over H and W, one
    linear layer. Activations before the blocks' 3x3 convolutions are binary. The weights of these and of the 1x1
    convolutions of shortcuts are so, too, from `binarize_at` on, a fraction of the run: their two stages of training
    as one run, in which the second starts from the weights of the first. With 0 there is no first stage, with 1 no
    second. Convolutions start as PyTorch's.

    Invariant: before `binarize_at` it has the convolutions and norms of torchvision's ResNet-18 with a small stem.

    Args:
        num_classes: of the images.
        binarize_at: fraction of the run.
        width: this share of the channels, rounded ([A]: the paper's has all).
    """

    def __init__(self, num_classes: int, binarize_at: float, width: float = 1.0) -> None:
        super().__init__()
        clock = Clock("fraction", partial(_stage, binarize_at))
        first, second, third, last = (round(channels * width) for channels in (64, 128, 256, 512))
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _layer(first, first, clock)
        self.layer2 = _layer(first, second, clock)
        self.layer3 = _layer(second, third, clock)
        self.layer4 = _layer(third, last, clock)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, num_classes)
        self.fc.unclipped = True  # type: ignore[assignment]  # as the authors' adaptive clipping, its bias too
        for module in self.modules():
            if isinstance(module, BinaryConv2d) and binarize_at == 0:
                nn.init.uniform_(module.weight, 0, LATENT)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        x = self.layer2(self.layer1(self.bn1(self.conv1(images))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(self.layer4(self.layer3(x))), 1))
        return logits


def _stage(binarize_at: float, now: float, end: float) -> dict[str, float]:
    return {"binary": float(now >= binarize_at - 1e-9)}  # a fraction of steps is rounded


def _layer(before: int, channels: int, clock: Clock) -> nn.Sequential:
    return nn.Sequential(
        BinaryBlock(before, channels, clock), *(BinaryBlock(channels, channels, clock) for _ in range(3))
    )


class BinaryBlock(nn.Module):
    """rprelu(shortcut(x) + bn(conv(sign(x + b)))), a 3x3 convolution, at stride 2 where the channels grow.

    There the shortcut is the mean of 2x2 pixels, a 1x1 convolution and a norm, without a binary activation.
    """

    def __init__(self, before: int, channels: int, clock: Clock) -> None:
        super().__init__()
        stride = 1 if before == channels else 2
        self.shift = Shift(before)
        self.sign = BinaryActivation()
        self.conv = _convolution(before, channels, 3, stride, clock)
        self.bn = nn.BatchNorm2d(channels)
        self.rprelu = RPReLU(channels)
        self.downsample = nn.Sequential()
        if stride == 2:
            pool = nn.AvgPool2d(2, 2, ceil_mode=True)  # of an odd size the last row by itself, as the 3x3 goes [A]
            self.downsample = nn.Sequential(pool, _convolution(before, channels, 1, 1, clock), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum, activated."""
        output: Tensor = self.rprelu(self.bn(self.conv(self.sign(self.shift(x)))) + self.downsample(x))
        return output


def _convolution(before: int, channels: int, size: int, stride: int, clock: Clock) -> BinaryConv2d:
    plain = nn.Conv2d(before, channels, size, stride=stride, padding=size // 2, bias=False)
    return BinaryConv2d.of(plain, clock=clock)
