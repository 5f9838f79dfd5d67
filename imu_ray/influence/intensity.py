"""Scores to intensities: which samples the ascent works on, and how hard.

A scheme takes influence and loss a part at a time and gives the weights in the same parts, so that nobody need hold a column.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from imu_ray.config import IntensityConfig
from imu_ray.errors import EmptySelectionError
from imu_ray.influence.order_statistics import Column, OrderStatistics, Parts, between, neighbours


def imu_intensities(influence: Parts, losses: Parts, config: IntensityConfig, seed: int) -> Parts:
    r"""The paper's weights, 0 where a sample is not kept.

    .. math:: w_i = \min\bigl(\sqrt{|I_i|},\; Q_{0.93}\{\sqrt{|I_j|} : j \in K\}\bigr), \qquad
              K = \text{top fraction by } |I| \text{ of } \{i : I_i < 0\}

    Ties in ``|I|`` go to the earlier sample. Fraction and quantile take two passes over the influence, the weights one.
    Source: arXiv:2508.01620, eq. for the dynamic intensity.

    Args:
        influence: of each sample, ``[N]`` in parts.
        losses: cross-entropy, ``[N]`` in parts; not used by this scheme.
        config: ``keep_fraction`` and ``clip_quantile``.
        seed: not used by this scheme.

    Returns:
        Weights ``[N]`` in the same parts, float64, non-negative.

    Raises:
        EmptySelectionError: no sample has a negative score.
    """

    def magnitudes() -> Iterator[Column]:
        return (-part[part < 0] for part in influence())

    ordered = OrderStatistics(magnitudes)
    if not ordered.count:
        raise EmptySelectionError(
            f"none of {sum(map(len, influence()))} samples has a negative influence, so the scheme 'imu' keeps none; expected at least one; "
            "use intensity.scheme=uniform to ascend on all samples alike"
        )
    kept = max(1, round(config.keep_fraction * ordered.count))
    left_out = ordered.count - kept
    low, high, share = neighbours(config.clip_quantile, kept)
    (least, not_above), (lower, _), (upper, _) = ordered.at(left_out, left_out + low, left_out + high)
    clip = between(math.sqrt(lower), math.sqrt(upper), share)

    def weights() -> Iterator[Column]:
        ties = not_above - left_out
        for part in influence():
            chosen = part < -least
            tied = np.flatnonzero(part == -least)[:ties]
            ties -= len(tied)
            chosen[tied] = True
            weights_of_part = np.zeros_like(part)
            weights_of_part[chosen] = np.minimum(np.sqrt(-part[chosen]), clip)
            yield weights_of_part

    return weights


def uniform_intensities(influence: Parts, losses: Parts, config: IntensityConfig, seed: int) -> Parts:
    """Control: every sample of the forget set with weight 1."""
    return lambda: map(np.ones_like, influence())


def permuted_intensities(influence: Parts, losses: Parts, config: IntensityConfig, seed: int) -> Parts:
    """Control: the ``imu`` weights, zeros included, dealt to the samples at random: the same weights, no information.

    All of them are held, unlike under the other schemes.
    """
    weights = list(imu_intensities(influence, losses, config, seed)())
    dealt = np.random.default_rng(seed).permutation(np.concatenate(weights))
    parts = np.split(dealt, np.cumsum([len(part) for part in weights])[:-1])
    return lambda: parts


def loss_intensities(influence: Parts, losses: Parts, config: IntensityConfig, seed: int) -> Parts:
    """Every sample with its loss as weight: what the model fits worst is pushed hardest."""
    return losses


SCHEMES: dict[str, Callable[[Parts, Parts, IntensityConfig, int], Parts]] = {
    "imu": imu_intensities,
    "loss": loss_intensities,
    "uniform": uniform_intensities,
    "permuted": permuted_intensities,
}
