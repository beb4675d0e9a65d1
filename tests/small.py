"""Networks small enough for tests that are about something else."""

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
