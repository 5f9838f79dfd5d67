"""Logits at many positions that never stand whole: what the output layer sees, and slices of logits made from it.

What is made of such logits is made slice by slice (``of_positions``), and a pull on them is brought back to what the
output layer sees before the next slice is made (``pull_of_positions``); what scales it afterwards is the same for both.

Shapes: B samples, T positions, C outputs, H inputs of the output layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

OUTPUTS = 2**24  # numbers of outputs that are made at once, where a sample has many positions


class Projected:
    """Stands for logits ``[B, T, C]`` wherever they are taken in slices of positions.

    Attributes:
        hidden_BTH: what the output layer sees.
        weight_CH: the output layer's, which does not move.
        bias_C: the same, or None.
        dtype: of the logits: the layer's, or the one that autocast runs it in.
    """

    ndim = 3

    def __init__(self, hidden_BTH: Tensor, layer: nn.Linear, autocast: torch.dtype | None = None) -> None:
        self.hidden_BTH, self.dtype = hidden_BTH, autocast or layer.weight.dtype
        self.shape, self.device = torch.Size((*hidden_BTH.shape[:2], layer.out_features)), hidden_BTH.device
        self.weight_CH = layer.weight.detach().to(self.dtype)
        self.bias_C = None if layer.bias is None else layer.bias.detach().to(self.dtype)

    def __getitem__(self, place: tuple[slice, slice]) -> Tensor:
        """Logits of some samples at some positions, without gradients."""
        return functional.linear(self.hidden_BTH[place].detach().to(self.dtype), self.weight_CH, self.bias_C)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"logits that are made in slices have no {name!r}: they never stand whole; expected of_positions or "
            "pull_of_positions around what is done with them (imu_ray.influence.projection)"
        )

    def parts(self) -> list[slice]:
        """The positions in slices of at most ``OUTPUTS`` logits, or of one position."""
        rows, positions, width = self.shape
        size = max(1, OUTPUTS // max(1, rows * width))
        return [slice(start, start + size) for start in range(0, positions, size)]

    def back(self, pull_BtC: Tensor) -> Tensor:
        """The pull on what the output layer sees ``[B, t, H]``, float32 at least, of one on some logits."""
        found = pull_BtC.to(self.dtype) @ self.weight_CH
        return found.to(torch.promote_types(found.dtype, torch.float32))


def of_positions(function: Callable[..., Tensor], outputs: Tensor, *others: Tensor) -> Tensor:
    """A function of outputs and of what else there is at each position; of projected outputs slice by slice.

    The function takes and gives ``[B, T, ...]``, each position by itself.
    """
    if not isinstance(outputs, Projected):
        return function(outputs, *others)
    return torch.cat([function(*_at(part, outputs, *others)) for part in outputs.parts()], 1)


def pull_of_positions(function: Callable[..., Tensor], outputs: Tensor, *others: Tensor) -> Tensor:
    """The same of a function that gives a pull on the outputs, which becomes one on what a run gave (``Projected``)."""
    if not isinstance(outputs, Projected):
        return function(outputs, *others)
    parts = (_at(part, outputs, *others) for part in outputs.parts())
    return torch.cat([outputs.back(function(*each)) for each in parts], 1)


def _at(part: slice, *tensors: Any) -> list[Tensor]:
    return [each[:, part] for each in tensors]
