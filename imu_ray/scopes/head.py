"""The scope of one linear layer at the end of a model, over the cached features that are its inputs.

Shapes: B samples (T positions each where a task has them), C outputs, D inputs with the bias input included, F without it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from imu_ray.config import InfluenceConfig
from imu_ray.errors import NonFiniteError
from imu_ray.influence.curvature.base import Reduce, S, merge_tree
from imu_ray.influence.direction import fit_direction
from imu_ray.influence.gradients import HEAD_DTYPE, LayerIO, gradient_norms, layer_inputs
from imu_ray.influence.scores import influence_scores
from imu_ray.models.copies import plain_copy
from imu_ray.models.layers import linear_layers
from imu_ray.scopes.base import OutputGradient, Parameters, Positions, Record, Weights
from imu_ray.scopes.features import FeatureShard, FeatureStore, first_of
from imu_ray.scopes.measure import measure
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.base import Task


@dataclass(frozen=True)
class Head:
    """A linear layer as one matrix ``[C, D]``, float64, on the CPU; the bias, if any, is its last column."""

    name: str
    matrix_CD: Tensor
    has_bias: bool
    task: Task

    @classmethod
    def of(cls, model: nn.Module, task: Task) -> "Head":
        """A copy of the target layer of ``model``."""
        layer = linear_layers(model)[task.head]
        columns = [layer.weight.detach()] + ([layer.bias.detach().unsqueeze(1)] if layer.bias is not None else [])
        matrix = torch.cat([column.cpu().to(HEAD_DTYPE) for column in columns], dim=1)
        return cls(task.head, matrix, layer.bias is not None, task)

    @property
    def parameters(self) -> Parameters:
        """The matrix by the name of the layer."""
        return {self.name: self.matrix_CD}

    def changed(self, parameters: Mapping[str, Tensor]) -> "Head":
        """A head with a copy of other parameters, on the CPU."""
        return Head(self.name, parameters[self.name].detach().cpu().clone(), self.has_bias, self.task)

    def to(self, device: torch.device) -> "Head":
        """The same head on a device."""
        return replace(self, matrix_CD=self.matrix_CD.to(device))

    def apply(self, model: nn.Module) -> nn.Module:
        """A copy of the model with this head; every other tensor is bit-identical."""
        changed = plain_copy(model)
        layer = linear_layers(changed)[self.name]
        with torch.no_grad():
            layer.weight.copy_(self.matrix_CD[:, : layer.in_features])
            if layer.bias is not None:
                layer.bias.copy_(self.matrix_CD[:, -1])
        return changed

    def logits(self, features: Tensor, matrix_CD: Tensor | None = None) -> Tensor:
        """Outputs ``[B, C]`` or ``[B, T, C]`` for cached features, under another matrix if one is given; float64."""
        matrix = self.matrix_CD if matrix_CD is None else matrix_CD
        flat = features.flatten(0, -2)
        # The head on the left: a third faster than features @ matrix.T where classes are few. The features are not copied.
        product = (matrix[:, : flat.shape[1]] @ flat.to(HEAD_DTYPE).T).T
        outputs = product + matrix[:, -1] if self.has_bias else product
        return outputs.view(*features.shape[:-1], -1)

    def gradient(self, output_grads: Tensor, features: Tensor) -> Tensor:
        """Sum of the samples' gradients ``[C, D]``, without copying the features."""
        grads, flat = output_grads.flatten(0, -2), features.flatten(0, -2)
        weight = grads.T @ flat.to(HEAD_DTYPE)
        return torch.cat([weight, grads.sum(0).unsqueeze(1)], dim=1) if self.has_bias else weight

    def layer_io(self, features: Tensor, labels: Tensor) -> LayerIO:
        """What the layer sees of a block, and how the loss pulls on its outputs."""
        return self._layer_io(features, self.task.output_gradient(self.logits(features), labels))

    def _layer_io(self, features: Tensor, output_grads: Tensor) -> LayerIO:
        inputs = layer_inputs(features, self.has_bias)
        return LayerIO(*(part.unsqueeze(1) if part.ndim == 2 else part for part in (inputs, output_grads)))


def shard_statistics(shard: FeatureShard, head: Head, statistics: Callable[[LayerIO], S]) -> S:
    """``statistics`` of each block, merged in a binary tree."""
    return merge_tree(statistics(head.layer_io(*block)) for block in shard.blocks())


SCORE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("label", pa.int64()),
        *((name, pa.float64()) for name in ("loss", "influence", "gradient_norm")),
    ]
)


