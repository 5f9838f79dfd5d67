"""Which rows make up each global batch, and in which pieces they are dealt to workers.

The plan is a function of the seed, the epoch and the kept rows alone, never of the number of workers. A *position* is a row's
place in the order of the feature shards.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from imu_ray.config import AscentConfig
from imu_ray.scopes.features import FeatureShard

Positions = npt.NDArray[np.int64]


def epoch_batches(kept: Positions, block_starts: Positions, config: AscentConfig, seed: int, epoch: int) -> list[list[Positions]]:
    """The global batches of an epoch, each a list of microbatches of positions.

    Blocks are permuted by ``(seed, epoch)``; rows are shuffled within windows of ``window_blocks`` blocks, so that reads
    stay near each other. Within a batch, whose sum does not ask for an order, positions ascend, so that a worker's
    microbatches lie together.

    Args:
        kept: positions with a positive weight, ascending.
        block_starts: first position of each block, ascending.
        config: batch, microbatch and window sizes.
        seed: seed of the run.
        epoch: index of the epoch.

    Returns:
        Every kept position exactly once; the last batch and the last microbatch of each batch may be shorter.
    """
    random = np.random.default_rng((seed, epoch))
    pieces = np.split(kept, np.searchsorted(kept, block_starts[1:]))
    order = random.permutation(len(pieces))
    windows = [order[i : i + config.window_blocks] for i in range(0, len(order), config.window_blocks)]
    rows = np.concatenate([random.permutation(np.concatenate([pieces[block] for block in window])) for window in windows])
    batches = [np.sort(rows[i : i + config.batch_size]) for i in range(0, len(rows), config.batch_size)]
    return [microbatches(batch, config) for batch in batches]


def microbatches(batch: Positions, config: AscentConfig) -> list[Positions]:
    """A batch cut into pieces of ``microbatch_rows``; the last may be shorter."""
    size = config.microbatch_rows
    return [batch[i : i + size] for i in range(0, len(batch), size)]


class FeatureStore:
    """Cached features of one sample set, addressed by position."""

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
        """Labels that occur."""
        return np.unique(np.concatenate([shard.labels_n for shard in self.shards]))

    @property
    def block_starts(self) -> Positions:
        """First position of each block."""
        sizes = [size for shard in self.shards for size in shard.block_sizes]
        return np.cumsum([0] + sizes[:-1])

    def shard_of(self, positions: Positions) -> FeatureShard:
        """The features of ascending positions as a shard of one block."""
        features, labels = self.gather(positions)
        return FeatureShard(features.numpy().copy(), labels.numpy(), pa.nulls(len(labels), pa.string()), (len(labels),))

    def gather(self, positions: Positions) -> tuple[Tensor, Tensor]:
        """Features ``[B, F]`` (float64) and labels ``[B]`` of ascending positions.

        The features lie in a buffer of the store and hold until the next call.
        """
        if len(positions) > len(self._buffer):
            self._buffer = np.empty((len(positions), self.shards[0].features_nF.shape[1]))
        features, labels = self._buffer[: len(positions)], np.empty(len(positions), dtype=np.int64)
        cuts = np.searchsorted(positions, self.starts)
        for index in np.flatnonzero(np.diff(cuts)):
            rows = slice(cuts[index], cuts[index + 1])
            local = positions[rows] - self.starts[index]
            features[rows] = self.shards[index].features(local)
            labels[rows] = self.shards[index].labels_n[local]
        return torch.from_numpy(features), torch.from_numpy(labels)
