"""What a forward pass leaves behind; moments, scores and the ascent work on it.

Shapes: n samples of a shard, F features (the head's input without the bias input).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from imu_ray.errors import NonFiniteError
from imu_ray.influence.curvature.base import S, merge_tree
from imu_ray.influence.gradients import LayerIO, classifier_io, gradient_norms
from imu_ray.influence.scores import influence_scores, sample_losses
from imu_ray.scopes.head import Head
from imu_ray.tasks.base import BadRow


@dataclass(frozen=True)
class FeatureShard:
    """Features ``[n, F]``, labels ``[n]``, ids ``[n]``, rows of each block, and places ``[n]``; all read in place from the object store.

    Features are float32 (float64 of a float64 model), float16, or the upper halves of float32 as uint16: bfloat16, which numpy
    does not have. A place is the sample's row in what the caller gave.
    """

    features_nF: npt.NDArray[np.floating] | npt.NDArray[np.uint16]
    labels_n: npt.NDArray[np.int64]
    ids: pa.StringArray
    block_sizes: tuple[int, ...]
    places_n: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def block_rows(self) -> Iterator[slice]:
        """Rows of each block."""
        start = 0
        for size in self.block_sizes:
            yield slice(start, start + size)
            start += size

    def features(self, rows: slice | npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        """Features of some rows as floating numbers."""
        kept: npt.NDArray[Any] = self.features_nF[rows]
        return (kept.astype(np.uint32) << 16).view(np.float32) if kept.dtype == np.uint16 else kept

    def read(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Float64 features and labels of some rows."""
        # The copies make arrays from the object store, which are read-only, safe to hand to torch.
        return torch.from_numpy(self.features(rows).astype(np.float64)), torch.from_numpy(self.labels_n[rows].copy())

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
    part = FeatureShard(
        shard.features_nF[kept_n], shard.labels_n[kept_n], shard.ids.filter(pa.array(kept_n)), sizes, shard.places_n[kept_n]
    )
    return part, replace(report, rows=len(part.ids), block_sizes=sizes, feature_bytes=part.features_nF.nbytes)


def block_io(features_BF: Tensor, labels_B: Tensor, head: Head) -> LayerIO:
    """What the head sees and how the loss pulls on its outputs, for one block."""
    return classifier_io(head.inputs(features_BF), head.logits(features_BF), labels_B)


def shard_statistics(shard: FeatureShard, head: Head, statistics: Callable[[LayerIO], S]) -> S:
    """``statistics`` of each block, merged in a binary tree."""
    return merge_tree(statistics(block_io(features, labels, head)) for features, labels in shard.blocks())


SCORE_SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("label", pa.int64()), *((name, pa.float64()) for name in ("loss", "influence", "gradient_norm"))]
)


def score_shard(shard: FeatureShard, head: Head, direction_CD: Tensor) -> pa.Table:
    """Loss, influence and gradient norm of every sample of a shard (``SCORE_SCHEMA``).

    Raises:
        NonFiniteError: one of them is NaN or infinite; the message names the samples.
    """
    losses, scores, norms = [torch.empty(0)], [torch.empty(0)], [torch.empty(0)]
    for features, labels in shard.blocks():
        logits = head.logits(features)
        layer_io = classifier_io(head.inputs(features), logits, labels)
        losses.append(sample_losses(logits, labels))
        scores.append(influence_scores(layer_io, direction_CD))
        norms.append(gradient_norms(layer_io))
    columns = [torch.cat(parts).double().numpy() for parts in (losses, scores, norms)]
    table = pa.table([shard.ids, shard.labels_n, *columns], schema=SCORE_SCHEMA)
    wrong = ~np.isfinite(columns).all(axis=0)
    if wrong.any():
        raise NonFiniteError(
            f"loss, influence or gradient norm of {int(wrong.sum())} samples is NaN or infinite "
            f"(ids {first_of(table.filter(pa.array(wrong))['sample_id'].to_pylist())}); expected finite numbers; check the scale of "
            "weights and inputs, and influence.damping"
        )
    return table


def first_of(ids: Sequence[str | None]) -> str:
    """The first few ids, for a message."""
    return f"{', '.join(map(str, ids[:5]))}{', ...' if len(ids) > 5 else ''}"


def norms_of(shard: FeatureShard, head: Head) -> npt.NDArray[np.float64]:
    """Gradient norm of every sample of a shard."""
    return np.concatenate([np.empty(0), *(gradient_norms(block_io(*block, head)).numpy() for block in shard.blocks())])
