r"""Curvature of the loss in a linear head that steers a step: feature second moment and Gauss-Newton.

The generalised Gauss-Newton matrix of a linear head is its exact Hessian, where a sample's loss is the sum over its
positions: :math:`\frac1n \sum_{i,t} H_{it} \otimes h_{it} h_{it}^\top` with H the Hessian in the logits, of the plain
cross-entropy :math:`\mathrm{diag}(p) - p p^\top` (of other losses ``targets.hessian``). Each kind is scaled by its mean
eigenvalue, damped by a share of that, inverted, and scaled by the mean eigenvalue of the inverse, so that a learning
rate means about the same under each.

Shapes: C classes, D head inputs with the bias input.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from imu_ray.influence.curvature.base import Reduce
from imu_ray.influence.gradients import LayerIO, logit_hessian

COPIES = 6  # of the matrix while it is fitted: one block's, the running sum, the merged sum, scaled, factor, inverse


@dataclass(frozen=True)
class MatrixSum:
    """Number of samples and sum of their matrices, each the sum over the sample's positions; float64."""

    count: int
    total: Tensor

    def merge(self, other: "MatrixSum") -> "MatrixSum":
        """The sum of both."""
        return MatrixSum(self.count + other.count, self.total + other.total)

    @property
    def mean(self) -> Tensor:
        """Mean matrix."""
        return self.total / self.count


def second_moment_sum(layer_io: LayerIO) -> MatrixSum:
    r""":math:`\sum_{i,t} h_{it} h_{it}^\top`, ``[D, D]``."""
    inputs = layer_io.inputs_BTD.flatten(0, 1)
    return MatrixSum(len(layer_io.inputs_BTD), inputs.T @ inputs)


def block_ggn_sum(layer_io: LayerIO) -> MatrixSum:
    r""":math:`\sum_{i,t} H_{itcc} h_{it} h_{it}^\top` for each class, ``[C, D, D]``."""
    inputs = layer_io.inputs_BTD.flatten(0, 1)
    variances = logit_hessian(layer_io).variances.flatten(0, 1)
    blocks = [inputs.T @ (inputs * variance.unsqueeze(1)) for variance in variances.unbind(1)]
    return MatrixSum(len(layer_io.inputs_BTD), torch.stack(blocks))


def full_ggn_sum(layer_io: LayerIO) -> MatrixSum:
    r""":math:`\sum_{i,t} H_{it} \otimes h_{it} h_{it}^\top`, ``[C D, C D]``."""
    inputs = layer_io.inputs_BTD.flatten(0, 1)
    variances, _, factor = (part.flatten(0, 1) for part in logit_hessian(layer_io))
    classes, width = factor.shape[1], inputs.shape[1]
    total = inputs.new_zeros(classes, width, classes, width)
    for c in range(classes):
        for d in range(classes):
            weight = variances[:, c] if c == d else -factor[:, c] * factor[:, d]
            total[c, :, d, :] = inputs.T @ (inputs * weight.unsqueeze(1))
    return MatrixSum(len(layer_io.inputs_BTD), total.reshape(classes * width, classes * width))


def _inverse_over_mean(blocks: Tensor, damping: float) -> tuple[Tensor, float]:
    """Inverse of what is scaled by the mean eigenvalue over all blocks and then damped; and that mean."""
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    mean = blocks.diagonal(dim1=-2, dim2=-1).mean()
    # Nothing to be steered by, for instance when every sample is fitted beyond the last digit.
    scaled = blocks / mean if mean > 0 else torch.zeros_like(blocks)
    return torch.cholesky_inverse(torch.linalg.cholesky(scaled + damping * identity)), float(mean)


def scaled_inverse(blocks: Tensor, damping: float) -> Tensor:
    """Scale by the mean eigenvalue over all blocks, damp, invert, and scale the inverses by their mean eigenvalue.

    Args:
        blocks: positive semi-definite matrices ``[..., K, K]``; one number scales them all, because scaling each by its
            own trace would point elsewhere.
        damping: share of the mean eigenvalue.
    """
    inverse, _ = _inverse_over_mean(blocks, damping)
    return inverse / inverse.diagonal(dim1=-2, dim2=-1).mean()


def damped_inverse(blocks: Tensor, damping: float) -> Tensor:
    """Inverses of ``blocks``, damped by a share of their mean eigenvalue (of 1 where that is 0), not rescaled.

    For a head beside other layers, where the scale of each against the others counts.
    """
    inverse, mean = _inverse_over_mean(blocks, damping)
    return inverse / (mean or 1.0)


@dataclass(frozen=True)
class RowBlocks:
    """One inverse for every row of the head: ``[C, D, D]``, or ``[1, D, D]`` for the same one."""

    inverse_CDD: Tensor

    def apply_inverse(self, gradient_CD: Tensor) -> Tensor:
        """Row c of the gradient times block c."""
        return (self.inverse_CDD.to(gradient_CD.device) @ gradient_CD.unsqueeze(2)).squeeze(2)


@dataclass(frozen=True)
class FullMatrix:
    """One inverse for the whole head, ``[C D, C D]``."""

    inverse: Tensor

    def apply_inverse(self, gradient_CD: Tensor) -> Tensor:
        """The inverse times the flattened gradient."""
        return (self.inverse.to(gradient_CD.device) @ gradient_CD.reshape(-1)).reshape(gradient_CD.shape)


class FeatureSecondMoment:
    r""":math:`\frac1n \sum_{i,t} h_{it} h_{it}^\top` for every row alike."""

    def memory(self, classes: int, width: int) -> int:
        """Bytes of all copies."""
        return COPIES * 8 * width**2

    def fit(self, reduce: Reduce[MatrixSum], damping: float) -> RowBlocks:
        """Fit on the forget set; ``damping`` is a share of the mean eigenvalue."""
        return RowBlocks(scaled_inverse(reduce(second_moment_sum).mean.unsqueeze(0), damping))


class BlockGGN:
    """Gauss-Newton matrix without the coupling between classes."""

    statistics = staticmethod(block_ggn_sum)

    def memory(self, classes: int, width: int) -> int:
        """Bytes of all copies."""
        return COPIES * 8 * classes * width**2

    def fit(self, reduce: Reduce[MatrixSum], damping: float) -> RowBlocks:
        """Fit on the forget set; ``damping`` is a share of the mean eigenvalue over all blocks."""
        return RowBlocks(scaled_inverse(reduce(block_ggn_sum).mean, damping))

    def solve(self, sums: MatrixSum, damping: float) -> RowBlocks:
        """The inverse as it is, for a head beside other layers."""
        return RowBlocks(damped_inverse(sums.mean, damping))


class FullGGN:
    """The whole Gauss-Newton matrix; for small heads."""

    def memory(self, classes: int, width: int) -> int:
        """Bytes of all copies."""
        return COPIES * 8 * (classes * width) ** 2

    def fit(self, reduce: Reduce[MatrixSum], damping: float) -> FullMatrix:
        """Fit on the forget set; ``damping`` is a share of the mean eigenvalue."""
        return FullMatrix(scaled_inverse(reduce(full_ggn_sum).mean, damping))
