"""Small classifiers whose heads have the names that real ones have."""

from collections import OrderedDict

import torch
from torch import nn


def backbone(channels=1, width=12):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, width), nn.Tanh()
    )  # fmt: skip


class Named(nn.Module):
    """``body`` and a head under a dotted name, such as ``heads.head``."""

    def __init__(self, name, classes=5, bias=True):
        super().__init__()
        self.body = backbone()
        parts = name.split(".")
        head = nn.Linear(12, classes, bias=bias)
        if parts[-1].isdigit():
            head = nn.Sequential(*[nn.Identity() for _ in range(int(parts[-1]))], head)
            parts = parts[:-1]
        for part in reversed(parts[1:]):
            head = nn.Sequential(OrderedDict([(part, head)]))
        self.add_module(parts[0], head)
        self.top = parts[0]

    def forward(self, x):
        return getattr(self, self.top)(self.body(x))


def named(name="fc", classes=5, bias=True, seed=0):
    """A fixed random model with lively BatchNorm statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Named(name, classes, bias)
        with torch.no_grad():
            model(torch.randn(64, 1, 6, 6))
    return model.eval()


class NoLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 1)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


class LogProbabilities(nn.Module):
    """Something stands after the head, so its output is not the model's."""

    def __init__(self):
        super().__init__()
        self.body = backbone()
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(self.body(x)).log_softmax(1)


class Scaled(nn.Module):
    """Changes the head's output in place."""

    def __init__(self):
        super().__init__()
        self.inner = named("fc")

    def forward(self, x):
        z = self.inner(x)
        z /= 3
        return z


class Twice(nn.Module):
    """Calls its head twice in a forward pass."""

    def __init__(self):
        super().__init__()
        self.inner = named("fc")

    def forward(self, x):
        self.inner(x + 1)
        return self.inner(x)


class CosineLinear(nn.Linear):
    def forward(self, x):
        return 5 * nn.functional.normalize(x) @ nn.functional.normalize(self.weight).T


def cosine():
    model = named("fc")
    model.fc = CosineLinear(12, 5)
    return model
