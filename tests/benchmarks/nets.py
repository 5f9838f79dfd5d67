"""The benchmarks' models for 32 x 32 images, small enough to train on two CPU threads, and how each is trained."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class SmallResNet(nn.Module):
    """Four stages with BatchNorm, global pooling and a linear head."""

    def __init__(self, num_classes: int = 10, widths: tuple[int, int, int, int] = (32, 64, 128, 192)) -> None:
        super().__init__()
        a, b, c, d = widths
        self.stem = nn.Sequential(_conv(3, a), nn.MaxPool2d(2))
        self.stage1 = nn.Sequential(_conv(a, b), nn.MaxPool2d(2), _Residual(b))
        self.stage2 = nn.Sequential(_conv(b, c), nn.MaxPool2d(2))
        self.stage3 = nn.Sequential(_conv(c, d), _Residual(d))
        self.fc = nn.Linear(d, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.fc(torch.amax(x, dim=(2, 3)))


class PlainCNN(nn.Module):
    """Neither BatchNorm nor residuals: GroupNorm, a strided convolution, and a hidden layer before the head."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.GroupNorm(8, outputs), nn.GELU()]

        convolutions = [
            *block(3, 48),
            nn.MaxPool2d(2),
            *block(48, 96),
            nn.MaxPool2d(2),
            *block(96, 128),
            *block(128, 128, 2),
        ]
        self.body = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 256), nn.GELU())
        self.classifier = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


@dataclass(frozen=True)
class Training:
    """A net and how it is trained: rows from the start of the split, epochs, seed, learning rate, and random crops beside flips."""

    make: Callable[[], nn.Module]
    rows: int
    epochs: int
    seed: int
    rate: float = 0.4
    crops: bool = True


NETS = {
    "resnet": Training(SmallResNet, 50_000, 9, 0),
    "narrow": Training(lambda: SmallResNet(widths=(24, 48, 80, 128)), 30_000, 10, 7),
    "plain": Training(PlainCNN, 30_000, 10, 3, rate=0.05, crops=False),
}


def small_resnet(num_classes: int = 10) -> SmallResNet:
    """Build the residual network; the factory that a model spec names."""
    return SmallResNet(num_classes)
