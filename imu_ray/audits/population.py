"""What the audits of a population of models share: when they can be measured, how attacks are scored, intervals.

An audit of a population is a function of ``Margins`` that gives a dict for a JSON record. What could not be measured
stands there as ``skipped`` with its reason, without a number; a population that is broken, with its ``warning``.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy

from imu_ray.audits.margins import Margins, Matrix

Column = npt.NDArray[np.float64]

MIN_MODELS = 8  # of each kind: a quarter is held out at a time, and a spread is fitted on the others
FPR = 0.01
MIN_OTHERS = 100  # 1 % of fewer is less than one
CONSTANT = 0.01  # share of the retrained models' spread below which margins are called constant
BROKEN = 0.5  # share of the retrained models' figure on unseen points below which a population is called broken


def lacking(
    margins: Margins, kinds: Iterable[str], sets: Iterable[str] = ("forget",), least: int = MIN_MODELS
) -> str | None:
    """Why there are too few models of some kind, or no points of some set; None where there are enough."""
    for kind in kinds:
        found = len(margins.seeds.get(kind, ()))
        if found < least:
            return f"{found} models are {kind}; fewer than {least}"
    for name in sets:
        if name not in margins.names:
            return f"there are no points of the set {name!r}"
    return None


def constant_points(margins_MN: Matrix, retrained_MN: Matrix) -> npt.NDArray[np.bool_]:
    """Points ``[N]`` at which the spread over models is at most a hundredth of the retrained models' spread."""
    spread_N: Column = margins_MN.std(0)
    found: npt.NDArray[np.bool_] = spread_N <= CONSTANT * retrained_MN.std(0)
    return found


def population_warning(margins: Margins) -> dict[str, str]:
    r"""``warning``, where unlearned models know far less of unseen points than retrained ones; else nothing.

    Compared is the mean share of points of ``test`` with :math:`p_y > \tfrac12` (a margin above 0): half of the
    retrained models' share or less is called broken. A model that answers at random passes many an attack.
    """
    if "test" not in margins.names or not {"unlearned", "retrained"} <= margins.of.keys():
        return {}
    sure = {kind: float((each > 0).mean()) for kind, each in margins.subset("test").of.items()}
    if sure["unlearned"] > BROKEN * sure["retrained"]:
        return {}
    return {
        "warning": f"the unlearned models are sure of {sure['unlearned']:.1%} of unseen points, retrained ones of "
        f"{sure['retrained']:.1%}: a broken model may pass this audit"
    }


def attack_figures(members: Column, others: Column) -> dict[str, float]:
    r"""``auc`` and ``tpr_at_1_fpr`` of scores that are higher for members.

    The area is :math:`P(s_m > s_o) + \tfrac12 P(s_m = s_o)`, in [0, 1], 0.5 where members cannot be told from others.
    The other figure is the largest share of members above a threshold that at most 1 % of the others are above, in
    [0, 1], 0.01 by chance; of fewer than 100 others it is not measured (``few_others`` says so).
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    truth, scores = np.repeat([1, 0], [len(members), len(others)]), np.concatenate([members, others])
    found = {"auc": float(roc_auc_score(truth, scores))}
    if len(others) >= MIN_OTHERS:
        false_rates, true_rates, _ = roc_curve(truth, scores, drop_intermediate=False)
        found["tpr_at_1_fpr"] = float(true_rates[false_rates <= FPR].max())
    return found


def few_others(count: int) -> dict[str, Any]:
    """``skipped``, where ``tpr_at_1_fpr`` cannot be measured; else nothing."""
    if count >= MIN_OTHERS:
        return {}
    return {"skipped": {"tpr_at_1_fpr": f"{count} figures of non-members; 1 % of fewer than {MIN_OTHERS} is none"}}


def interval(values: Sequence[float] | Column) -> dict[str, float]:
    r"""Mean over models, and its 95 % interval by Student's t: :math:`\bar x \pm t_{.975,\,M-1}\, s / \sqrt M`.

    ``mean``, ``low``, ``high`` and ``models``; of a single model there is no interval.
    """
    column = np.asarray(values, np.float64)
    found = {"mean": float(column.mean()), "models": len(column)}
    if len(column) > 1:
        half = float(scipy.stats.t.ppf(0.975, len(column) - 1) * column.std(ddof=1) / np.sqrt(len(column)))
        found |= {"low": found["mean"] - half, "high": found["mean"] + half}
    return found
