"""Intensities that follow the head: influence scored again from the cached features while the ascent goes on.

One worker scores for all: the sums then do not depend on the number of workers, and no two can disagree on which samples are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from imu_ray.config import InfluenceConfig, IntensityConfig
from imu_ray.influence.curvature.base import Reduce, merge_tree
from imu_ray.influence.direction import fit_direction
from imu_ray.influence.intensity import SCHEMES
from imu_ray.influence.order_statistics import Column
from imu_ray.scopes.features import FeatureShard, norms_of, score_shard, shard_statistics
from imu_ray.scopes.head import Head
from imu_ray.updates.batches import FeatureStore


@dataclass(frozen=True)
class Rescoring:
    """How intensities are made again, ``influence.refresh`` times an epoch or a step."""

    influence: InfluenceConfig
    intensity: IntensityConfig

    @property
    def every_step(self) -> bool:
        """Within each batch, rather than over the forget set at the start of each epoch."""
        return self.influence.refresh == "step"

    def weights(self, shards: Sequence[FeatureShard], head: Head, curvature: FeatureStore | None, seed: int) -> Column:
        """Intensities ``[N]`` of the samples of ``shards`` under ``head``.

        Args:
            shards: what is scored: the forget set, or one batch of it.
            head: the present head.
            curvature: features that the curvature is fitted on; None: those that are scored.
            seed: seed of the run.
        """

        def norm_quantile(level: float) -> float:
            return float(np.quantile(np.concatenate([norms_of(shard, head) for shard in shards]), level))

        direction, _ = fit_direction(
            self.influence, _reduce(shards, head), None if curvature is None else _reduce(curvature.shards, head), norm_quantile
        )
        table = pa.concat_tables([score_shard(shard, head, direction) for shard in shards])
        influence, losses = table["influence"].to_numpy(), table["loss"].to_numpy()
        (weights,) = SCHEMES[self.intensity.scheme](lambda: [influence], lambda: [losses], self.intensity, seed)()
        return weights


def _reduce(shards: Sequence[FeatureShard], head: Head) -> Reduce[Any]:
    return lambda statistics: merge_tree(map(partial(shard_statistics, head=head, statistics=statistics), shards))
