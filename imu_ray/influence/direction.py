"""The direction that samples are scored against, from settings to figures; the same in one process and on Ray."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from imu_ray.config import InfluenceConfig
from imu_ray.influence.curvature import CURVATURES
from imu_ray.influence.curvature.base import Damping, Moments, damped_direction, describe_direction
from imu_ray.influence.gradients import LayerIO

# Maps statistics over blocks, for every layer, and merges them: by name of the layer.
ReduceLayers = Callable[[Callable[[LayerIO], Any]], Mapping[str, Any]]


def fit_directions(
    settings: InfluenceConfig,
    layers: Sequence[str],
    reduce: ReduceLayers,
    reduce_curvature: ReduceLayers | None,
    norm_quantile: Callable[[float], float],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The damped mean gradient of the forget set, by layer.

    Args:
        settings: ``influence.*``.
        layers: names of the layers.
        reduce: maps statistics over the forget set's blocks and merges them.
        reduce_curvature: the same over the rows that the curvature is fitted on; None: the forget set.
        norm_quantile: gives a quantile of the gradient norms of the forget set; called when gradients are clipped.

    Returns:
        The direction ``[C, D]`` of each layer; and ``describe_direction`` with what the curvature tells and
        ``clipped_at``, of several layers each under its name in ``layers``, and what can be said of all.
    """
    clip = norm_quantile(settings.clip_quantile) if settings.robust == "clip" else None
    moments = reduce(functools.partial(Moments.of, clip=clip))
    damping = Damping(settings.damping, settings.damping_mode == "relative")
    # One round of tasks serves all layers.
    fitted_on = functools.cache(reduce_curvature or reduce) if len(layers) > 1 else reduce_curvature or reduce
    directions, figures, products = {}, {}, []
    for name in layers:

        def fit_on(statistics: Callable[[LayerIO], Any], name: str = name) -> Any:
            own = reduce_curvature is None and statistics == Moments.of
            return moments[name] if own else fitted_on(statistics)[name]

        fitted = CURVATURES[settings.curvature].fit(fit_on, damping)
        direction, gradient = damped_direction(fitted, moments[name]), moments[name].mean_gradient_CD
        directions[name] = direction
        figures[name] = {**describe_direction(direction, moments[name], fitted.figures["damping"]), **fitted.figures}
        products.append([float((a * b).sum()) for a, b in ((direction, gradient), (direction,) * 2, (gradient,) * 2)])
    if len(layers) == 1:
        return directions, {**figures[layers[0]], "clipped_at": clip}
    product, *norms = map(sum, zip(*products, strict=True))
    share = product**2 / (norms[0] * norms[1]) if norms[0] * norms[1] else 1.0
    entries = {name: direction.numel() for name, direction in directions.items()}
    below = sum(figures[name]["fisher_below_damping"] * count for name, count in entries.items()) / sum(
        entries.values()
    )
    whole = {"fisher_below_damping": below, "plain_gradient_share": share, "clipped_at": clip}
    return directions, {"layers": figures, **whole}
