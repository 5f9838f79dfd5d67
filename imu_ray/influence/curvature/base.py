"""Curvature of the forget-set loss in the head: additive statistics, their merge, and the damped inverse.

A curvature is fitted by ``reduce``, which maps a pure function over feature blocks and merges the results in a binary
tree over block index; it runs in a loop or on Ray.

Shapes: C classes, D head inputs with the bias input.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from imu_ray.errors import NonFiniteError
from imu_ray.influence.gradients import LayerIO, gradient_norms, gradient_sum, squared_gradient_sum

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
    def of(cls, layer_io: LayerIO, clip: float | None = None) -> "Moments":
        """Moments of one block; ``clip`` is the largest norm that a sample's gradient goes in with."""
        if clip is not None:
            norms = gradient_norms(layer_io)
            scale = torch.where(norms > clip, clip / norms, 1.0)  # of two zeros, not their quotient
            layer_io = LayerIO(layer_io.inputs_BTD, layer_io.output_grads_BTC * scale.view(-1, 1, 1))
        return cls(layer_io.inputs_BTD.shape[-3], gradient_sum(layer_io), squared_gradient_sum(layer_io))

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

    Merging aligned runs of 2^k parts first and their results afterwards gives the same tree, hence the same rounding.
    Parts are taken one by one, and no more than log2 of them are held.
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


@dataclass(frozen=True)
class Damping:
    """What is added to the curvature's diagonal: a number, or a share of the diagonal's mean (of 1 where that is 0)."""

    value: float
    relative: bool = False

    def of(self, diagonal: Tensor) -> float:
        """The number to add to a curvature with this diagonal, or with these eigenvalues."""
        return self.value * (float(diagonal.mean()) or 1.0) if self.relative else self.value


class FittedCurvature(Protocol):
    """A curvature whose statistics are in."""

    def apply_inverse(self, gradient_CD: Tensor) -> Tensor:
        """Damped inverse times a gradient, ``[C, D]``."""
        ...


class FittedInfluence(FittedCurvature, Protocol):
    """One that influence is scored with: it tells what it did."""

    @property
    def figures(self) -> dict[str, float]:
        """``damping`` (the number added), and ``iterations`` and ``residual`` of the last solve where it iterates."""
        ...


class Curvature(Protocol):
    """A kind of curvature whose damped inverse influence applies to the mean gradient."""

    def fit(self, reduce: Reduce[Any], damping: Damping) -> FittedInfluence:
        """Gather the statistics and return the damped inverse."""
        ...


class Preconditioner(Protocol):
    """A kind of curvature whose damped inverse the ascent applies to the gradient of each step."""

    def memory(self, classes: int, width: int) -> int:
        """Bytes that fitting and applying it take in one process."""
        ...

    def fit(self, reduce: Reduce[Any], damping: float) -> FittedCurvature:
        """Gather the statistics and return the inverse; the damping is a share of the mean eigenvalue."""
        ...


class LayerCurvature(Protocol):
    """A kind of curvature of one layer among several.

    Not rescaled, because the scale of each against the others counts.
    """

    @property
    def statistics(self) -> Callable[[LayerIO], Any]:
        """What is summed."""
        ...

    def memory(self, outputs: int, width: int) -> int:
        """Bytes that its inverse takes at most while it is made and applied."""
        ...

    def solve(self, sums: Any, damping: float) -> FittedCurvature:
        """The damped inverse; the damping is a share of the mean eigenvalue."""
        ...


def damped_direction(fitted: FittedCurvature, moments: Moments) -> Tensor:
    r"""The direction :math:`M = (F + \lambda)^{-1} \bar g` against which every sample is scored, ``[C, D]``.

    Raises:
        NonFiniteError: the statistics or the direction are not finite.
    """
    direction = fitted.apply_inverse(moments.mean_gradient_CD)
    if not torch.isfinite(direction).all():
        raise NonFiniteError(
            "the damped mean gradient of the forget set is NaN or infinite in "
            f"{int((~torch.isfinite(direction)).sum())} of {direction.numel()} entries; expected finite features and "
            "logits; check the model's weights, the scale of its inputs, and influence.damping"
        )
    return direction


def describe_direction(direction_CD: Tensor, moments: Moments, damping: float) -> dict[str, Any]:
    """How far the damping, rather than the curvature, makes the direction.

    Returns:
        ``fisher_quantiles`` of the diagonal Fisher, ``fisher_below_damping`` (share of its entries), and
        ``plain_gradient_share``: squared cosine between the direction and the plain mean gradient. At 1 the scores are
        a plain gradient product.
    """
    fisher, gradient = moments.fisher_CD.flatten(), moments.mean_gradient_CD
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    # torch.quantile stops at 2^24 entries.
    ordered = fisher.sort().values
    quantiles = ordered[(levels * (len(ordered) - 1)).round().long()]
    norms = float(direction_CD.norm() * gradient.norm())
    return {
        "fisher_quantiles": dict(zip(("0.05", "0.5", "0.95"), quantiles.tolist(), strict=True)),
        "fisher_below_damping": float((fisher < damping).double().mean()),
        "plain_gradient_share": (float((direction_CD * gradient).sum()) / norms) ** 2 if norms else 1.0,
    }
