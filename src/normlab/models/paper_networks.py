"""The papers' networks that torchvision does not have. Each draws its weights from the global generator."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def he_fan_out(network: nn.Module) -> None:
    """Torchvision's start of a convolution: normal with variance 2 / (out · kh · kw), biases at 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class CifarResNet(nn.Module):
    """The ResNet of He et al. 2016, section 4.2, of depth 6n + 2, for images (N, 3, H, W).

    A 3x3 stem of 16 filters, three stages of n blocks with 16, 32 and 64 channels, the mean over H and W, one linear
    layer. The convolutions start as torchvision's ([A]: the paper names He et al. 2015, which has fan-in and fan-out).
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(16, 16, blocks)
        self.layer2 = self._stage(16, 32, blocks)
        self.layer3 = self._stage(32, 64, blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        he_fan_out(self)

    @staticmethod
    def _stage(before: int, channels: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(CifarBlock(before, channels), *(CifarBlock(channels, channels) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class CifarBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x))))));  3x3 convolutions, at stride 2 where the channels grow.

    The shortcut has no parameters (option A): every second pixel, and zeros for the new channels ([A]: behind the
    old ones).
    """

    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        self.stride = 1 if channels == before else 2
        self.new_channels = channels - before
        self.conv1 = nn.Conv2d(before, channels, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.new_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return self.relu(residual + x)


class GitmanCifarNet(nn.Module):
    """The CIFAR network of Gitman & Ginsburg 2017, after the co-author's configuration files of the time.

    Images (N, 3, 28, 28): 3 x conv3x3-128, pool to 14x14, 3 x conv3x3-256, pool to 7x7, conv3x3-320 to 5x5,
    conv1x1-320, conv1x1-classes, mean over H and W. A ReLU follows every convolution, the last one too; batch
    normalisation stands between the third and the sixth and their ReLU ([A]: not behind it).

    Those are files for Caffe, whose pooling rounds sizes up, and whose "xavier" is U(-a, a) with
    a = sqrt(3 / fan-in) and biases at 0 ([A]: not Glorot's mean of fan-in and fan-out).
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        widths = (3, 128, 128, 128, 256, 256, 256, 320, 320, num_classes)
        layers: list[nn.Module] = []
        for number, (before, filters) in enumerate(itertools.pairwise(widths), start=1):
            normalised = number in (3, 6)
            size, padding = (3, 1) if number <= 6 else (3, 0) if number == 7 else (1, 0)
            convolution = nn.Conv2d(before, filters, size, padding=padding, bias=not normalised)
            nn.init.kaiming_uniform_(convolution.weight, nonlinearity="linear")  # U(-a, a), a = sqrt(3 / fan-in)
            layers.append(convolution)
            if normalised:
                layers.append(nn.BatchNorm2d(filters, eps=1e-4, momentum=0.1))  # 0.1 is 1 - Caffe's fraction of 0.9
            else:
                nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            layers.append(nn.ReLU(inplace=True))
            if normalised:
                layers.append(nn.MaxPool2d(3, stride=2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        return torch.flatten(self.avgpool(self.features(images)), 1)


class DeepLinear(nn.Module):
    """The deep linear network of Santurkar et al. 2018: y = W_k ... W_1 x, square matrices, no activation.

    x (N, features, 1, 1) -> (N, features). The matrices are 1x1 convolutions, each with batch normalisation behind
    it ([A]: also the last), and start as Glorot's U(-a, a), a = sqrt(3 / features) ([A]: uniform, not normal).
    """

    def __init__(self, features: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for _ in range(depth):
            matrix = nn.Conv2d(features, features, 1, bias=False)
            nn.init.xavier_uniform_(matrix.weight)
            self.layers.extend([matrix, nn.BatchNorm2d(features)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.layers(x), 1)
