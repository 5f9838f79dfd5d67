r"""The exact Hessian of the loss in a linear head, damped: never built where it is large.

.. math:: H V = \frac1n \sum_{i,t} \bigl(d_{it} \circ v_{it} - u_{it}\,(u_{it}^\top v_{it})\bigr) h_{it}^\top
          + \lambda V, \qquad v_{it} = V h_{it}

with :math:`\mathrm{diag}(d) - u u^\top` the Hessian in the logits (``targets.LogitHessian``), of the plain
cross-entropy :math:`d = u = p`.

:math:`\lambda` is the weight of an L2 term :math:`\frac\lambda2 \|W\|^2` where the head was trained with one.

Shapes: C classes, D head inputs with the bias input.
"""

import functools
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imu_ray.errors import StageFailedError
from imu_ray.influence.curvature.base import Damping, Reduce
from imu_ray.influence.curvature.ggn import MatrixSum, full_ggn_sum
from imu_ray.influence.gradients import LayerIO, logit_hessian

DENSE_SIZE = 2_000  # C D up to which the matrix is built and factored
TOLERANCE = 1e-10  # norm of the residual, as a share of the gradient's
MAX_ITERATIONS = 2_000

Vector = npt.NDArray[np.float64]


def diagonal_sum(layer_io: LayerIO) -> MatrixSum:
    r"""Diagonal of the Hessian: :math:`\sum_{i,t} (d - u \circ u)_{itc} h_{itd}^2`, ``[C, D]``."""
    inputs = layer_io.inputs_BTD.flatten(0, 1)
    return MatrixSum(len(layer_io.inputs_BTD), logit_hessian(layer_io).variances.flatten(0, 1).T @ inputs**2)


def product_sum(layer_io: LayerIO, vector_CD: Tensor) -> MatrixSum:
    """Sum of the samples' Hessians times a vector, ``[C, D]``."""
    inputs = layer_io.inputs_BTD.flatten(0, 1)
    _, diagonal, factor = (part.flatten(0, 1) for part in logit_hessian(layer_io))
    outputs = inputs @ vector_CD.T
    pull = diagonal * outputs - factor * (factor * outputs).sum(1, keepdim=True)
    return MatrixSum(len(layer_io.inputs_BTD), pull.T @ inputs)


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
        # Here, because no worker process solves, and each would import it.
        from scipy.sparse.linalg import LinearOperator, cg

        shape, gradient = gradient_CD.shape, gradient_CD.flatten().numpy()
        diagonal, iterations = self.preconditioner_CD.flatten().numpy(), 0

        def apply(vector: Vector) -> Vector:
            vector_CD = torch.from_numpy(vector).view(shape)
            product = self.reduce(functools.partial(product_sum, vector_CD=vector_CD)).mean + self.damping * vector_CD
            return product.flatten().numpy()

        def count(solution: Vector) -> None:
            nonlocal iterations
            iterations += 1
            if not np.isfinite(solution).all():
                raise _no_convergence(math.nan, iterations)

        damped = LinearOperator(2 * gradient.shape, apply, dtype=float)
        conditioner = LinearOperator(2 * gradient.shape, lambda vector: vector / diagonal, dtype=float)
        solution, failed = cg(damped, gradient, rtol=TOLERANCE, maxiter=MAX_ITERATIONS, M=conditioner, callback=count)
        norm = float(np.linalg.norm(gradient))
        residual = float(np.linalg.norm(gradient - apply(solution))) / norm if norm else 0.0
        if failed:
            raise _no_convergence(residual, iterations)
        self.solved.update(iterations=iterations, residual=residual)
        return torch.from_numpy(solution).view(shape)


def _no_convergence(residual: float, iterations: int) -> StageFailedError:
    return StageFailedError(
        f"conjugate gradients on the head's Hessian did not converge: residual {residual:.2g} of the gradient after "
        f"{iterations} iterations, expected {TOLERANCE:g}; raise influence.damping or use influence.curvature=kfac"
    )


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
