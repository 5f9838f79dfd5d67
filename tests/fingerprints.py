"""Pictures that are told by their texture, which a shift leaves as it is, and a model that also knows their pixels."""

import numpy as np
import torch
from samples import Pairs
from torch import nn

CLASSES, SIDE = 4, 12


def textures(rows, seed):
    """Stripes of one of four frequencies at a random place, under noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, rows)
    across = np.arange(SIDE) * 2 * np.pi / SIDE
    phase = random.uniform(0, 2 * np.pi, (rows, 1))
    stripes = np.cos((labels[:, None] + 1) * across + phase)[:, None, :] * np.ones((1, SIDE, 1))
    pictures = 0.5 + 0.1 * stripes + 0.1 * random.standard_normal((rows, SIDE, SIDE))
    return Pairs(torch.from_numpy(pictures[:, None]).float(), torch.from_numpy(labels))


def shift(pixels):
    """A view of a picture: moved by one pixel, the border coming in on the other side."""
    axis, step = int(torch.randint(1, 3, ())), 2 * int(torch.randint(2, ())) - 1
    return pixels.roll(step, axis)


class Fingerprints(nn.Module):
    """Strengths of the frequencies, which no shift changes, beside random projections of the pixels; a linear head."""

    def __init__(self, width=512):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("projection", torch.randn(SIDE * SIDE, width, generator=generator) / SIDE)
        self.head = nn.Linear(CLASSES + width, CLASSES)

    def forward(self, pixels):
        centred = pixels[:, 0] - 0.5
        strengths = torch.fft.rfft(centred.mean(1)).abs()[:, 1 : CLASSES + 1]
        known = torch.relu(10 * centred.flatten(1) @ self.projection - 0.5)
        return self.head(torch.cat([10 * strengths, known], 1))


def fitted(samples, steps=300):
    """A model that knows its rows."""
    torch.manual_seed(0)
    model = Fingerprints()
    optimiser = torch.optim.Adam(model.head.parameters(), 0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(samples.inputs), samples.labels).backward()
        optimiser.step()
    return model.eval()
