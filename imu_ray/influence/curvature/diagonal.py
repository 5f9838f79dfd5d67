"""Diagonal curvatures: the paper's empirical Fisher, and none at all. Shapes: C classes, D head inputs with the bias input."""

from dataclasses import dataclass

import torch
from torch import Tensor

from imu_ray.influence.curvature.base import Moments, Reduce


@dataclass(frozen=True)
class DampedDiagonal:
    """A positive diagonal ``[C, D]`` and its inverse."""

    diagonal_CD: Tensor

    def apply_inverse(self, gradient_CD: Tensor) -> Tensor:
        """Elementwise quotient."""
        return gradient_CD / self.diagonal_CD.to(gradient_CD.device)


class DiagonalFisher:
    r"""The paper's curvature: :math:`F + \lambda`, :math:`F = \frac1n \sum_i g_i \circ g_i` (arXiv:2508.01620)."""

    def memory(self, classes: int, width: int) -> int:
        """Bytes of the sums and of the diagonal."""
        return 3 * 8 * classes * width

    def fit(self, reduce: Reduce[Moments], damping: float) -> DampedDiagonal:
        """Fit on the forget set; the damping is added, not used as a floor."""
        return DampedDiagonal(reduce(Moments.of).fisher_CD + damping)


class Identity:
    """No curvature: the direction is the mean gradient itself, so that the influence is a plain gradient product."""

    def memory(self, classes: int, width: int) -> int:
        """Nothing is kept."""
        return 0

    def fit(self, reduce: Reduce[Moments], damping: float) -> DampedDiagonal:
        """Nothing to fit, and nothing to damp."""
        return DampedDiagonal(torch.ones((), dtype=torch.float64))
