"""Intensities that follow the parameters: influence scored again from the cached features while the update runs."""

from dataclasses import dataclass

from imu_ray.config import InfluenceConfig, IntensityConfig
from imu_ray.influence.intensity import SCHEMES
from imu_ray.scopes.base import Parameters, Scope, Weights
from imu_ray.scopes.features import Positions


@dataclass(frozen=True)
class Rescoring:
    """How intensities are made again, ``influence.refresh`` times an epoch or a step."""

    influence: InfluenceConfig
    intensity: IntensityConfig

    @property
    def every_step(self) -> bool:
        """Within each batch, rather than over the forget set at the start of each epoch."""
        return self.influence.refresh == "step"

    def weights(
        self,
        scope: Scope,
        parameters: Parameters,
        curvature_set: str | None,
        batch: Positions | None,
        pieces: int,
        seed: int,
    ) -> Weights:
        """Intensities of the forget set, or of one batch of it in pieces of so many rows, under ``parameters``."""
        influence, losses = scope.influence(parameters, self.influence, curvature_set, batch, pieces)
        return SCHEMES[self.intensity.scheme](influence, losses, self.intensity, seed)
