"""Outputs at many positions, worked on some positions at a time, and logits that never stand whole.

What a function of outputs makes on its way, often in float64, would take several times the memory of the outputs at
all positions (``of_positions``, ``pull_of_positions``). Where even the logits are too many, what the output layer sees
stands for them (``Projected``): slices of logits are made from it, and a pull on them is brought back to it before the
next slice is made; what scales it afterwards is the same for both.

Shapes: B samples, T positions, C outputs, H inputs of the output layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

OUTPUTS = 2**24  # numbers of outputs that are made at once, where a sample has many positions
SLICE = 2**20  # numbers of outputs at many positions that are worked on at once


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
        return position_slices(self.shape, OUTPUTS)

    def back(self, pull_BtC: Tensor) -> Tensor:
        """The pull on what the output layer sees ``[B, t, H]``, float32 at least, of one on some logits."""
        found = pull_BtC.to(self.dtype) @ self.weight_CH
        return found.to(torch.promote_types(found.dtype, torch.float32))


def of_positions(function: Callable[..., Tensor], outputs: Tensor, *others: Tensor) -> Tensor:
    """A function of outputs and of what else there is at each position, some positions at a time.

    The function takes and gives ``[B, T, ...]``, each position by itself.
    """
    if isinstance(outputs, Projected):
        return torch.cat([of_positions(function, *_at(part, outputs, *others)) for part in outputs.parts()], 1)
    parts = position_slices(outputs.shape, SLICE)
    return torch.cat([function(*_at(part, outputs, *others)) for part in parts], 1)


def pull_of_positions(function: Callable[..., Tensor], outputs: Tensor, *others: Tensor) -> Tensor:
    """The same of a function that gives a pull on the outputs.

    Returns:
        The pull on what a run gave (``Projected``), in its type, float32 at least. Outputs ``[B, C]`` have one
        position; the pull is then in the function's type.
    """
    if outputs.ndim == 2:
        return function(outputs, *others)
    if isinstance(outputs, Projected):
        parts = outputs.parts()
        return torch.cat([outputs.back(pull_of_positions(function, *_at(part, outputs, *others))) for part in parts], 1)
    found = torch.empty_like(outputs, dtype=torch.promote_types(outputs.dtype, torch.float32))
    for part in position_slices(outputs.shape, SLICE):
        found[:, part] = function(*_at(part, outputs, *others))
    return found


def _at(part: slice, *tensors: Any) -> list[Tensor]:
    return [each[:, part] for each in tensors]


def position_slices(shape: Sequence[int], numbers: int) -> list[slice]:
    """Positions of ``[B, T, C]`` in slices of at most so many numbers, or of one position."""
    rows, positions, width = shape
    size = max(1, numbers // max(1, rows * width))
    return [slice(start, start + size) for start in range(0, positions, size)]
