"""What may move in a model (a part), and what an update sees of it on its samples (a scope).

Parameters are named by layer; a layer's weight and bias are one tensor ``[C, D]`` with the bias as its last column,
float64.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn
from typing_extensions import Self

from imu_ray.config import InfluenceConfig
from imu_ray.influence.curvature.base import Additive
from imu_ray.influence.gradients import LayerIO
from imu_ray.scopes.features import FeatureShard, FeatureStore, Positions
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.base import Batch, Metric, Outputs, Task

Weights = npt.NDArray[np.float64]
Parameters = dict[str, Tensor]
Record = dict[str, float]
# Outputs, targets (``Task.target`` of the labels) and the outputs before unlearning to the gradient in the outputs.
OutputGradient = Callable[[Tensor, Tensor, Tensor], Tensor]
Statistics = Callable[[LayerIO], Any]
A = TypeVar("A", bound=Additive)
# Sample sets of augmented views; row i's views stand together.
FORGET_VIEWS, TEST_VIEWS = VIEWS = ("forget_views", "test_views")
# The same, drawn anew: for the audit alone.
FORGET_FRESH_VIEWS, TEST_FRESH_VIEWS = FRESH_VIEWS = ("forget_fresh_views", "test_fresh_views")


@dataclass(frozen=True)
class ByLayer(Generic[A]):
    """Statistics of several layers from one pass, by name; additive as they are. Without rows there are none."""

    parts: dict[str, A]

    def merge(self, other: "ByLayer[A]") -> "ByLayer[A]":
        """The statistics of both."""
        if not (self.parts and other.parts):
            return self if self.parts else other
        return ByLayer({name: part.merge(other.parts[name]) for name, part in self.parts.items()})

    def cpu(self) -> "ByLayer[A]":
        """The same in the CPU's memory, as a process without a GPU reads it."""
        return ByLayer({name: _on_cpu(part) for name, part in self.parts.items()})


def _on_cpu(sums: Any) -> Any:
    return replace(sums, **{name: each.cpu() for name, each in vars(sums).items() if isinstance(each, Tensor)})


class Part(Protocol):
    """The layers of a model that may move, with their parameters, and what they make of cached features.

    Picklable: it travels to the tasks. Features are what a forward pass leaves at the earliest point that the layers
    influence.
    """

    deep: ClassVar[bool]  # whether outputs take a pass through layers, rather than one product

    @property
    def task(self) -> Task:
        """What a sample is."""
        ...

    @property
    def parameters(self) -> Parameters:
        """By layer, on the CPU."""
        ...

    @property
    def width(self) -> int:
        """Numbers that are kept of a sample."""
        ...

    def changed(self, parameters: Mapping[str, Tensor]) -> Self:
        """The part with a copy of other parameters."""
        ...

    def apply(self, model: nn.Module) -> nn.Module:
        """A copy of the model with these parameters; every other tensor is bit-identical."""
        ...

    def of_model(self, model: nn.Module) -> Self:
        """The same part of another model of this kind."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """The forward pass of a batch: its outputs, and the features that are kept."""
        ...

    def outputs(self, shard: FeatureShard, rows: slice) -> tuple[Tensor, Tensor]:
        """Outputs and labels of some rows; float64."""
        ...

    def statistics(self, shard: FeatureShard, statistics: Mapping[str, Statistics]) -> ByLayer[Any]:
        """Statistics of each block by layer, merged in a binary tree."""
        ...

    def scores(self, shard: FeatureShard, directions: Mapping[str, Tensor]) -> pa.Table:
        """Loss, influence and gradient norm of every sample of a shard (``SCORE_SCHEMA``)."""
        ...

    def norms(self, shard: FeatureShard) -> Weights:
        """Gradient norm of every sample of a shard."""
        ...

    def scope(self, sets: Mapping[str, FeatureStore], workers: Workers) -> "Scope":
        """The part on its samples, as one worker of an update sees them."""
        ...


class Scope(Protocol):
    """A part with the samples that it is computed on, as one worker sees them.

    Positions count the rows of the forget set in the order of its shards. Every worker calls the methods in the same
    order and gets the same results.
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

        The divisor is that of the global batch, read off the weight table, so that the number of workers changes
        nothing.
        """
        ...

    def measure(self, parameters: Parameters, sets: Iterable[str] | None = None) -> Record:
        """``<set>.<metric>`` of the forget set and the evaluation sets, or of some of them."""
        ...

    def probe(self, parameters: Parameters, sets: Iterable[str]) -> Record | None:
        """As ``measure``, from a fixed part of the rows of some sets; None where all rows cost little."""
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
