"""Scores to intensities: which samples the ascent works on, and how hard."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from imu_ray.config import IntensityConfig
from imu_ray.errors import EmptySelectionError

Scores = npt.NDArray[np.float64]
Losses = Callable[[], Scores]  # most schemes do without, and a large forget set's need not be read then


def imu_intensities(scores: Scores, losses: Losses, config: IntensityConfig, seed: int) -> Scores:
    r"""The paper's weights, 0 where a sample is not kept.

    .. math:: w_i = \min\bigl(\sqrt{|I_i|},\; Q_{0.93}\{\sqrt{|I_j|} : j \in K\}\bigr), \qquad
              K = \text{top fraction by } |I| \text{ of } \{i : I_i < 0\}

    Ties in ``|I|`` go to the earlier sample. Source: arXiv:2508.01620, eq. for the dynamic intensity.

    Args:
        scores: influence ``[N]``.
        losses: gives the cross-entropy ``[N]``; not used by this scheme.
        config: ``keep_fraction`` and ``clip_quantile``.
        seed: not used by this scheme.

    Returns:
        Weights ``[N]``, float64, non-negative.

    Raises:
        EmptySelectionError: no sample has a negative score.
    """
    selected = np.flatnonzero(scores < 0)
    if not len(selected):
        raise EmptySelectionError(
            f"none of {len(scores)} samples has a negative influence, so the scheme 'imu' keeps none; expected at least one; "
            "use intensity.scheme=uniform to ascend on all samples alike"
        )
    kept = selected
    if config.keep_fraction < 1:
        order = np.argsort(scores[selected], kind="stable")
        kept = selected[order[: max(1, round(config.keep_fraction * len(selected)))]]
    strength = scores[kept]
    np.sqrt(np.negative(strength, out=strength), out=strength)  # in place: there may be 10^7
    weights = np.zeros_like(scores)
    weights[kept] = np.minimum(strength, np.quantile(strength, config.clip_quantile))
    return weights


def uniform_intensities(scores: Scores, losses: Losses, config: IntensityConfig, seed: int) -> Scores:
    """Control: every sample of the forget set with weight 1."""
    return np.ones_like(scores)


def permuted_intensities(scores: Scores, losses: Losses, config: IntensityConfig, seed: int) -> Scores:
    """Control: the ``imu`` weights, zeros included, dealt to the samples at random: the same weights, no information."""
    return np.asarray(np.random.default_rng(seed).permutation(imu_intensities(scores, losses, config, seed)), dtype=np.float64)


def loss_intensities(scores: Scores, losses: Losses, config: IntensityConfig, seed: int) -> Scores:
    """Every sample with its loss as weight: what the model fits worst is pushed hardest."""
    return losses()


SCHEMES: dict[str, Callable[[Scores, Losses, IntensityConfig, int], Scores]] = {
    "imu": imu_intensities,
    "loss": loss_intensities,
    "uniform": uniform_intensities,
    "permuted": permuted_intensities,
}
