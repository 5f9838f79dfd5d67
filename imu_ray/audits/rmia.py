"""RMIA: a per-sample attack that needs few reference models."""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from imu_ray.audits.margins import Margins, Matrix
from imu_ray.audits.population import Column, attack_figures, few_others, interval, lacking, population_warning

GAMMA = 1.0
OFFLINE = 0.3  # a: the authors' figure for CIFAR-10; their tool tunes it for each data set
MIN_REFERENCES = 2
# A model is no reference for itself, nor for what was made from it.
ORIGIN = {"original": "original", "unlearned": "original", "retrained": "retrained", "control": "retrained"}
SIDES = {"unlearned": "unlearned", "do_nothing": "original", "retrained": "retrained"}


def rmia(margins: Margins) -> dict[str, Any]:
    r"""Robust membership inference: is a forgotten sample likelier, for one model, than unseen ones are?

    .. math:: s(x) = P_z\left(\frac{p_\theta(x) / p(x)}{p_\theta(z) / p(z)} \ge \gamma\right)

    The probability :math:`p_\theta` is that of the true class, and z runs over every second point of ``test``
    (:math:`\gamma = 1`, as in the authors' tool, Privacy Meter; the runs of their paper have 2). A model is left out of
    its own references. :math:`p(x)` has two forms:

    - ``offline``, from models that never saw the forget set:
      :math:`\tfrac12\bigl((1 + a)\,\bar p_{out}(x) + 1 - a\bigr)` with a = 0.3, the authors'
      setting for CIFAR-10 (Privacy Meter tunes it for each data set);
    - ``online``, from originals too: :math:`\tfrac12(\bar p_{in}(x) + \bar p_{out}(x))`.

    Forgotten samples are told from others by their scores. Offline the others are the other points of ``test``, under
    the same model; they should be of the same classes. Online they are the same samples under retrained models, since
    no original was trained on a test point. ``auc`` and ``tpr_at_1_fpr`` are in [0, 1], means over models with 95 % t
    intervals; 0.5 and 0.01 by chance. A model that has forgotten stands where ``retrained`` does; ``do_nothing`` is
    where it came from.

    Source: Zarifzadeh et al., Low-Cost High-Power Membership Inference Attacks, arXiv:2312.03262.
    """
    reason = lacking(margins, ("unlearned",), ("forget", "test"), 1) or lacking(
        margins, ("retrained",), (), MIN_REFERENCES + 1
    )
    if reason:
        return {"skipped": reason}
    if (margins.sets == "test").sum() < 2:
        return {"skipped": "one point of the set 'test'; expected two or more, for the population and for others"}
    margins = margins.subset("forget", "test")
    forms: dict[str, Any] = {"offline": _form(margins, online=False)}
    reason = lacking(margins, ("original",), (), MIN_REFERENCES + 1)
    forms["online"] = {"skipped": reason} if reason else _form(margins, online=True)
    return {"gamma": GAMMA, "a": OFFLINE, **forms, **population_warning(margins)}


def rmia_scores(margins: Margins, kind: str, online: bool = False) -> Matrix:
    """The score of every point under every model of a kind, ``[M, N]`` in [0, 1]; high for members (``rmia``)."""
    chances = {name: expit(each) for name, each in margins.of.items()}
    whole: dict[str, Column] = {name: chances[name].mean(0) for name in set(ORIGIN.values()) & chances.keys()}
    population_N = population_points(margins)
    scores = []
    for seed, chance_N in zip(margins.seeds[kind], chances[kind], strict=True):
        means = dict(whole)
        origin = ORIGIN[kind]
        if seed in margins.seeds.get(origin, ()):
            means[origin] = chances[origin][[each != seed for each in margins.seeds[origin]]].mean(0)
        out_N = means["retrained"]
        prior_N = (means["original"] + out_N) / 2 if online else ((1 + OFFLINE) * out_N + 1 - OFFLINE) / 2
        scores.append(pairwise_scores(chance_N / prior_N, population_N))
    return np.stack(scores)


def pairwise_scores(ratio_N: Column, population_N: npt.NDArray[np.bool_]) -> Column:
    r"""Share of the population z with :math:`r(x) \ge \gamma\, r(z)`, ``[N]`` in [0, 1].

    Args:
        ratio_N: :math:`r = p_\theta / p` of each point.
        population_N: which points are z.
    """
    ordered = np.sort(ratio_N[population_N])
    scores: Column = np.searchsorted(ordered, ratio_N / GAMMA, side="right") / len(ordered)
    return scores


def population_points(margins: Margins) -> npt.NDArray[np.bool_]:
    """Every second point of ``test``, ``[N]``; a point of the population cannot be told from it, the others can."""
    test_N = margins.sets == "test"
    population: npt.NDArray[np.bool_] = test_N & (np.cumsum(test_N) % 2 == 1)
    return population


def _form(margins: Margins, online: bool) -> dict[str, Any]:
    """References, and the figures of each side."""
    forget_N = margins.sets == "forget"
    others_N = (margins.sets == "test") & ~population_points(margins)
    found: dict[str, Any] = {"references": {"out": len(margins.seeds["retrained"])}}
    if online:
        found["references"]["in"] = len(margins.seeds["original"])
    unseen = rmia_scores(margins, "retrained", online)[:, forget_N]
    for side, kind in SIDES.items():
        if kind not in margins.of:
            found[side] = {"skipped": f"there are no {kind} models"}
            continue
        figures = []
        for row, each in enumerate(rmia_scores(margins, kind, online)):
            beside = np.delete(unseen, row, 0) if kind == "retrained" else unseen
            figures.append(attack_figures(each[forget_N], beside.ravel() if online else each[others_N]))
        found[side] = {name: interval([each[name] for each in figures]) for name in figures[0]}
    fewest = (len(unseen) - 1) * unseen.shape[1] if online else int(others_N.sum())
    return found | few_others(fewest)
