"""Scores to intensities: which samples the ascent works on, and how hard."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from imu_ray.config import IntensityConfig
from imu_ray.errors import EmptySelectionError

Column = npt.NDArray[np.float64]


def imu_intensities(influence: Column, losses: Column, config: IntensityConfig, seed: int) -> Column:
    r"""The paper's weights, 0 where a sample is not kept.

    .. math:: w_i = \min\bigl(\sqrt{|I_i|},\; Q_{0.93}\{\sqrt{|I_j|} : j \in K\}\bigr), \qquad
              K = \text{top fraction by } |I| \text{ of } \{i : I_i < 0\}

    Ties in ``|I|`` go to the earlier sample. Source: arXiv:2508.01620, eq. for the dynamic intensity.

    Args:
        influence: of each sample, ``[N]``.
        losses: cross-entropy, ``[N]``; not used by this scheme.
        config: ``keep_fraction`` and ``clip_quantile``.
        seed: not used by this scheme.

    Returns:
        Weights ``[N]``, float64, non-negative.

    Raises:
        EmptySelectionError: no sample has a negative score.
    """
    negative = np.flatnonzero(influence < 0)
    if not len(negative):
        raise EmptySelectionError(
            f"none of {len(influence)} samples has a negative influence, so the scheme 'imu' keeps none; expected at "
            "least one; use intensity.scheme=uniform to ascend on all samples alike"
        )
    count = max(1, round(config.keep_fraction * len(negative)))
    kept = negative[np.argsort(influence[negative], kind="stable")[:count]]
    strength = np.sqrt(-influence[kept])
    weights = np.zeros_like(influence)
    weights[kept] = np.minimum(strength, np.quantile(strength, config.clip_quantile))
    return weights


def uniform_intensities(influence: Column, losses: Column, config: IntensityConfig, seed: int) -> Column:
    """Control: every sample of the forget set with weight 1."""
    return np.ones_like(influence)


def permuted_intensities(influence: Column, losses: Column, config: IntensityConfig, seed: int) -> Column:
    """Control: the ``imu`` weights, zeros included, dealt at random: the same weights, no information."""
    return np.random.default_rng(seed).permutation(imu_intensities(influence, losses, config, seed))


def loss_intensities(influence: Column, losses: Column, config: IntensityConfig, seed: int) -> Column:
    """Every sample with its loss as weight: what the model fits worst is pushed hardest."""
    return losses


SCHEMES: dict[str, Callable[[Column, Column, IntensityConfig, int], Column]] = {
    "imu": imu_intensities,
    "loss": loss_intensities,
    "uniform": uniform_intensities,
    "permuted": permuted_intensities,
}
