"""What every scope offers an update: its parameters, and gradients and figures under changed ones.

Parameters are named by layer; a layer's weight and bias are one tensor ``[C, D]`` with the bias as its last column, float64.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imu_ray.config import InfluenceConfig
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.base import Metric

Positions = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]
Parameters = dict[str, Tensor]
Record = dict[str, float]
# Outputs, labels and the outputs before unlearning to the gradient with respect to the outputs.
OutputGradient = Callable[[Tensor, Tensor, Tensor], Tensor]


class Scope(Protocol):
    """The part of a model that may move, with the samples that it is computed on, as one worker sees them.

    Positions count the rows of the forget set in the order of its shards. Every worker calls the methods in the same order
    and gets the same results.
    """

    workers: Workers
    metrics: Mapping[str, Metric]
    rows: int
    block_starts: Positions

    def parameters(self) -> Parameters:
        """Copies of the original parameters, on the worker's device."""
        ...

    def batch_gradient(
        self, parameters: Parameters, batch: Positions, weights: Weights, objective: OutputGradient, pieces: int
    ) -> Parameters:
        r"""Gradient of the weighted objective over one global batch, in pieces of so many rows.

        .. math:: \frac{1}{\sum_B w_i} \sum_B w_i \nabla \ell_i

        The divisor is that of the global batch, read off the weight table, so that the number of workers changes nothing.
        """
        ...

    def measure(self, parameters: Parameters, sets: Iterable[str] | None = None) -> Record:
        """``<set>.<metric>`` of the forget set and the evaluation sets, or of some of them."""
        ...

    def influence(
        self,
        parameters: Parameters,
        settings: InfluenceConfig,
        curvature_set: str | None,
        batch: Positions | None,
        pieces: int,
    ) -> tuple[Weights, Weights]:
        """Influence and loss of the forget set or of one batch of it, computed by the caller alone."""
        ...


def norm(parameters: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all layers."""
    return float(torch.linalg.vector_norm(torch.stack([tensor.norm() for tensor in parameters.values()])))
