"""The scope of one linear layer at the end of a model, over the cached features that are its inputs.

Shapes: B samples (T positions each where a task has them), C outputs, D inputs with the bias input included, F without
it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from imu_ray.config import InfluenceConfig
from imu_ray.errors import UnsupportedModelError
from imu_ray.influence.curvature.base import S, merge_tree
from imu_ray.influence.direction import ReduceLayers, fit_directions
from imu_ray.influence.gradients import HEAD_DTYPE, LayerIO, gradient_norms, layer_inputs
from imu_ray.influence.layer_io import matrix_of
from imu_ray.influence.scores import influence_scores
from imu_ray.influence.targets import LogitHessian, position_hessian
from imu_ray.models.head import head_layers
from imu_ray.scopes.base import FORGET_VIEWS, ByLayer, OutputGradient, Parameters, Record, Statistics, Weights
from imu_ray.scopes.features import FeatureShard, FeatureStore, Positions, of_views, pieces_of, score_table
from imu_ray.scopes.measure import measure
from imu_ray.scopes.seen import weigh, with_parameters
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.base import Batch, Outputs, Task


@dataclass(frozen=True)
class Head:
    """A linear layer as one matrix ``[C, D]``, float64, on the CPU; the bias, if any, is its last column."""

    name: str
    matrix_CD: Tensor
    has_bias: bool
    task: Task
    deep: ClassVar[bool] = False

    @classmethod
    def of(cls, model: nn.Module, task: Task) -> "Head":
        """A copy of the target layer of ``model``."""
        layer = head_layers(model)[task.head]
        return cls(task.head, matrix_of(layer).cpu(), layer.bias is not None, task)

    @property
    def parameters(self) -> Parameters:
        """The matrix by the name of the layer."""
        return {self.name: self.matrix_CD}

    @property
    def width(self) -> int:
        """Inputs of the layer, without the bias input."""
        return self.matrix_CD.shape[1] - self.has_bias

    def changed(self, parameters: Mapping[str, Tensor]) -> "Head":
        """A head with a copy of other parameters, on the CPU."""
        return Head(self.name, parameters[self.name].detach().cpu().clone(), self.has_bias, self.task)

    def of_model(self, model: nn.Module) -> "Head":
        """The head of another model of this kind."""
        return Head.of(model, self.task)

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """A forward pass that keeps the head's input.

        Refused when the head makes another output of it than the model.
        """
        outputs = self.task.forward(model, batch)
        features = outputs.features_BD
        recomputed = self.logits(features, self.matrix_CD.to(features.device))
        _check_linear(recomputed, outputs.logits_BC, model, torch.is_autocast_enabled(features.device.type))
        return outputs

    def outputs(self, shard: FeatureShard, rows: slice) -> tuple[Tensor, Tensor]:
        """Outputs and labels of some rows."""
        features, labels = shard.read(rows)
        return self.logits(features), labels

    def statistics(self, shard: FeatureShard, statistics: Mapping[str, Statistics]) -> ByLayer[Any]:
        """Statistics of the head."""
        return ByLayer({name: shard_statistics(shard, self, each) for name, each in statistics.items()})

    def scores(self, shard: FeatureShard, directions: Mapping[str, Tensor]) -> pa.Table:
        """Loss, influence and gradient norm of every sample (``score_shard``)."""
        return score_shard(shard, self, directions[self.name])

    def norms(self, shard: FeatureShard) -> Weights:
        """Gradient norm of every sample."""
        return norms_of(shard, self)

    def scope(self, sets: Mapping[str, FeatureStore], workers: Workers) -> "HeadScope":
        """The head on its samples."""
        return HeadScope(self, sets, workers)

    def apply(self, model: nn.Module) -> nn.Module:
        """A copy of the model with this head; every other tensor is bit-identical."""
        return with_parameters(model, self.parameters)

    def logits(self, features: Tensor, matrix_CD: Tensor | None = None) -> Tensor:
        """Outputs ``[B, C]`` or ``[B, T, C]`` for cached features, under another matrix if one is given; float64."""
        matrix = self.matrix_CD if matrix_CD is None else matrix_CD
        flat = features.flatten(0, -2)
        # The head on the left: a third faster than features @ matrix.T where classes are few. The features are not
        # copied.
        product = (matrix[:, : flat.shape[1]] @ flat.to(HEAD_DTYPE).T).T
        outputs = product + matrix[:, -1] if self.has_bias else product
        return outputs.view(*features.shape[:-1], len(matrix))

    def gradient(self, output_grads: Tensor, features: Tensor) -> Tensor:
        """Sum of the samples' gradients ``[C, D]``, without copying the features."""
        grads, flat = output_grads.flatten(0, -2), features.flatten(0, -2)
        weight = grads.T @ flat.to(HEAD_DTYPE)
        return torch.cat([weight, grads.sum(0).unsqueeze(1)], dim=1) if self.has_bias else weight

    def layer_io(self, features: Tensor, labels: Tensor) -> LayerIO:
        """What the layer sees of a block, and how the loss pulls on its outputs."""
        outputs = self.logits(features)
        hessian = position_hessian(outputs, self.task.target(labels))
        return self._layer_io(features, self.task.output_gradient(outputs, labels), hessian)

    def _layer_io(self, features: Tensor, output_grads: Tensor, hessian: LogitHessian | None = None) -> LayerIO:
        inputs = layer_inputs(features, self.has_bias)
        at_position = [part.unsqueeze(1) if part.ndim == 2 else part for part in (inputs, output_grads)]
        return LayerIO(at_position[0], at_position[1], hessian)


