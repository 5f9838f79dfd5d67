"""A scope whose sums are rounds of Ray tasks: the same bits for any number of workers, a retry for each shard."""

import functools
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from imu_ray.distributed.feature_job import FeatureSet
from imu_ray.distributed.tasks import StageRef
from imu_ray.scopes.base import FORGET_VIEWS, ByLayer, OutputGradient, Parameters, Record, Weights
from imu_ray.scopes.features import FeatureShard, Positions, of_rows, one_class
from imu_ray.scopes.layers import Layers, TensorSum, shard_gradient
from imu_ray.scopes.measure import record_of, sum_blocks
from imu_ray.scopes.workers import Workers

# Rows of a set that a trial is measured on before all are: an accuracy has a standard error of 1.6 points at most.
PROBE_ROWS = 1000


class TaskScope:
    """Layers on features that stay in the object store, as the driver sees them (``Scope``)."""

    def __init__(self, part: Layers, sets: Mapping[str, FeatureSet]) -> None:
        self.part, self.sets, self.workers = part, sets, Workers()
        self._shared = sets["forget"].runner.share("layers", part)  # once: every trial needs the same network
        self.metrics, self.rows = part.task.metrics, sets["forget"].rows
        sizes = [size for report in sets["forget"].reports for size in report.block_sizes]
        self.block_starts: Positions = np.cumsum([0, *sizes[:-1]])
        self._classes: Positions | None = None

    def parameters(self) -> Parameters:
        """Copies of the original parameters."""
        return {name: matrix.clone() for name, matrix in self.part.parameters.items()}

    def batch_gradient(
        self, parameters: Parameters, batch: Positions, weights: Weights, objective: OutputGradient, pieces: int
    ) -> Parameters:
        """Weighted mean over the batch's rows and their views, a block at a time."""
        moved = self.sets.get(FORGET_VIEWS, self.sets["forget"])
        views = moved.rows // self.rows
        column = np.zeros_like(weights)
        column[batch] = weights[batch]
        same = all(torch.equal(matrix, self.part.parameters[name]) for name, matrix in parameters.items())
        function = functools.partial(
            _gradient, part=self._shared, parameters=parameters, moved=not same, objective=objective
        )
        sums = moved.reduce("gradient", function, np.repeat(column, views, axis=0)).parts
        return {name: part.total / (of_rows(column).sum() * views) for name, part in sums.items()}

    def measure(self, parameters: Parameters, sets: Iterable[str] | None = None) -> Record:
        """Figures of the sets, or of some of them, under other parameters."""
        return self._measured(parameters, {name: self.sets[name] for name in (self.sets if sets is None else sets)})

    def probe(self, parameters: Parameters, sets: Iterable[str]) -> Record | None:
        """Figures of evenly spaced shards of some sets; None where these are all."""
        parts = {name: self.sets[name].spaced(PROBE_ROWS) for name in sets}
        if all(part.rows == self.sets[name].rows for name, part in parts.items()):
            return None
        return self._measured(parameters, parts)

    def _measured(self, parameters: Parameters, sets: Mapping[str, FeatureSet]) -> Record:
        if self._classes is None and {"test", "forget"} <= sets.keys():
            self._classes = np.unique(np.concatenate(self.sets["forget"].map("labels", _labels)))
        classes = self._classes if {"test", "forget"} <= sets.keys() else None
        function = functools.partial(_sums, part=self._shared, parameters=parameters, classes=classes)
        sums = {name: made.reduce(f"trial on {name}", function).total for name, made in sets.items()}
        return record_of(sums, {name: made.rows for name, made in sets.items()}, self.part.task)

    def influence(self, *arguments: object) -> tuple[Weights, Weights]:
        """Never asked for: one step is taken with the scores of the original model."""
        raise NotImplementedError


def _labels(shard: FeatureShard) -> Positions:
    return np.unique(one_class(shard.labels_n))


def _gradient(
    shard: FeatureShard,
    weights_n: Weights,
    part: StageRef,
    parameters: Parameters,
    moved: bool,
    objective: OutputGradient,
) -> ByLayer[TensorSum]:
    original: Layers = part.work()
    return shard_gradient(shard, weights_n, original.changed(parameters), original if moved else None, objective)


def _sums(shard: FeatureShard, part: StageRef, parameters: Parameters, classes: Positions | None) -> TensorSum:
    changed: Layers = part.work().changed(parameters)
    outputs_of = functools.partial(changed.outputs, weights=changed.weights())
    blocks, device = ((shard, rows) for rows in shard.block_rows()), torch.device(changed.device)
    return TensorSum(sum_blocks(blocks, outputs_of, changed.task, classes, device).cpu())
