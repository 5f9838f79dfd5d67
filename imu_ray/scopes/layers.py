"""The scope of linear and convolutional layers inside a model: a pass from the cut forward, and back through them.

Features are what crosses the cut, the earliest point of the forward pass that the layers influence. Shapes: B samples,
C outputs and D inputs of a layer (its bias input included), F numbers that cross the cut.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from imu_ray.config import UnlearnConfig
from imu_ray.errors import UnsupportedModelError
from imu_ray.influence.curvature.base import Moments, merge_tree
from imu_ray.influence.curvature.kronecker import FactorSums, sampled_labels, uniform_draws
from imu_ray.influence.gradients import HEAD_DTYPE, IGNORE
from imu_ray.influence.layer_io import as_matrix, layer_io, layer_scores, matrix_of, weights_of
from imu_ray.influence.projection import OUTPUTS, Projected, of_positions
from imu_ray.influence.scores import position_losses
from imu_ray.influence.targets import drawn_gradient, has_positions, position_hessian
from imu_ray.models.cut import Cut, Values
from imu_ray.models.layers import output_layer
from imu_ray.models.taps import tapped
from imu_ray.scopes.base import FORGET_VIEWS, ByLayer, OutputGradient, Parameters, Record, Statistics, Weights
from imu_ray.scopes.features import FeatureShard, FeatureStore, Positions, of_rows, of_views, pieces_of, score_table
from imu_ray.scopes.measure import measure
from imu_ray.scopes.seen import Seen, clipped, layer_moments, layer_of, weigh, with_parameters
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.base import Batch, Outputs, Task, rows_at_once

FEW_POSITIONS = 8  # that the output layer is looked for with


@dataclass(frozen=True)
class Layers:
    """Layers of a model with their parameters, ``[C, D]`` float64 on the CPU, and the two halves of its forward pass.

    Attributes:
        parameters: by layer, in order of execution.
        cut: what runs before and after the point that the layers influence.
        task: what a sample is.
        seed: of the labels that are drawn from the model.
        autocast: type that autocast runs the layers in, or ``none``.
        device: where a pass runs.
        output: the output layer, where logits at many positions are made in slices; empty where they stand whole,
            because they are few, the layer moves, or the model does more with what it gives.
    """

    parameters: Parameters
    cut: Cut
    task: Task
    seed: int = 0
    autocast: str = "none"
    device: str = "cpu"
    output: str = ""
    deep: ClassVar[bool] = True

    @classmethod
    def of_names(
        cls, model: nn.Module, task: Task, names: Sequence[str], example: Tensor, config: UnlearnConfig
    ) -> "Layers":
        """Those layers of a model; the example is a batch of its inputs."""
        device = "cuda" if config.resources.gpus_per_worker else "cpu"
        parameters = {name: matrix_of(layer_of(model, name)) for name in names}
        output = ""
        if task.positions * task.num_classes > OUTPUTS:
            found = output_layer(model, example[:1, :FEW_POSITIONS], task.num_classes)
            output = "" if found in names else found
        cut = Cut.of(model, example, names, output)
        return cls(parameters, cut, task, config.seed, config.influence.autocast, device, output)

    @property
    def width(self) -> int:
        """Numbers that cross the cut."""
        return self.cut.width

    def changed(self, parameters: Mapping[str, Tensor]) -> "Layers":
        """The layers with a copy of other parameters, on the CPU."""
        return replace(self, parameters={name: parameters[name].detach().cpu().clone() for name in self.parameters})

    def of_model(self, model: nn.Module) -> "Layers":
        """The same layers of another model of this kind."""
        return self.changed({name: matrix_of(layer_of(model, name)) for name in self.parameters})

    def apply(self, model: nn.Module) -> nn.Module:
        """A copy of the model with these layers; every other tensor is bit-identical."""
        return with_parameters(model, self.parameters)

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """A forward pass that keeps what crosses the cut; of outputs at many positions the loss stands for them."""
        self.cut.model.to(self.device)
        values, labels = self.cut.prefix(batch.inputs), batch.labels_B
        outputs = self.cut.suffix(values, last=self.output)
        if has_positions(labels):
            outputs = self.task.sample_metrics(self.logits(outputs), labels)["loss"].unsqueeze(1).to(outputs.dtype)
        return Outputs(outputs, labels, self.cut.join(values))

    def read(self, shard: FeatureShard, rows: slice) -> tuple[Values, Tensor]:
        """What crosses the cut, and the labels, of some rows; on the device."""
        features = torch.from_numpy(np.array(shard.features(rows), dtype=self.kept))
        return self.taken(features, torch.from_numpy(shard.labels_n[rows].copy()))

    def taken(self, features: Tensor, labels: Tensor) -> tuple[Values, Tensor]:
        """Kept features as what crosses the cut, and labels, on the device, up to the last position with a label."""
        values, labels = self.cut.split(features.to(self.device, self.cut.dtype)), labels.to(self.device)
        if has_positions(labels) and self.cut.trivial:
            length = int(used_positions(labels).sum(1).max())
            values, labels = tuple(value[:, :length] for value in values), labels[:, :length]
        return values, labels

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the model."""
        return next(self.cut.model.parameters()).dtype

    @property
    def kept(self) -> type[np.floating[Any]]:
        """The same as numpy names it."""
        return np.float64 if self.dtype == torch.float64 else np.float32

    def weights(self, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The layers' weights and biases as the model takes them, on the device, ready to be differentiated."""
        found, parameters = {}, self.parameters if parameters is None else parameters
        model = self.cut.model.to(self.device)
        for name, matrix in parameters.items():
            layer = layer_of(model, name)
            for key, weight in weights_of(layer, matrix.to(self.device, layer.weight.dtype, copy=True)).items():
                found[f"{name}.{key}"] = weight.contiguous().requires_grad_()
        return found

    def run(self, weights: Mapping[str, Tensor], values: Values) -> Tensor:
        """Outputs from what crosses the cut, or what the output layer sees where logits are made in slices."""
        kind = getattr(torch, self.autocast, None)
        with torch.autocast(torch.device(self.device).type, kind, enabled=self.autocast != "none"):
            return self.cut.suffix(values, weights, self.output)

    def logits(self, outputs: Tensor) -> Tensor:
        """What stands for the outputs of a run: themselves, without gradients, or ``Projected``."""
        outputs = outputs.detach()
        if not self.output:
            return wide(outputs)
        layer, kind = self.cut.model.get_submodule(self.output), getattr(torch, self.autocast, None)
        return cast(Tensor, Projected(outputs, cast(nn.Linear, layer), kind))  # which is sliced as a tensor is

    def outputs(
        self, shard: FeatureShard, rows: slice, weights: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs and labels of some rows."""
        if rows.stop == rows.start:  # which not every network takes
            labels = torch.from_numpy(shard.labels_n[rows].copy()).to(self.device)
            shape = labels.shape if has_positions(labels) else labels.shape[:1]
            return torch.empty(*shape, self.task.num_classes, dtype=torch.float64, device=self.device), labels
        values, labels = self.read(shard, rows)
        with torch.no_grad():
            return self.logits(self.run(self.weights() if weights is None else weights, values)), labels

    def add_gradient(
        self,
        total: dict[str, Tensor],
        weights: Mapping[str, Tensor],
        values: Values,
        pull_of: Callable[[Tensor], Tensor],
    ) -> None:
        """Add each weight's gradient to ``total``, float32 at least, for a pull that follows from the outputs."""
        with torch.enable_grad():
            outputs = self.run(weights, values)
            pull = pull_of(self.logits(outputs)).to(outputs.dtype)
            grads = torch.autograd.grad(outputs, list(weights.values()), pull)
        for name, grad in zip(weights, grads, strict=True):
            total[name] = (
                total[name].add_(grad) if name in total else grad.to(torch.promote_types(grad.dtype, torch.float32))
            )

    def matrices(self, total: Mapping[str, Tensor]) -> Parameters:
        """What was added as ``[C, D]`` of each layer, float64; zeros where nothing was."""
        if not total:
            return {name: torch.zeros_like(matrix, device=self.device) for name, matrix in self.parameters.items()}
        layers = {name: layer_of(self.cut.model, name) for name in self.parameters}
        return {
            name: as_matrix(layer, total[f"{name}.weight"], total.get(f"{name}.bias")) for name, layer in layers.items()
        }

    def seen(
        self,
        values: Values,
        pull_of: Callable[[Tensor], Tensor],
        take: Callable[[Seen, Tensor], None],
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Outputs; a pull on them, which follows from them, is taken back through the layers.

        What each layer saw is given to ``take`` with the outputs, the last layer first, and then dropped.

        Raises:
            UnsupportedModelError: a layer took no part.
        """
        missing = set(self.parameters)

        def show(name: str, inputs: Tensor, grads: Tensor) -> None:
            missing.discard(name)
            take(Seen(name, layer_of(self.cut.model, name), inputs, grads), found)

        with torch.enable_grad(), tapped(self.cut.model, self.parameters, show) as way:
            outputs = self.run(self.weights() if weights is None else weights, values)
            found = self.logits(outputs)
            pull = pull_of(found).to(outputs.dtype)
            torch.autograd.grad(outputs, way, pull, allow_unused=True)
        if missing:
            raise UnsupportedModelError(
                f"{', '.join(sorted(missing))} took no part in a forward pass of some rows; expected all layers of the "
                "scope to act on every row; leave them out of ascent.scope"
            )
        return found

    def statistics(self, shard: FeatureShard, statistics: Mapping[str, Statistics]) -> ByLayer[Any]:
        """Statistics of each block by layer, merged in a binary tree.

        K-FAC's factors are those under labels drawn from the model, one for each row.
        """
        drawn = FactorSums.of in statistics.values()
        limit = min((each for each in map(_limit, statistics.values()) if each is not None), default=None)

        def of_block(rows: slice) -> ByLayer[Any]:
            if rows.stop == rows.start:
                return ByLayer({})
            values, labels = self.read(shard, rows)

            def drawn_pull(outputs: Tensor) -> Tensor:
                ids = shard.ids.slice(rows.start, rows.stop - rows.start).to_pylist()
                return self._drawn_pull(outputs, labels, ids)

            def keep(each: Seen, outputs: Tensor) -> None:
                found[each.name] = self._statistic(each, statistics[each.name], labels, outputs)

            found = dict[str, Any]()
            pull_of = drawn_pull if drawn else functools.partial(self._label_pull, labels)
            if limit is None:
                self.seen(values, pull_of, keep)
            else:  # a norm over all layers takes all of them at once
                seen: list[Seen] = []
                outputs = self.seen(values, pull_of, lambda each, _: seen.append(each))
                for each in clipped(seen, limit):
                    keep(each, outputs)
            return ByLayer({name: found[name] for name in self.parameters})

        return merge_tree(map(of_block, shard.block_rows()))

    def _label_pull(self, labels: Tensor, outputs: Tensor) -> Tensor:
        return self.task.output_gradient(outputs, labels)

    def _drawn_pull(self, outputs: Tensor, labels: Tensor, ids: Sequence[str]) -> Tensor:
        """The pull of labels that are drawn from the model: its second moment is the loss's curvature."""
        target = self.task.target(labels)
        if has_positions(labels):
            draws = uniform_draws(ids, self.seed, *labels.shape[1:])
            drawn = of_positions(sampled_labels, outputs, draws).where(labels != IGNORE, IGNORE)
            return self.task.output_gradient(outputs, drawn)
        if target.ndim == 3:  # several labels a sample, which are independent of each other
            draws = uniform_draws(ids, self.seed, outputs.shape[1])
            return drawn_gradient(outputs, target, draws.to(outputs.device) < torch.sigmoid(outputs))
        drawn = sampled_labels(outputs, uniform_draws(ids, self.seed))
        if target.is_floating_point():
            return drawn_gradient(outputs, target, drawn)
        return self.task.output_gradient(outputs, drawn)

    def _statistic(self, seen: Seen, statistic: Statistics, labels: Tensor, outputs: Tensor) -> Any:
        inner = seen.name != self.task.head
        if inner and statistic == FactorSums.of:
            used = used_positions(labels) if has_positions(labels) and seen.inputs.shape[:2] == labels.shape else None
            return FactorSums.of_layer(seen.layer, seen.inputs, seen.output_grads, used)
        if inner and getattr(statistic, "func", statistic) == Moments.of:  # clipped already, over all layers
            return layer_moments(seen.layer, seen.inputs, seen.output_grads)
        found = layer_io(seen.layer, seen.inputs.double(), seen.output_grads.double())
        return statistic(
            found if inner else replace(found, hessian=position_hessian(outputs, self.task.target(labels)))
        )

    def scores(self, shard: FeatureShard, directions: Mapping[str, Tensor]) -> pa.Table:
        """Loss, influence and gradient norm of every sample; influence and squared norms add up over the layers."""
        weights = self.weights()

        def of_block(rows: slice) -> list[Tensor]:
            values, labels = self.read(shard, rows)
            influence, squares = torch.zeros(2, len(labels), dtype=torch.float64, device=labels.device)

            def add(each: Seen, _: Tensor) -> None:
                parts = layer_scores(each.layer, each.inputs, each.output_grads, directions[each.name])
                influence.add_(parts[0])
                squares.add_(parts[1])

            outputs = self.seen(values, functools.partial(self._label_pull, labels), add, weights)
            loss = self.task.sample_metrics(outputs, labels)["loss"]
            return [column.double().cpu() for column in (loss, influence, squares.sqrt())]

        blocks = [*map(of_block, filled(shard))] or [[torch.empty(0).double()] * 3]
        return score_table(shard, *(torch.cat(parts).numpy() for parts in zip(*blocks, strict=True)))

    def token_scores(self, shard: FeatureShard, directions: Mapping[str, Tensor]) -> tuple[Weights, Weights]:
        r"""Influence and loss of every token, ``[n, T]``; NaN at a position without a label.

        .. math:: I_{it} = -\frac{1}{T_i} \langle \nabla \ell_{it}, M \rangle

        A row's tokens add up to its influence. The pass that gives the outputs gives their derivative along M with it
        (forward mode), so that no token needs a pass of its own.
        """
        influence, losses = np.full((2, len(shard.ids), self.task.positions), np.nan)
        weights = {name: weight.detach() for name, weight in self.weights().items()}
        along = {name: weight.detach() for name, weight in self.weights(directions).items()}
        for rows in filled(shard):
            values, labels = self.read(shard, rows)
            run: Any = functools.partial(self.run, values=values)
            # Attention's fused kernels have no forward mode, and the rules that torch loads for it warn of torch.jit.
            with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                made, moved = cast(tuple[Tensor, Tensor], torch.func.jvp(run, (weights,), (along,)))
            outputs = self.logits(made)
            pull, known = self.task.output_gradient(outputs, labels), (labels != IGNORE).cpu().numpy()
            for column, found in (
                (influence, -(pull * moved).sum(-1, dtype=HEAD_DTYPE)),
                (losses, position_losses(outputs, labels)),
            ):
                column[rows, : labels.shape[1]][known] = found.cpu().numpy()[known]
        return influence, losses

    def norms(self, shard: FeatureShard) -> Weights:
        """Gradient norm of every sample."""
        nowhere = {name: torch.zeros_like(matrix) for name, matrix in self.parameters.items()}
        found: Weights = self.scores(shard, nowhere)["gradient_norm"].to_numpy()
        return found

    def scope(self, sets: Mapping[str, FeatureStore], workers: Workers) -> "LayersScope":
        """The layers on their samples."""
        return LayersScope(self, sets, workers)


def shard_gradient(
    shard: FeatureShard, weights_n: Weights, part: Layers, original: Layers | None, objective: OutputGradient
) -> ByLayer[Any]:
    """Sum of the weighted objective's gradients over a shard.

    ``original`` where the parameters are not the original ones.
    """
    weights = part.weights()

    def of_block(rows: slice) -> ByLayer[Any]:
        if not weights_n[rows].any():
            return ByLayer({})
        values, labels = part.read(shard, rows)
        before = None if original is None else original.outputs(shard, rows)[0]
        share = shares_of(weights_n[rows], labels)
        total, target = dict[str, Tensor](), part.task.target(labels)
        part.add_gradient(total, weights, values, functools.partial(_pull, objective, target, before, share))
        return ByLayer({name: TensorSum(matrix.cpu()) for name, matrix in part.matrices(total).items()})

    return merge_tree(map(of_block, shard.block_rows()))


@dataclass(frozen=True)
class TensorSum:
    """A sum; additive."""

    total: Tensor

    def merge(self, other: "TensorSum") -> "TensorSum":
        """The sum of both."""
        return TensorSum(self.total + other.total)


class LayersScope:
    """Layers on the kept features of the forget set and the evaluation sets, as one worker sees them (``Scope``)."""

    def __init__(self, part: Layers, sets: Mapping[str, FeatureStore], workers: Workers) -> None:
        self.part, self.sets, self.workers = replace(part, device=str(workers.device)), sets, workers
        self.metrics = part.task.metrics
        self.rows, self.block_starts = len(sets["forget"]), sets["forget"].block_starts
        self.moved = sets.get(FORGET_VIEWS, sets["forget"])
        self.views = len(self.moved) // self.rows

    def parameters(self) -> Parameters:
        """Copies of the original parameters."""
        return {name: matrix.to(self.workers.device, copy=True) for name, matrix in self.part.parameters.items()}

    def batch_gradient(
        self, parameters: Parameters, batch: Positions, weights: Weights, objective: OutputGradient, pieces: int
    ) -> Parameters:
        """Weighted mean over the batch's rows and their views; a worker without rows adds zeros."""
        if not len(batch):
            return self.part.matrices({})
        total, moved = dict[str, Tensor](), self.part.weights(parameters)
        original = self.part.weights() if looks_back(objective) else None
        for positions in self.workers.take(
            pieces_of(of_views(batch, self.views), rows_at_once(pieces, self.part.task))
        ):
            (values, labels), before = self.part.taken(*self.moved.gather(positions, self.part.kept)), None
            if original is not None:
                with torch.no_grad():
                    before = self.part.logits(self.part.run(original, values))
            share = shares_of(weights[positions // self.views], labels)
            pull_of = functools.partial(_pull, objective, self.part.task.target(labels), before, share)
            self.part.add_gradient(total, moved, values, pull_of)
        scale = float(of_rows(weights[batch]).sum()) * self.views
        return {name: self.workers.sum(matrix).div_(scale) for name, matrix in self.part.matrices(total).items()}

    def measure(self, parameters: Parameters, sets: Iterable[str] | None = None) -> Record:
        """Figures of the sets, or of some of them, under other parameters."""
        chosen = {name: self.sets[name] for name in (self.sets if sets is None else sets)}
        outputs_of = functools.partial(self.part.outputs, weights=self.part.weights(parameters))
        return measure(chosen, outputs_of, self.part.task, self.workers)

    def probe(self, parameters: Parameters, sets: Iterable[str]) -> None:
        """All rows are measured."""

    def influence(self, *arguments: Any) -> tuple[Weights, Weights]:
        """Never asked for: ``influence.refresh`` of layers is refused before an update begins."""
        raise NotImplementedError


def _limit(statistic: Statistics) -> float | None:
    """The norm at which a statistic clips the gradients of samples, if it does."""
    return statistic.keywords.get("clip") if isinstance(statistic, functools.partial) else None


def _pull(objective: OutputGradient, target: Tensor, before: Tensor | None, share: Tensor, outputs: Tensor) -> Tensor:
    """The weighted pull of an objective on outputs.

    ``before`` are those before unlearning, None where they are the same.
    """
    return weigh(objective(outputs, target, outputs if before is None else before), share)


def wide(outputs: Tensor) -> Tensor:
    """Outputs in float64; as they are at many positions, which are worked on in slices."""
    return outputs.double() if outputs.ndim == 2 else outputs


def shares_of(weights: Weights, labels: Tensor) -> Tensor:
    """Weights of rows, or of their tokens as far as there are labels, on the labels' device; 0 without a label."""
    used = weights if weights.ndim == 1 else np.nan_to_num(weights[:, : labels.shape[1]])
    return torch.from_numpy(used.copy()).to(labels.device)


def used_positions(labels: Tensor) -> Tensor:
    """Which positions ``[B, T]`` a sample's loss depends on: those up to its last label."""
    return (labels != IGNORE).int().flip(1).cummax(1).values.flip(1).bool()


def filled(shard: FeatureShard) -> list[slice]:
    """Rows of the blocks that hold any."""
    return [rows for rows in shard.block_rows() if rows.stop > rows.start]


def looks_back(objective: OutputGradient) -> bool:
    """Whether an objective depends on the outputs before unlearning."""
    outputs = torch.zeros(1, 2, dtype=torch.float64)
    return bool(objective(outputs, torch.zeros(1, dtype=torch.int64), outputs + torch.nan).isnan().any())
