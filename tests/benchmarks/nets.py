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


class _Encoder(nn.Module):
    """Attention and an MLP, each with its own linear layers, so that each can be in scope."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).reshape(n, t, w))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class SmallViT(nn.Module):
    """A convolutional stem, four blocks of attention on 64 positions with LayerNorm, mean pooling and a linear head."""

    def __init__(self, num_classes: int = 10, width: int = 96, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.GELU(), nn.Conv2d(32, width, 3, 2, 1))
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*(_Encoder(width, 3) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


@dataclass(frozen=True)
class Training:
    """A net and how it is trained: rows from the start of the split, epochs, seed, learning rate, and pixels that random crops move by."""

    make: Callable[[int], nn.Module]
    rows: int
    epochs: int
    seed: int
    rate: float = 0.4
    crop: int = 4
    adam: bool = False


def narrow_resnet(num_classes: int = 10) -> SmallResNet:
    """Build the residual network with fewer channels."""
    return SmallResNet(num_classes, (24, 48, 80, 128))


NETS = {
    "resnet": Training(SmallResNet, 50_000, 9, 0),
    "narrow": Training(narrow_resnet, 30_000, 10, 7),
    "plain": Training(PlainCNN, 30_000, 10, 3, rate=0.05, crop=0),
    "deep": Training(narrow_resnet, 25_000, 10, 5),
    "vit": Training(SmallViT, 25_000, 16, 4, rate=2e-3, crop=2, adam=True),
}


def small_resnet(num_classes: int = 10) -> SmallResNet:
    """Build the residual network; the factory that a model spec names."""
    return SmallResNet(num_classes)
