"""One forward pass leaves feature blocks behind; moments, scores and the ascent work on them.

Shapes: n samples of a shard, F features (the head's input without the bias input).
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from imu_ray.errors import NonFiniteError, UnsupportedModelError
from imu_ray.forget_set import ForgetSet, Shard
from imu_ray.influence.curvature.base import S, merge_tree
from imu_ray.influence.gradients import LayerIO, classifier_io, gradient_norms
from imu_ray.influence.scores import influence_scores, sample_losses
from imu_ray.models import Head, evaluation_mode
from imu_ray.tasks.base import BadRow, Batch, Task


@dataclass(frozen=True)
class FeatureShard:
    """Features ``[n, F]`` (float32, or float64 of a float64 model), labels ``[n]``, ids, rows of each block, and places ``[n]``.

    A place is the sample's row in what the caller gave.
    """

    features_nF: npt.NDArray[np.floating]
    labels_n: npt.NDArray[np.int64]
    ids: list[str]
    block_sizes: tuple[int, ...]
    places_n: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def block_rows(self) -> Iterator[slice]:
        """Rows of each block."""
        start = 0
        for size in self.block_sizes:
            yield slice(start, start + size)
            start += size

    def read(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Float64 features and labels of some rows."""
        # The copies make arrays from the object store, which are read-only, safe to hand to torch.
        return torch.from_numpy(self.features_nF[rows].astype(np.float64)), torch.from_numpy(self.labels_n[rows].copy())

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Float64 features and labels of each block."""
        return (self.read(rows) for rows in self.block_rows())


@dataclass(frozen=True, slots=True)  # the driver holds one for each shard
class ShardReport:
    """What the driver needs to know of an extracted shard; small."""

    index: int
    rows: int
    block_sizes: tuple[int, ...]
    digests: bytes  # of the blocks, 32 bytes each
    bad_rows: tuple[BadRow, ...]
    forward_seconds: float
    feature_bytes: int


def take_rows(shard: FeatureShard, report: ShardReport, kept_n: npt.NDArray[np.bool_]) -> tuple[FeatureShard, ShardReport]:
    """Some rows of a shard; its blocks keep their borders and lose the other rows."""
    sizes = tuple(int(kept_n[rows].sum()) for rows in shard.block_rows())
    ids = [sample_id for sample_id, kept in zip(shard.ids, kept_n, strict=True) if kept]
    part = FeatureShard(shard.features_nF[kept_n], shard.labels_n[kept_n], ids, sizes, shard.places_n[kept_n])
    return part, replace(report, rows=len(ids), block_sizes=sizes, feature_bytes=part.features_nF.nbytes)


def extract_features(
    source: ForgetSet, shard: Shard, task: Task, model: nn.Module, device: torch.device
) -> tuple[FeatureShard, ShardReport]:
    """Read a shard and run the model over it, one forward call per block, in eval mode.

    Raises:
        ForgetSetError: a row cannot be used.
        NonFiniteError: a feature is NaN or infinite; the message names the sample.
    """
    features, labels, ids, digests, places = [], [], [], b"", []
    bad: list[BadRow] = []
    seconds = 0.0
    head = Head.of(model, task.head)
    matrix = head.matrix_CD.to(device)
    everything = source.read(shard.start, shard.stop)
    with evaluation_mode(model):
        for start, stop in shard.blocks():
            rows = everything.part(start - shard.start, stop - shard.start)
            digests += rows.digest()
            batch = task.collate(rows)
            bad += batch.bad_rows
            labels.append(batch.labels_B.numpy())
            ids.append(batch.ids)
            # Left-out rows are not in the batch; the others keep their order.
            usable = np.isin(rows.ids, batch.ids) if batch.bad_rows else slice(None)
            places.append(source.positions(start, stop)[usable])
            if batch.ids:
                started = time.perf_counter()
                outputs = task.forward(model, _to(batch, device))
                kept = _finite(outputs.features_BD, outputs.logits_BC, batch.ids)
                _check_linear(head.logits(kept, matrix), outputs.logits_BC, model)
                features.append(kept.cpu().numpy())
                seconds += time.perf_counter() - started
    width = task.target_layers(model)[task.head].in_features
    stacked = np.concatenate(features) if features else np.empty((0, width), np.float32)
    sizes = tuple(len(part) for part in ids)
    flat = [sample_id for part in ids for sample_id in part]
    report = ShardReport(shard.index, len(flat), sizes, digests, tuple(bad), seconds, stacked.nbytes)
    return FeatureShard(stacked, np.concatenate(labels), flat, sizes, np.concatenate(places)), report


def _to(batch: Batch, device: torch.device) -> Batch:
    return replace(batch, inputs=batch.inputs.to(device), labels_B=batch.labels_B.to(device))


def _finite(features_BF: Tensor, logits_BC: Tensor, ids: list[str]) -> Tensor:
    """Features in float32 or better; refused when they, or the logits, are not finite."""
    bad = ~(torch.isfinite(features_BF).all(dim=1) & torch.isfinite(logits_BC).all(dim=1))
    if bad.any():
        named = [ids[place] for place in bad.nonzero()[:, 0].tolist()]
        raise NonFiniteError(
            f"the model gives NaN or infinity for {len(named)} samples of a block (ids {', '.join(named[:5])}"
            f"{', ...' if len(named) > 5 else ''}); expected finite features and logits; check the weights and the inputs' scale"
        )
    return features_BF if features_BF.dtype == torch.float64 else features_BF.float()


# How far logits recomputed from the features in float64 may be from the model's own, as a share of the largest.
LOGIT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def _check_linear(recomputed_BC: Tensor, logits_BC: Tensor, model: nn.Module) -> None:
    """Refuse a model whose output is not the plain linear head of the cached features."""
    tolerance = LOGIT_TOLERANCE.get(logits_BC.dtype, 0.05)
    difference = (recomputed_BC - logits_BC).abs().max()
    if difference > tolerance * max(1.0, float(logits_BC.abs().max())):
        raise UnsupportedModelError(
            f"the output of {type(model).__name__} differs by {float(difference):.3g} from weight x features + bias of its head; expected a "
            "plain linear head with nothing after it; score and ascent would be those of another model"
        )


def block_io(features_BF: Tensor, labels_B: Tensor, head: Head) -> LayerIO:
    """What the head sees and how the loss pulls on its outputs, for one block."""
    inputs = head.inputs(features_BF)
    return classifier_io(inputs, inputs @ head.matrix_CD.T, labels_B)


def shard_statistics(shard: FeatureShard, head: Head, statistics: Callable[[LayerIO], S]) -> S:
    """``statistics`` of each block, merged in a binary tree."""
    return merge_tree(statistics(block_io(features, labels, head)) for features, labels in shard.blocks())


SCORE_SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("label", pa.int64()), *((name, pa.float64()) for name in ("loss", "influence", "gradient_norm"))]
)


def score_shard(shard: FeatureShard, head: Head, direction_CD: Tensor) -> pa.Table:
    """Loss, influence and gradient norm of every sample of a shard (``SCORE_SCHEMA``)."""
    losses, scores, norms = [torch.empty(0)], [torch.empty(0)], [torch.empty(0)]
    for features, labels in shard.blocks():
        layer_io = block_io(features, labels, head)
        losses.append(sample_losses(head.logits(features), labels))
        scores.append(influence_scores(layer_io, direction_CD))
        norms.append(gradient_norms(layer_io))
    columns = [torch.cat(parts).double().numpy() for parts in (losses, scores, norms)]
    return pa.table([pa.array(shard.ids, pa.string()), shard.labels_n, *columns], schema=SCORE_SCHEMA)


def norms_of(shard: FeatureShard, head: Head) -> npt.NDArray[np.float64]:
    """Gradient norm of every sample of a shard."""
    return np.concatenate([np.empty(0), *(gradient_norms(block_io(*block, head)).numpy() for block in shard.blocks())])
