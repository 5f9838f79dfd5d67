"""What a forward pass leaves behind; statistics, scores and updates work on it.

Shapes: n samples of a shard, F features (the layer's input without the bias input), C classes. Where a task has T
positions a sample, features are ``[n, T, F]`` and labels ``[n, T]``; by ``forget_set.target`` labels may be ``[n, C]``,
float64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from imu_ray.errors import NonFiniteError
from imu_ray.tasks.base import BadRow

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FeatureShard:
    """Features ``[n, F]``, labels ``[n]``, ids ``[n]``, rows of each block, and places ``[n]``.

    All read in place from the object store.

    Features are float32 (float64 of a float64 model), float16, or the upper halves of float32 as uint16: bfloat16,
    which numpy does not have. A place is the sample's row in what the caller gave.
    """

    features_nF: npt.NDArray[np.floating] | npt.NDArray[np.uint16]
    labels_n: npt.NDArray[Any]
    ids: pa.StringArray
    block_sizes: tuple[int, ...]
    places_n: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def block_rows(self) -> Iterator[slice]:
        """Rows of each block."""
        start = 0
        for size in self.block_sizes:
            yield slice(start, start + size)
            start += size

    def take(self, kept_n: npt.NDArray[np.bool_]) -> "FeatureShard":
        """Some rows; the blocks keep their borders and lose the other rows."""
        sizes = tuple(int(kept_n[rows].sum()) for rows in self.block_rows())
        ids = self.ids.filter(pa.array(kept_n))
        return FeatureShard(self.features_nF[kept_n], self.labels_n[kept_n], ids, sizes, self.places_n[kept_n])

    def split(self) -> Iterator["FeatureShard"]:
        """Each block that holds rows as a shard of its own."""
        for rows in self.block_rows():
            size = rows.stop - rows.start
            if size:
                yield replace(
                    self,
                    features_nF=self.features_nF[rows],
                    labels_n=self.labels_n[rows],
                    ids=self.ids.slice(rows.start, size),
                    block_sizes=(size,),
                    places_n=self.places_n[rows],
                )

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
    marks_n: npt.NDArray[np.uint64]  # the first bits of what tells equal inputs, of each row with features


def take_rows(
    shard: FeatureShard, report: ShardReport, kept_n: npt.NDArray[np.bool_]
) -> tuple[FeatureShard, ShardReport]:
    """Some rows of a shard, and what is to be known of them."""
    part = shard.take(kept_n)
    nbytes = part.features_nF.nbytes
    marks = report.marks_n[kept_n]
    return part, replace(report, rows=len(part.ids), block_sizes=part.block_sizes, feature_bytes=nbytes, marks_n=marks)


SCORE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("label", pa.int64()),
        *((name, pa.float64()) for name in ("loss", "influence", "gradient_norm")),
    ]
)


def score_table(shard: FeatureShard, *columns: npt.NDArray[np.float64]) -> pa.Table:
    """The table of a shard (``SCORE_SCHEMA``) from loss, influence and gradient norm.

    Raises:
        NonFiniteError: one of them is NaN or infinite; the message names the samples.
    """
    table = pa.table([shard.ids, labels_column(shard), *columns], schema=SCORE_SCHEMA)
    wrong = ~np.isfinite(columns).all(axis=0)
    if wrong.any():
        raise NonFiniteError(
            f"loss, influence or gradient norm of {int(wrong.sum())} samples is NaN or infinite (ids "
            f"{first_of(table.filter(pa.array(wrong))['sample_id'].to_pylist())}); expected finite numbers; check the "
            "scale of weights and inputs, and influence.damping"
        )
    return table


def labels_column(shard: FeatureShard) -> pa.Array:
    """Labels of a shard as a column; null where a sample has no one class, but more numbers."""
    return pa.array(shard.labels_n) if shard.labels_n.ndim == 1 else pa.nulls(len(shard.labels_n), pa.int64())


def labels_and_places(shard: FeatureShard) -> tuple[npt.NDArray[Any], Positions]:
    """Of every sample of a shard its label, and its place in what the caller gave."""
    return shard.labels_n, shard.places_n


def at_places(shard: FeatureShard, places: Positions) -> npt.NDArray[np.bool_]:
    """Which samples of a shard stand at some places of what the caller gave."""
    return np.isin(shard.places_n, places)


def one_class(labels: npt.NDArray[Any]) -> Positions:
    """Labels of samples that have one class each; of others none."""
    return labels if labels.ndim == 1 else np.empty(0, np.int64)


def first_of(ids: Sequence[str | None]) -> str:
    """The first few ids, for a message."""
    return f"{', '.join(map(str, ids[:5]))}{', ...' if len(ids) > 5 else ''}"


def of_rows(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A weight for each row, ``[N]``: its own, or the mean over its tokens of ``[N, T]`` (NaN: no label)."""
    return weights if weights.ndim == 1 else np.nanmean(weights, axis=1)


def of_views(batch: Positions, views: int) -> Positions:
    """Positions of so many views of each row of a batch, which stand together."""
    return batch if views == 1 else (batch[:, None] * views + np.arange(views)).reshape(-1)


def pieces_of(batch: Positions, size: int) -> list[Positions]:
    """A batch in pieces of so many rows."""
    return [batch[i : i + size] for i in range(0, len(batch), size)]


class FeatureStore:
    """Cached features of one sample set, addressed by position: a row's place in the order of the shards."""

    def __init__(self, shards: Sequence[FeatureShard]) -> None:
        self.shards = list(shards)
        self.starts = np.cumsum([0] + [len(shard.labels_n) for shard in self.shards])
        self._buffer = np.empty((0, 0))  # fresh memory for every microbatch would cost more than the sums

    def __len__(self) -> int:
        return int(self.starts[-1])

    def blocks(self) -> list[tuple[FeatureShard, slice]]:
        """Every block as a shard and its rows."""
        return [(shard, rows) for shard in self.shards for rows in shard.block_rows()]

    def classes(self) -> Positions:
        """Labels that occur; none where a sample has no one class."""
        return np.unique(np.concatenate([one_class(shard.labels_n) for shard in self.shards]))

    @property
    def block_starts(self) -> Positions:
        """First position of each block."""
        sizes = [size for shard in self.shards for size in shard.block_sizes]
        return np.cumsum([0] + sizes[:-1])

    def shard_of(self, positions: Positions) -> FeatureShard:
        """The features of ascending positions as a shard of one block."""
        features, labels = self.gather(positions)
        return FeatureShard(features.numpy().copy(), labels.numpy(), pa.nulls(len(labels), pa.string()), (len(labels),))

    def gather(self, positions: Positions, dtype: npt.DTypeLike = np.float64) -> tuple[Tensor, Tensor]:
        """Features ``[B, F]`` or ``[B, T, F]`` and labels of ascending positions.

        The features lie in a buffer of the store and hold until the next call.
        """
        first = self.shards[0]
        if len(positions) > len(self._buffer) or self._buffer.dtype != dtype:
            self._buffer = np.empty((len(positions), *first.features_nF.shape[1:]), dtype)
        features = self._buffer[: len(positions)]
        labels = np.empty((len(positions), *first.labels_n.shape[1:]), dtype=first.labels_n.dtype)
        cuts = np.searchsorted(positions, self.starts)
        for index in np.flatnonzero(np.diff(cuts)):
            rows = slice(cuts[index], cuts[index + 1])
            local = positions[rows] - self.starts[index]
            features[rows] = self.shards[index].features(local)
            labels[rows] = self.shards[index].labels_n[local]
        return torch.from_numpy(features), torch.from_numpy(labels)
