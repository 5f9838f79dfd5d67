"""Membership attacks on one model, by a figure of each sample."""

from typing import Any

import numpy as np

from imu_ray.influence.intensity import Column

RATES = (0.0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SVC_ROWS = 2000  # of a side; the time grows with more than their square


def threshold_attack(members: Column, others: Column, permutations: int, seed: int) -> dict[str, Any]:
    r"""Best-threshold attack on a figure of each sample, cross-fitted.

    .. math:: \frac12 \bigl(P(\text{guess} \mid \text{member}) + P(\text{no guess} \mid \text{other})\bigr)

    Threshold and side are the best of one half of the samples and are scored on the other, then the other way round;
    the mean of both. In [0, 1]; a model that has forgotten lies within ``band``, which holds 95 % of the figures under
    permuted membership, 0.5 in its midst.

    Args:
        members: the figure of the forgotten samples; it must be finite.
        others: the same of unseen ones.
        permutations: of membership, behind the band.
        seed: of the halves and permutations.

    Source: Song and Mittal, Systematic Evaluation of Privacy Risks of Machine Learning Models, USENIX Security 2021;
    here with one threshold for all classes, and held-out samples.
    """
    random = np.random.default_rng(seed)
    sides = [each[random.permutation(len(each))] for each in (members, others)]
    halves = [np.concatenate([side[half::2] for side in sides]) for half in range(2)]
    truths = [np.arange(len(each)) < len(sides[0][half::2]) for half, each in enumerate(halves)]
    ranks = [np.unique(each, return_inverse=True) for each in halves]

    def score(truths: list[Any]) -> float:
        figures = []
        for fit, held in ((0, 1), (1, 0)):
            values, places = ranks[fit]
            # Equal figures are not told apart: the count of either side at each value.
            counts = [np.bincount(places[side], minlength=len(values)) for side in (truths[fit], ~truths[fit])]
            advantage = np.cumsum(counts[0]) / counts[0].sum() - np.cumsum(counts[1]) / counts[1].sum()
            best = int(np.argmax(np.abs(advantage)))
            cut = values[best : best + 2].mean()  # halfway to the next figure
            guess = (halves[held] <= cut) == (advantage[best] >= 0)
            figures.append((guess[truths[held]].mean() + (~guess[~truths[held]]).mean()) / 2)
        return float(np.mean(figures))

    permuted = [score([random.permutation(each) for each in truths]) for _ in range(permutations)]
    return {
        "balanced_accuracy": score(truths),
        "band": [float(value) for value in np.quantile(permuted, [0.025, 0.975])],
    }


def roc_points(members: Column, others: Column) -> dict[str, Any]:
    """``auc`` of the loss and ``roc``: the share of members found (``tpr``) at fixed shares of false alarms (``fpr``).

    A member is a sample with a loss below a threshold. In [0, 1]; a model that has forgotten has 0.5, and as many
    members found as false alarms. Between thresholds of ``sklearn.metrics.roc_curve`` lines are straight.

    Args:
        members: losses of the forgotten samples.
        others: losses of unseen ones.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    truth, scores = np.repeat([1, 0], [len(members), len(others)]), -np.concatenate([members, others])
    false_rates, true_rates, _ = roc_curve(truth, scores)
    found = np.interp(RATES, false_rates, true_rates)
    return {"auc": float(roc_auc_score(truth, scores)), "roc": {"fpr": list(RATES), "tpr": found.tolist()}}


def svc_efficacy(forget: Column, retain: Column, test: Column, seed: int) -> dict[str, Any]:
    """The classic SVC efficacy: the share of the forget set that an attack calls unseen.

    A support-vector classifier (RBF kernel, C = 3) learns to tell the confidence of retained rows, which were trained
    on, from that of unseen ones, and is put to the forget set. ``non_members`` is in [0, 1]. Forgotten looks like the
    figure of a retrained model, which is not 1: on well-fitted rows the attack calls most of all samples members. It
    is a population test on one number; a model whose outputs are shifted moves it at will. It reads retained rows.

    Args:
        forget: confidence of the true class of each forgotten sample.
        retain: of retained ones.
        test: of unseen ones; of both, as many are drawn as the smaller has, ``SVC_ROWS`` at most.
        seed: of the draw.

    Source: Jia et al., Model Sparsity Can Simplify Machine Unlearning, arXiv:2304.04934 (MIA-Efficacy).
    """
    from sklearn.svm import SVC

    random = np.random.default_rng(seed)
    rows = min(len(retain), len(test), SVC_ROWS)
    drawn = [each[np.sort(random.permutation(len(each))[:rows])] for each in (retain, test)]
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(np.concatenate(drawn)[:, None], np.repeat([1, 0], rows))
    return {
        "non_members": float((attack.predict(forget[:, None]) == 0).mean()),
        "trained_on": {"retain": rows, "test": rows},
        "reads": ["forget", "retain", "test"],
    }
