"""The score of the NeurIPS 2023 unlearning competition, with how coarse it is at the number of models at hand."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from imu_ray.audits.margins import Margins, Matrix
from imu_ray.audits.population import CONSTANT, Column, lacking, population_warning

DELTA = 1e-5
WIDTH = 0.5  # of a bin of epsilon
BUFFER = 2.0  # by which two thresholds may miss a range, in the unit of margins
Places = npt.NDArray[np.int64]


def forgetting_quality(margins: Margins) -> dict[str, Any]:
    r"""Forgetting quality of the NeurIPS 2023 competition: how badly the best attack tells unlearned from retrained.

    .. math:: F = \frac1n \sum_i \mathcal H_i, \qquad \mathcal H_i = 2 / 2^{n_i}, \qquad
              n_i = 1 + \lfloor \epsilon_i / 0.5 \rfloor

    with :math:`\epsilon_i` of ``largest_epsilon`` at each forgotten sample, and :math:`\mathcal H_i = 0` from
    :math:`\lceil \ln(M - 1) \rceil` on, M the models of a side. In [0, 1]: 1 where no attack tells them apart. The
    attacks are chosen on the models that they are scored on, so that two halves of the retrained models (``oracle``)
    stay far below 1 (0.2 for Gaussian margins): ``floor`` has all sides at that number of models. The competition
    multiplies F by retain and test accuracy over those of retrained models; here they stand apart.

    ``largest_finite_epsilon`` is the cap :math:`\ln(M - 1 - \delta M)`: what is told better than that counts as told
    without fail. ``bins`` is how many values above 0 one sample can have, ``smallest`` the least of them. The
    competition had 512 models; few models cannot show a large epsilon, which is no sign of forgetting.

    Source: Triantafillou et al., Are we making progress in unlearning?, arXiv:2406.09073; its evaluation code.
    """
    reason = lacking(margins, ("unlearned", "retrained"))
    if reason:
        return {"skipped": reason}
    of = margins.subset("forget").of
    retrained = of["retrained"]
    sides = {side: of[kind] for side, kind in (("unlearned", "unlearned"), ("do_nothing", "original")) if kind in of}
    models = min(len(retrained), *(len(each) for each in sides.values()))
    few = min(models, len(retrained) // 2)
    halves = {"oracle": retrained[1::2], **sides}
    reason = None if few >= 4 else f"{len(retrained)} retrained models; halves of fewer than 4 tell nothing"
    floor = {"skipped": reason} if reason else _scores(halves, retrained[::2], few)
    return {**_scores(sides, retrained, models), "floor": floor, **population_warning(margins)}


def largest_epsilon(unlearned_M: Column, retrained_M: Column) -> float:
    r"""Largest :math:`\epsilon` by which an attack tells unlearned from retrained models at one sample.

    .. math:: \epsilon = \max\left(\ln\frac{1 - \delta - FPR}{FNR},\ \ln\frac{1 - \delta - FNR}{FPR}\right),
              \qquad \delta = 10^{-5}

    over two kinds of attack, each in every way that makes a difference on these models. One threshold: the side with
    the larger median is guessed above it. Two thresholds: the side with the smaller range is guessed between them,
    which are as far apart as this range, give or take 2, the upper within 2 of its largest margin. An attack that is
    wrong about nobody gives infinity; one that is wrong about nobody of one side alone is left out, as too few models
    to tell. In :math:`[0, \infty]`; infinite, too, where one range is below a hundredth of the other.
    """
    ranges = [float(np.ptp(each)) for each in (unlearned_M, retrained_M)]
    if min(ranges) < CONSTANT * max(ranges):
        return math.inf
    values = np.unique(np.concatenate([unlearned_M, retrained_M]))
    upper, lower = sorted((unlearned_M, retrained_M), key=np.median, reverse=True)
    above = [1 - _share_below(side, np.arange(len(values)), values) for side in (upper, lower)]
    narrow, wide = sorted((unlearned_M, retrained_M), key=np.ptp)
    start, stop = _intervals(narrow, values)
    between = [_share_below(side, stop, values) - _share_below(side, start, values) for side in (narrow, wide)]
    return max(_epsilon(false, 1 - true) for true, false in (above, between))


def _share_below(side_M: Column, places: Places, values: Column) -> Column:
    """Share of a side below the value at each place."""
    counts = np.concatenate([[0], np.searchsorted(np.sort(side_M), values, side="right")])
    shares: Column = counts[places] / len(side_M)
    return shares


def _intervals(narrow_M: Column, values: Column) -> tuple[Places, Places]:
    """First place inside, and first beyond, of every interval that two thresholds of ``largest_epsilon`` can make."""
    start, stop = np.triu_indices(len(values) + 1, 1)
    bounds = np.concatenate([[-np.inf], values, [np.inf]])  # a threshold lies between a value and its neighbour
    top, width = narrow_M.max(), np.ptp(narrow_M)
    low, high = np.maximum(bounds[stop], top - BUFFER), np.minimum(bounds[stop + 1], top + BUFFER)
    apart = low - bounds[start + 1], high - bounds[start]
    fits = (low <= high) & (apart[0] <= width + BUFFER) & (apart[1] >= width - BUFFER)
    return start[fits], stop[fits]


def _epsilon(false_positives: Column, false_negatives: Column) -> float:
    if ((false_positives == 0) & (false_negatives == 0)).any():
        return math.inf
    usable = (false_positives > 0) & (false_negatives > 0)
    best = 0.0
    for one, other in ((false_positives, false_negatives), (false_negatives, false_positives)):
        odds = np.maximum(1 - DELTA - one[usable], 0) / other[usable]
        best = max(best, math.log(max(1.0, odds.max(initial=1.0))))
    return best


def _scores(sides: dict[str, Matrix], retrained: Matrix, models: int) -> dict[str, Any]:
    """The score of each side at so many models."""
    last = math.ceil(math.log(models - 1))
    bins = int(last / WIDTH)

    def points(epsilon: float) -> float:
        return 0.0 if epsilon >= last else 2.0 / 2 ** (1 + math.floor(epsilon / WIDTH))

    found: dict[str, Any] = {}
    for side, each in sides.items():
        pairs = zip(each[:models].T, retrained[:models].T, strict=True)
        found[side] = float(np.mean([points(largest_epsilon(some, others)) for some, others in pairs]))
    cap = math.log(models - 1 - DELTA * models)
    return {"models": models, "largest_finite_epsilon": cap, "bins": bins, "smallest": 2.0 / 2**bins, **found}
