"""The direction that samples are scored against, from the settings to the figures; the same in one process and on Ray."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from imu_ray.config import InfluenceConfig
from imu_ray.influence.curvature import CURVATURES
from imu_ray.influence.curvature.base import Damping, Moments, Reduce, damped_direction, describe_direction
from imu_ray.influence.gradients import LayerIO


def fit_direction(
    settings: InfluenceConfig,
    reduce: Reduce[Any],
    reduce_curvature: Reduce[Any] | None,
    norm_quantile: Callable[[float], float],
) -> tuple[Tensor, dict[str, Any]]:
    """The damped mean gradient of the forget set.

    Args:
        settings: ``influence.*``.
        reduce: maps statistics over the forget set's blocks and merges them.
        reduce_curvature: the same over the rows that the curvature is fitted on; None: the forget set.
        norm_quantile: gives a quantile of the gradient norms of the forget set; called when gradients are clipped.

    Returns:
        The direction ``[C, D]``; and ``describe_direction`` with what the curvature tells and ``clipped_at``.
    """
    clip = norm_quantile(settings.clip_quantile) if settings.robust == "clip" else None
    moments = reduce(partial(Moments.of, clip=clip))

    def fit_on(statistics: Callable[[LayerIO], Any]) -> Any:
        if reduce_curvature is not None:
            return reduce_curvature(statistics)
        return moments if statistics == Moments.of else reduce(statistics)

    fitted = CURVATURES[settings.curvature].fit(fit_on, Damping(settings.damping, settings.damping_mode == "relative"))
    direction = damped_direction(fitted, moments)
    return direction, {
        **describe_direction(direction, moments, fitted.figures["damping"]),
        **fitted.figures,
        "clipped_at": clip,
    }
