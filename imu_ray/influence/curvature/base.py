"""Curvature of the forget-set loss in the head: additive statistics, their merge, and the damped inverse.

A curvature is fitted by ``reduce``, which maps a pure function over feature blocks and merges the results in a binary tree
over block index; it runs in a loop or on Ray.

Shapes: C classes, D head inputs with the bias input.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from imu_ray.errors import NonFiniteError
from imu_ray.influence.gradients import LayerIO, gradient_sum, squared_gradient_sum

S = TypeVar("S", bound="Additive")


class Additive(Protocol):
    """Statistics that can be merged pairwise."""

    def merge(self: S, other: S) -> S:
        """The statistics of both."""
        ...


Reduce = Callable[[Callable[[LayerIO], S]], S]


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of the per-sample head gradients; float64."""

    count: int
    gradient_sum_CD: Tensor
    squared_sum_CD: Tensor

    @classmethod
    def of(cls, layer_io: LayerIO) -> "Moments":
        """Moments of one block."""
        return cls(len(layer_io.inputs_BTD), gradient_sum(layer_io), squared_gradient_sum(layer_io))

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both blocks."""
        return Moments(
            self.count + other.count,
            self.gradient_sum_CD + other.gradient_sum_CD,
            self.squared_sum_CD + other.squared_sum_CD,
        )

    @property
    def mean_gradient_CD(self) -> Tensor:
        """Mean gradient of the forget set."""
        return self.gradient_sum_CD / self.count

    @property
    def fisher_CD(self) -> Tensor:
        """Diagonal of the empirical Fisher of the forget set."""
        return self.squared_sum_CD / self.count


def merge_tree(parts: Iterable[S]) -> S:
    """Merge neighbours in a binary tree; the last of an odd number is carried up.

    Merging aligned runs of 2^k parts first and their results afterwards gives the same tree, hence the same rounding. Parts
    are taken one by one, and no more than log2 of them are held.
    """
    runs: list[tuple[int, S]] = []  # sizes fall from left to right, each a power of two
    for part in parts:
        size, merged = 1, part
        while runs and runs[-1][0] == size:
            size, merged = 2 * size, runs.pop()[1].merge(merged)
        runs.append((size, merged))
    _, total = runs.pop()
    while runs:
        total = runs.pop()[1].merge(total)
    return total


class FittedCurvature(Protocol):
    """A curvature whose statistics are in."""

    def apply_inverse(self, gradient_CD: Tensor) -> Tensor:
        """Damped inverse times a gradient, ``[C, D]``."""
        ...


class Curvature(Protocol):
    """A kind of curvature. ``influence`` applies its inverse to the mean gradient, the ascent to the gradient of each step."""

    def memory(self, classes: int, width: int) -> int:
        """Bytes that fitting and applying it take in one process."""
        ...

    def fit(self, reduce: Reduce[Any], damping: float) -> FittedCurvature:
        """Gather the statistics and return the damped inverse."""
        ...


def damped_direction(fitted: FittedCurvature, moments: Moments) -> Tensor:
    r"""The direction :math:`M = (F + \lambda)^{-1} \bar g` against which every sample is scored, ``[C, D]``.

    Raises:
        NonFiniteError: the statistics or the direction are not finite.
    """
    direction = fitted.apply_inverse(moments.mean_gradient_CD)
    if not torch.isfinite(direction).all():
        raise NonFiniteError(
            "the mean gradient of the forget set is NaN or infinite in "
            f"{int((~torch.isfinite(direction)).sum())} of {direction.numel()} entries; expected finite features and logits; "
            "check the model's weights and the scale of its inputs"
        )
    return direction
