"""U-LiRA: a likelihood-ratio attack on each forgotten sample, by margins of many models."""

from typing import Any

import numpy as np
import scipy

from imu_ray.audits.margins import Margins, Matrix
from imu_ray.audits.population import (
    Column,
    attack_figures,
    constant_points,
    few_others,
    interval,
    lacking,
    population_warning,
)
from imu_ray.errors import ForgetSetError

FOLDS = 4
EXCHANGES = 200  # of models between the sides, behind a band
BAND_POINTS = 1000  # at most, behind a band; fewer points make it wider
NARROWEST = 1e-9  # spread of a fitted Gaussian


def ulira(margins: Margins) -> dict[str, Any]:
    r"""Unlearning likelihood-ratio attack: can a model that unlearned a sample be told from one that never saw it?

    .. math:: \Lambda(\phi) = \ln N(\phi;\, \mu_{in}, \sigma_{in}^2) - \ln N(\phi;\, \mu_{out}, \sigma_{out}^2)

    For each forgotten sample two Gaussians are fitted to the margins :math:`\phi` of three quarters of the models, and
    :math:`\Lambda` is taken of the last quarter, so that every model is held out once. *in* are unlearned models.
    *out* has two readings: models that were never trained on it and are ``untouched`` (retrained), or that were never
    trained on it and ``unlearned_alike`` (the control). ``do_nothing`` are originals beside untouched ones.

    Of each reading: ``auc``, ``band`` (95 % of areas when models are exchanged between the sides at random),
    ``tpr_at_1_fpr``, and ``accuracy``, of guessing *in* where :math:`\Lambda > 0`; all in [0, 1]. ``auc`` and
    ``tpr_at_1_fpr`` are of each *in* model's samples beside those of the *out* models that are held out with it: their
    mean over the models and its 95 % interval. A population that has forgotten lies within the band, at 0.01 and at
    0.5.

    A method that gives every model the same margins would pass the second reading whatever is left in its features.
    Points at which unlearned models (nearly) agree are left out and counted as ``constant``; where they are half of
    all or more, nothing is measured.

    Raises:
        ForgetSetError: margins take two values only, as right and wrong would; a Gaussian of those means nothing.

    Source: Hayes et al., Inexact Unlearning Needs More Careful Evaluations, arXiv:2403.01218, after Kurmanji et al.,
    arXiv:2302.09880. Both leave open which models are *out*.
    """
    reason = lacking(margins, ("unlearned", "retrained"))
    if reason:
        return {"skipped": reason}
    forgotten = margins.subset("forget")
    _refuse_correctness(forgotten)
    constant_N = constant_points(forgotten.of["unlearned"], forgotten.of["retrained"])
    told = f"{constant_N.sum()} of {len(constant_N)} forgotten points have constant margins in the unlearned models"
    if 2 * constant_N.sum() >= len(constant_N):
        return {"skipped": f"{told}: constant outputs pass this attack whatever the models remember"}
    of = {kind: each[:, ~constant_N] for kind, each in forgotten.of.items()}
    pairs = {
        "untouched": ("unlearned", "retrained"),
        "unlearned_alike": ("unlearned", "control"),
        "do_nothing": ("original", "retrained"),
    }
    found: dict[str, Any] = {"points": int((~constant_N).sum()), "constant": int(constant_N.sum())}
    for reading, kinds in pairs.items():
        reason = lacking(margins, kinds)
        found[reading] = {"skipped": reason} if reason else likelihood_attack(*(of[kind] for kind in kinds))
    return found | population_warning(margins)


def likelihood_attack(in_MN: Matrix, out_MN: Matrix) -> dict[str, Any]:
    """The figures of ``ulira`` for two kinds of models, at the same number of either (the first of each)."""
    models = min(len(in_MN), len(out_MN))
    ratios = held_out_ratios(in_MN[:models], out_MN[:models])
    parts = [[side[fold::FOLDS] for side in ratios] for fold in range(FOLDS)]
    figures = [attack_figures(model, others.ravel()) for some, others in parts for model in some]
    right = [((some > 0).mean() + (others <= 0).mean()) / 2 for some, others in parts]
    shared = set.intersection(*(set(each) for each in figures))
    return {
        "models": models,
        **{name: interval([each[name] for each in figures]) for name in figures[0] if name in shared},
        "band": [
            float(each) for each in np.quantile(_exchanged_areas(in_MN[:models], out_MN[:models]), [0.025, 0.975])
        ],
        "accuracy": float(np.mean(right)),
        **few_others(min(others.size for _, others in parts)),
    }


def held_out_ratios(in_MN: Matrix, out_MN: Matrix) -> tuple[Matrix, Matrix]:
    r""":math:`\Lambda` of every model at every point, by Gaussians fitted without the quarter of models that it is in.

    Args:
        in_MN: margins of one kind of model.
        out_MN: margins of the other, as many models; rows :math:`f, f + 4, \dots` are held out together.
    """
    sides = in_MN, out_MN
    ratios = np.empty_like(in_MN), np.empty_like(out_MN)
    folds = np.arange(len(in_MN)) % FOLDS
    for fold in range(FOLDS):
        held = folds == fold
        fits = [(side[~held].mean(0), np.maximum(side[~held].std(0, ddof=1), NARROWEST)) for side in sides]
        for side, ratio in zip(sides, ratios, strict=True):
            some, others = (((side[held] - mean) / spread) ** 2 / 2 + np.log(spread) for mean, spread in fits)
            ratio[held] = others - some
    return ratios


def _exchanged_areas(in_MN: Matrix, out_MN: Matrix) -> Column:
    """Areas of the whole attack, fits included, when models are exchanged between the sides at random."""
    points = np.linspace(0, in_MN.shape[1] - 1, min(BAND_POINTS, in_MN.shape[1])).astype(np.int64)
    pooled = np.concatenate([in_MN, out_MN])[:, points]
    random = np.random.default_rng(0)
    areas = np.empty(EXCHANGES)
    for at in range(EXCHANGES):
        order = random.permutation(len(pooled))
        ratios = held_out_ratios(pooled[order[: len(in_MN)]], pooled[order[len(in_MN) :]])
        areas[at] = np.mean([_area(*(side[fold::FOLDS] for side in ratios)) for fold in range(FOLDS)])
    return areas


def _area(some: Matrix, others: Matrix) -> float:
    """Area under the curve, by the sum of ranks."""
    ranks = scipy.stats.rankdata(np.concatenate([some.ravel(), others.ravel()]))
    return float((ranks[: some.size].sum() - some.size * (some.size + 1) / 2) / (some.size * others.size))


def _refuse_correctness(margins: Margins) -> None:
    for kind, each in margins.of.items():
        values = np.unique(each)
        if len(values) == 2 and each.std(0).any():
            raise ForgetSetError(
                f"margins of the {kind} models take the values {values[0]:g} and {values[1]:g} only; expected log-odds "
                "of the true class, not whether a prediction is right"
            )
