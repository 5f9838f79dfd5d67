"""Diagonal curvatures: the paper's empirical Fisher, and none. Shapes: C classes, D head inputs with the bias input."""

from dataclasses import dataclass

import torch
from torch import Tensor

from imu_ray.influence.curvature.base import Damping, Moments, Reduce


@dataclass(frozen=True)
class DampedDiagonal:
    """A positive diagonal ``[C, D]`` and its inverse."""

    diagonal_CD: Tensor
    damping: float = 0.0

    @property
    def figures(self) -> dict[str, float]:
        """The damping."""
        return {"damping": self.damping}

    def apply_inverse(self, gradient_CD: Tensor) -> Tensor:
        """Elementwise quotient."""
        return gradient_CD / self.diagonal_CD.to(gradient_CD.device)


class DiagonalFisher:
    r"""The paper's curvature: :math:`F + \lambda`, :math:`F = \frac1n \sum_i g_i \circ g_i` (arXiv:2508.01620)."""

    def fit(self, reduce: Reduce[Moments], damping: Damping) -> DampedDiagonal:
        """Fit on the samples behind ``reduce``; the damping is added, not used as a floor."""
        fisher = reduce(Moments.of).fisher_CD
        return DampedDiagonal(fisher + damping.of(fisher), damping.of(fisher))


class Identity:
    """No curvature: the direction is the mean gradient itself, so that the influence is a plain gradient product."""

    def fit(self, reduce: Reduce[Moments], damping: Damping) -> DampedDiagonal:
        """Nothing to fit, and nothing to damp."""
        return DampedDiagonal(torch.ones((), dtype=torch.float64))
