"""The benchmarks' model: a residual network with BatchNorm for 32x32 images, small enough to train on two CPU threads."""

import torch
from torch import Tensor, nn


class _ConvBlock(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_ConvBlock(channels, channels), _ConvBlock(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class SmallResNet(nn.Module):
    """Four stages (32, 64, 128, 192 channels), global pooling and a linear head ``192 -> num_classes``."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(_ConvBlock(3, 32), nn.MaxPool2d(2))
        self.stage1 = nn.Sequential(_ConvBlock(32, 64), nn.MaxPool2d(2), _Residual(64))
        self.stage2 = nn.Sequential(_ConvBlock(64, 128), nn.MaxPool2d(2))
        self.stage3 = nn.Sequential(_ConvBlock(128, 192), _Residual(192))
        self.fc = nn.Linear(192, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.fc(torch.amax(x, dim=(2, 3)))


def small_resnet(num_classes: int = 10) -> SmallResNet:
    """Build the network; the factory that a model spec names."""
    return SmallResNet(num_classes)