def shard_statistics(shard: FeatureShard, head: Head, statistics: Callable[[LayerIO], S]) -> S:
    """``statistics`` of each block, merged in a binary tree."""
    return merge_tree(statistics(head.layer_io(*block)) for block in shard.blocks())


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
    return score_table(shard, *(torch.cat(parts).double().numpy() for parts in (losses, scores, norms)))


def norms_of(shard: FeatureShard, head: Head) -> Weights:
    """Gradient norm of every sample of a shard."""
    return np.concatenate([np.empty(0), *(gradient_norms(head.layer_io(*block)).numpy() for block in shard.blocks())])


# How far logits recomputed from the features in float64 may be from the model's own, as a share of the largest.
LOGIT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def _check_linear(recomputed_BC: Tensor, logits_BC: Tensor, model: nn.Module, autocast: bool) -> None:
    """Refuse a model whose output is not the plain linear head of the cached features."""
    if not torch.isfinite(logits_BC).all():
        return  # told with the samples' ids by who called
    tolerance = 0.05 if autocast else LOGIT_TOLERANCE.get(logits_BC.dtype, 0.05)
    difference = (recomputed_BC - logits_BC).abs().max()
    if difference > tolerance * max(1.0, float(logits_BC.abs().max())):
        raise UnsupportedModelError(
            f"the output of {type(model).__name__} differs by {float(difference):.3g} from weight x features + bias of "
            "its head; expected a plain linear head with nothing after it; score and ascent would be those of another "
            "model"
        )


class HeadScope:
    """A head with the cached features of the forget and evaluation sets, as one worker sees them (``Scope``)."""

    def __init__(self, head: Head, sets: Mapping[str, FeatureStore], workers: Workers) -> None:
        self.head, self.sets, self.workers = head, sets, workers
        self.forget, self.metrics = sets["forget"], head.task.metrics
        self.rows, self.block_starts = len(self.forget), self.forget.block_starts
        self.moved = sets.get(FORGET_VIEWS, self.forget)
        self.views = len(self.moved) // self.rows
        self._start_CD = head.matrix_CD.to(workers.device)

    def parameters(self) -> Parameters:
        """A copy of the original matrix."""
        return {self.head.name: self._start_CD.clone()}

    def batch_gradient(
        self, parameters: Parameters, batch: Positions, weights: Weights, objective: OutputGradient, pieces: int
    ) -> Parameters:
        """Weighted mean of the head's gradients over the batch's rows, or their views.

        A worker without rows adds zeros.
        """
        matrix = parameters[self.head.name]
        gradient = torch.zeros_like(matrix)
        if not len(batch):  # no sample of the batch was kept when it was scored again
            return {self.head.name: gradient}
        for positions in self.workers.take(pieces_of(of_views(batch, self.views), pieces)):
            features, labels = (part.to(self.workers.device) for part in self.moved.gather(positions))
            outputs, original = (self.head.logits(features, each) for each in (matrix, self._start_CD))
            pull = objective(outputs, self.head.task.target(labels), original)
            pull = weigh(pull, torch.from_numpy(weights[positions // self.views]))
            gradient += self.head.gradient(pull, features)
        return {self.head.name: self.workers.sum(gradient) / (float(weights[batch].sum()) * self.views)}

    def measure(self, parameters: Parameters, sets: Iterable[str] | None = None) -> Record:
        """Figures of the sets, or of some of them, under other parameters."""
        matrix = parameters[self.head.name]
        chosen = {name: self.sets[name] for name in (self.sets if sets is None else sets)}

        def outputs_of(shard: FeatureShard, rows: slice) -> tuple[Tensor, Tensor]:
            features, labels = (part.to(self.workers.device) for part in shard.read(rows))
            return self.head.logits(features, matrix), labels

        return measure(chosen, outputs_of, self.head.task, self.workers)

    def probe(self, parameters: Parameters, sets: Iterable[str]) -> None:
        """All rows cost one product."""

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
            shards = [self.forget.shard_of(positions) for positions in pieces_of(batch, pieces)]

        def norm_quantile(level: float) -> float:
            return float(np.quantile(np.concatenate([norms_of(shard, head) for shard in shards]), level))

        fitted_on = None if curvature_set is None else _reduce(self.sets[curvature_set].shards, head)
        directions, _ = fit_directions(settings, [head.name], _reduce(shards, head), fitted_on, norm_quantile)
        table = pa.concat_tables([head.scores(shard, directions) for shard in shards])
        return table["influence"].to_numpy(), table["loss"].to_numpy()


def _reduce(shards: Sequence[FeatureShard], head: Head) -> ReduceLayers:
    return lambda statistics: {head.name: merge_tree(shard_statistics(shard, head, statistics) for shard in shards)}
