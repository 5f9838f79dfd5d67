"""Which rows make up each global batch.

The plan is a function of the seed, the epoch and the kept rows alone, never of the number of workers. A *position* is a
row's place in the order of the feature shards.
"""

import numpy as np

from imu_ray.config import AscentConfig
from imu_ray.scopes.features import Positions


def epoch_batches(
    kept: Positions, block_starts: Positions, config: AscentConfig, seed: int, epoch: int
) -> list[Positions]:
    """The global batches of an epoch.

    Blocks are permuted by ``(seed, epoch)``; rows are shuffled within windows of ``window_blocks`` blocks, so that
    reads stay near each other. Within a batch, whose sum does not ask for an order, positions ascend, so that the rows
    that one worker takes lie together.

    Args:
        kept: positions with a positive weight, ascending.
        block_starts: first position of each block, ascending.
        config: batch and window sizes.
        seed: seed of the run.
        epoch: index of the epoch.

    Returns:
        Every kept position exactly once; the last batch may be shorter.
    """
    random = np.random.default_rng((seed, epoch))
    pieces = np.split(kept, np.searchsorted(kept, block_starts[1:]))
    order = random.permutation(len(pieces))
    windows = [order[i : i + config.window_blocks] for i in range(0, len(order), config.window_blocks)]
    rows = np.concatenate(
        [random.permutation(np.concatenate([pieces[block] for block in window])) for window in windows]
    )
    return [np.sort(rows[i : i + config.batch_size]) for i in range(0, len(rows), config.batch_size)]
