r"""The exact Hessian of the softmax cross-entropy in a linear head, damped: never built where it is large.

.. math:: H V = \frac1n \sum_i \bigl(p_i \circ u_i - p_i\,(p_i^\top u_i)\bigr) h_i^\top + \lambda V, \qquad u_i = V h_i

:math:`\lambda` is the weight of an L2 term :math:`\frac\lambda2 \|W\|^2` where the head was trained with one.

Shapes: C classes, D head inputs with the bias input.
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from imu_ray.errors import StageFailedError
from imu_ray.influence.curvature.base import Damping, Reduce
from imu_ray.influence.curvature.ggn import MatrixSum, full_ggn_sum
from imu_ray.influence.gradients import LayerIO, probabilities

DENSE_SIZE = 2_000  # C D up to which the matrix is built and factored
TOLERANCE = 1e-10  # norm of the residual, as a share of the gradient's
MAX_ITERATIONS = 2_000


def diagonal_sum(layer_io: LayerIO) -> MatrixSum:
    r"""Diagonal of the Hessian: :math:`\sum_i p_{ic}(1 - p_{ic}) h_{id}^2`, ``[C, D]``."""
    inputs = layer_io.inputs_BTD.flatten(0, 1)
    p = probabilities(layer_io.output_grads_BTC).flatten(0, 1)
    return MatrixSum(len(inputs), (p * (1 - p)).T @ inputs**2)


def product_sum(layer_io: LayerIO, vector_CD: Tensor) -> MatrixSum:
    """Sum of the samples' Hessians times a vector, ``[C, D]``."""
    inputs = layer_io.inputs_BTD.flatten(0, 1)
    p = probabilities(layer_io.output_grads_BTC).flatten(0, 1)
    outputs = inputs @ vector_CD.T
    pull = p * (outputs - (p * outputs).sum(1, keepdim=True))
    return MatrixSum(len(inputs), pull.T @ inputs)


@dataclass(frozen=True)
class DenseHessian:
    """The Cholesky factor of the whole matrix."""

    factor: Tensor
    damping: float

    @property
    def figures(self) -> dict[str, float]:
        """The damping."""
        return {"damping": self.damping}

    def apply_inverse(self, gradient_CD: Tensor) -> Tensor:
        """Two triangular solves."""
        return torch.cholesky_solve(gradient_CD.reshape(-1, 1), self.factor).reshape(gradient_CD.shape)


@dataclass(frozen=True)
class ImplicitHessian:
    """Conjugate gradients; every product is one parallel round over the cached features.

    ``preconditioner_CD`` is the damped diagonal. ``iterations`` and ``residual`` tell of the last solve.
    """

    reduce: Reduce[MatrixSum]
    damping: float
    preconditioner_CD: Tensor
    solved: dict[str, float] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        """The damping, and how the last solve went."""
        return {"damping": self.damping, **self.solved}

    def apply_inverse(self, gradient_CD: Tensor) -> Tensor:
        """Solve to ``TOLERANCE``.

        Raises:
            StageFailedError: no convergence in ``MAX_ITERATIONS``.
        """
        solution, residual = torch.zeros_like(gradient_CD), gradient_CD.clone()
        goal = TOLERANCE * float(gradient_CD.norm())
        conditioned = residual / self.preconditioner_CD
        direction, energy = conditioned.clone(), float((residual * conditioned).sum())
        iteration = 0
        while float(residual.norm()) > goal:
            if iteration == MAX_ITERATIONS or not math.isfinite(energy):
                raise StageFailedError(
                    f"conjugate gradients on the head's Hessian did not converge: residual {float(residual.norm()) / goal * TOLERANCE:.2g} of "
                    f"the gradient after {iteration} iterations, expected {TOLERANCE:g}; raise influence.damping or use influence.curvature=kfac"
                )
            product = self.reduce(functools.partial(product_sum, vector_CD=direction)).mean + self.damping * direction
            step = energy / float((direction * product).sum())
            solution += step * direction
            residual -= step * product
            conditioned = residual / self.preconditioner_CD
            before, energy = energy, float((residual * conditioned).sum())
            direction = conditioned + energy / before * direction
            iteration += 1
        self.solved.update(iterations=iteration, residual=float(residual.norm()) / goal * TOLERANCE if goal else 0.0)
        return solution


class Hessian:
    """Dense where ``C D`` is at most ``DENSE_SIZE``, by conjugate gradients beyond."""

    def __init__(self, dense_size: int = DENSE_SIZE) -> None:
        self.dense_size = dense_size

    def fit(self, reduce: Reduce[MatrixSum], damping: Damping) -> DenseHessian | ImplicitHessian:
        """Fit on the samples behind ``reduce``."""
        diagonal = reduce(diagonal_sum).mean
        weight = damping.of(diagonal)
        if diagonal.numel() > self.dense_size:
            return ImplicitHessian(reduce, weight, diagonal + weight)
        matrix = reduce(full_ggn_sum).mean
        return DenseHessian(torch.linalg.cholesky(matrix + weight * torch.eye(len(matrix), dtype=matrix.dtype)), weight)
