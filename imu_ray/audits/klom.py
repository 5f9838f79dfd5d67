"""KLOM: how far the margins of unlearned models are from those of retrained ones, point by point."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from imu_ray.audits.margins import Margins, Matrix
from imu_ray.audits.population import Column, lacking, population_warning

CLIP = 100.0
BINS = 20
EPS = 1e-5
QUANTILE = 0.95
DRAWS = 40  # of the models that stand beside one another at the floor


def klom(margins: Margins) -> dict[str, Any]:
    r"""KL divergence of margins: unlearned models beside retrained ones (oracles), the 95th percentile of each set.

    .. math:: \mathrm{KLOM}(x) = D_{KL}\bigl(\hat p_{unlearned}(x) \,\|\, \hat p_{oracle}(x)\bigr)

    of histograms over models (``margin_divergence``), in nats: at most :math:`\ln 10^5 = 11.5`, 0 where margins are
    alike. Two finite samples of one distribution differ too, the more the fewer they are. So the ``floor`` puts
    unlearned models, originals (``do_nothing``) and one half of the oracles (``oracle``) beside the other half, all at
    the same number of models. Which models those are is drawn 40 times: the figure is the mean over the draws, from
    ``low`` to ``high`` lie 95 % of them. A population that has forgotten stands at ``oracle``, on every set;
    ``do_nothing`` is where it came from. ``all`` has the first two beside all oracles, for comparison with published
    figures.

    Returns:
        ``direction``; ``floor`` and ``all``, each with ``models`` and by set the figure of each side; or ``skipped``.

    Source: Georgiev et al., Attribute-to-Delete, arXiv:2410.23232, appendix E.1. Published implementations leave the
    largest margin of a point out of the bins; here it is in the last one.
    """
    reason = lacking(margins, ("original", "unlearned", "retrained"))
    if reason:
        return {"skipped": reason}
    oracles, sides = (
        margins.of["retrained"],
        {"unlearned": margins.of["unlearned"], "do_nothing": margins.of["original"]},
    )
    fewest = min(len(each) for each in sides.values())
    few, many = min(fewest, len(oracles) // 2), min(fewest, len(oracles))
    return {
        "direction": "KL(unlearned || oracle)",
        "quantile": QUANTILE,
        "floor": {"models": few, "draws": DRAWS, "sets": _over_draws(margins, sides, oracles, few)},
        "all": {"models": many, "sets": _by_set(margins, sides, oracles, many)},
        **population_warning(margins),
    }


def margin_divergence(margins_MN: Matrix, oracles_MN: Matrix) -> Column:
    r"""KL divergence of the margins of models from those of oracles at each point, ``[N]`` nats.

    .. math:: \sum_{b=1}^{20} p_b \ln\frac{p_b}{\max(q_b, 10^{-5})}

    :math:`p_b` is the share of the models, :math:`q_b` of the oracles, whose margin, clipped to :math:`\pm 100`, lies
    in the b-th of 20 equal bins on the range of both at this point; the last bin holds its upper end. In
    :math:`[-\ln(1 + 19 \cdot 10^{-5}),\, \ln 10^5]`; 0 where both are the same numbers.

    Args:
        margins_MN: margins of the models, one row each.
        oracles_MN: margins of the oracles at the same points; their number may differ.
    """
    found, oracle = np.clip(margins_MN, -CLIP, CLIP), np.clip(oracles_MN, -CLIP, CLIP)
    low_N = np.minimum(found.min(0), oracle.min(0))
    width_N = np.maximum(found.max(0), oracle.max(0)) - low_N
    width_N[width_N == 0] = 1.0

    def shares(values_MN: Matrix) -> Matrix:
        bins_MN = np.minimum(((values_MN - low_N) / width_N * BINS).astype(np.int64), BINS - 1)
        return np.stack([(bins_MN == each).mean(0) for each in range(BINS)])

    p_BN, q_BN = shares(found), np.maximum(shares(oracle), EPS)
    divergence_N: Column = (p_BN * np.log(np.where(p_BN > 0, p_BN, 1.0) / q_BN)).sum(0, where=p_BN > 0)
    return divergence_N


def _over_draws(
    margins: Margins, sides: Mapping[str, Matrix], oracles: Matrix, models: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and middle 95 % of ``_by_set`` over draws of so many models of each side and of the oracles beside them."""
    random, draws = np.random.default_rng(0), []
    for _ in range(DRAWS):
        drawn = {side: each[random.permutation(len(each))] for side, each in {"oracle": oracles, **sides}.items()}
        beside, drawn["oracle"] = drawn["oracle"][models:], drawn["oracle"][:models]
        draws.append(_by_set(margins, drawn, beside, models))

    def summary(name: str, side: str) -> dict[str, float]:
        values = [draw[name][side] for draw in draws]
        low, high = np.quantile(values, [0.025, 0.975])
        return {"mean": float(np.mean(values)), "low": float(low), "high": float(high)}

    return {name: {side: summary(name, side) for side in each} for name, each in draws[0].items()}


def _by_set(margins: Margins, sides: Mapping[str, Matrix], oracles: Matrix, models: int) -> dict[str, dict[str, float]]:
    """95th percentile over the points of each set of each side, at so many models."""
    found = {side: margin_divergence(each[:models], oracles[:models]) for side, each in sides.items()}
    return {
        name: {side: float(np.quantile(each[margins.sets == name], QUANTILE)) for side, each in found.items()}
        for name in margins.names
    }