def score_shard(shard: FeatureShard, head: Head, direction: Tensor) -> pa.Table:
    """Loss, influence and gradient norm of every sample of a shard (``SCORE_SCHEMA``).

    Raises:
        NonFiniteError: one of them is NaN or infinite; the message names the samples.
    """
    losses, scores, norms = [torch.empty(0)], [torch.empty(0)], [torch.empty(0)]
    for features, labels in shard.blocks():
        outputs = head.logits(features)
        layer_io = head._layer_io(features, head.task.output_gradient(outputs, labels))
        losses.append(head.task.sample_metrics(outputs, labels)["loss"])
        scores.append(influence_scores(layer_io, direction))
        norms.append(gradient_norms(layer_io))
    columns = [torch.cat(parts).double().numpy() for parts in (losses, scores, norms)]
    table = pa.table([shard.ids, labels_column(shard), *columns], schema=SCORE_SCHEMA)
    wrong = ~np.isfinite(columns).all(axis=0)
    if wrong.any():
        raise NonFiniteError(
            f"loss, influence or gradient norm of {int(wrong.sum())} samples is NaN or infinite "
            f"(ids {first_of(table.filter(pa.array(wrong))['sample_id'].to_pylist())}); expected finite numbers; check the scale of "
            "weights and inputs, and influence.damping"
        )
    return table


def labels_column(shard: FeatureShard) -> pa.Array:
    """Labels of a shard as a column; null where a sample has a label at each position."""
    return pa.array(shard.labels_n) if shard.labels_n.ndim == 1 else pa.nulls(len(shard.labels_n), pa.int64())


def norms_of(shard: FeatureShard, head: Head) -> npt.NDArray[np.float64]:
    """Gradient norm of every sample of a shard."""
    return np.concatenate([np.empty(0), *(gradient_norms(head.layer_io(*block)).numpy() for block in shard.blocks())])


class HeadScope:
    """A head with the cached features of the forget set and the evaluation sets, as one worker sees them (``Scope``)."""

    def __init__(self, head: Head, sets: Mapping[str, FeatureStore], workers: Workers) -> None:
        self.head, self.sets, self.workers = head, sets, workers
        self.forget, self.metrics = sets["forget"], head.task.metrics
        self.rows, self.block_starts = len(self.forget), self.forget.block_starts
        self._start_CD = head.matrix_CD.to(workers.device)

    def parameters(self) -> Parameters:
        """A copy of the original matrix."""
        return {self.head.name: self._start_CD.clone()}

    def batch_gradient(
        self, parameters: Parameters, batch: Positions, weights: Weights, objective: OutputGradient, pieces: int
    ) -> Parameters:
        """Weighted mean of the head's gradients; a worker without rows adds zeros."""
        matrix = parameters[self.head.name]
        gradient = torch.zeros_like(matrix)
        if not len(batch):  # no sample of the batch was kept when it was scored again
            return {self.head.name: gradient}
        for positions in self.workers.take(_cut(batch, pieces)):
            features, labels = (part.to(self.workers.device) for part in self.forget.gather(positions))
            pull = objective(self.head.logits(features, matrix), labels, self.head.logits(features, self._start_CD))
            pull *= torch.from_numpy(weights[positions]).to(self.workers.device).view(-1, *[1] * (pull.ndim - 1))
            gradient += self.head.gradient(pull, features)
        return {self.head.name: self.workers.sum(gradient) / float(weights[batch].sum())}

    def measure(self, parameters: Parameters, sets: Iterable[str] | None = None) -> Record:
        """Figures of the sets, or of some of them, under other parameters."""
        matrix = parameters[self.head.name]
        chosen = {name: self.sets[name] for name in (self.sets if sets is None else sets)}
        return measure(chosen, functools.partial(self.head.logits, matrix_CD=matrix), self.head.task, self.workers)

    def influence(
        self,
        parameters: Parameters,
        settings: InfluenceConfig,
        curvature_set: str | None,
        batch: Positions | None,
        pieces: int,
    ) -> tuple[Weights, Weights]:
        """Influence and loss under other parameters, of the forget set or of one batch."""
        head = self.head.changed(parameters)
        shards = self.forget.shards
        if batch is not None:
            shards = [self.forget.shard_of(positions) for positions in _cut(batch, pieces)]

        def norm_quantile(level: float) -> float:
            return float(np.quantile(np.concatenate([norms_of(shard, head) for shard in shards]), level))

        fitted_on = None if curvature_set is None else _reduce(self.sets[curvature_set].shards, head)
        direction, _ = fit_direction(settings, _reduce(shards, head), fitted_on, norm_quantile)
        table = pa.concat_tables([score_shard(shard, head, direction) for shard in shards])
        return table["influence"].to_numpy(), table["loss"].to_numpy()


def _cut(batch: Positions, size: int) -> list[Positions]:
    return [batch[i : i + size] for i in range(0, len(batch), size)]


def _reduce(shards: Sequence[FeatureShard], head: Head) -> Reduce[Any]:
    return lambda statistics: merge_tree(
        map(functools.partial(shard_statistics, head=head, statistics=statistics), shards)
    )
