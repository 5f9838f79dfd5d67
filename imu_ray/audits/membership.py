"""Membership inference: can the forget set be told from unseen samples by the model's confidence?"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from imu_ray.audits.attacks import roc_points, svc_efficacy, threshold_attack
from imu_ray.audits.base import NO_CLASS, Predictions
from imu_ray.audits.guard import MIN_ROWS, prediction_warning
from imu_ray.config import AuditConfig
from imu_ray.influence.intensity import Column

Truth = npt.NDArray[np.bool_]
SIGNALS = ("confidence", "entropy", "modified_entropy")  # of a class
LIMIT = 20_000  # per side; more would not move a figure that is read to two digits


class Membership:
    r"""Balanced accuracy of an attacker who tells the forget set from unseen samples by their loss.

    .. math:: \frac12 \bigl(P(\text{guess} \mid \text{forget}) + P(\text{no guess} \mid \text{unseen})\bigr)

    The attacker sees the confidence :math:`p_y` of the true class, and picks the threshold and the side on one half of
    the samples; the other half is scored. In [0, 1]; 0.5 is chance, and a model that has forgotten lies within
    ``band``, which holds 95 % of the figures under permuted membership. Unseen are the samples of the set ``test`` with
    labels that occur in the forget set, so that the class gives nothing away; of sequences, and of soft or several
    labels, which have no one class, all. The loss has the class weights in it.

    Of a classifier there are more: ``auc`` and ``roc`` of the loss (``roc_points``), ``attacks`` by other signals, each
    cross-fitted (``threshold_attack``), and ``svc_efficacy``. A broken model has a ``warning``. Of soft and several
    labels the signals of a class are ``unmeasured``, with the reason.
    """

    def run(self, measured: Mapping[str, Predictions], config: AuditConfig, seed: int) -> dict[str, Any]:
        """``membership``: ``balanced_accuracy``, ``band``, ``members``, ``non_members``; or why it was ``skipped``.

        Of a classifier with ``auc``, ``roc``, ``attacks`` and ``svc_efficacy`` too.
        """
        if "test" not in measured:
            return {"membership": {"skipped": "no evaluation['test'] with unseen samples was given"}}
        forget, test = measured["forget"], measured["test"]
        same = np.isin(test.labels, forget.labels) if test.labels.ndim == 1 else np.ones(len(test.labels), bool)
        members, others = (_draw(losses, seed) for losses in (forget.metrics["loss"], test.metrics["loss"][same]))
        found = membership_inference(members, others, config, seed)
        more = _attacks(measured, same, config, seed) | _warning(forget, test)
        return {"membership": found | more if more else found}


def _draw(losses: Column, seed: int) -> Column:
    """At most ``LIMIT`` of the losses, drawn evenly and without replacement, in order."""
    if len(losses) <= LIMIT:
        return losses
    keys = np.random.default_rng(seed).random(len(losses))
    drawn: Column = losses[np.sort(np.argpartition(keys, LIMIT)[:LIMIT])]
    return drawn


def _attacks(measured: Mapping[str, Predictions], same: Truth, config: AuditConfig, seed: int) -> dict[str, Any]:
    """What further attacks tell of a classifier; nothing of other models, or where there are too few rows."""
    forget, test = measured["forget"], measured["test"]
    if not (forget.signals or forget.of_no_class) or min(len(forget.labels), same.sum()) < config.membership_min_rows:
        return {}
    sides = {
        name: (_draw(forget.signals[name], seed), _draw(test.signals[name][same], seed))
        for name in SIGNALS
        if name in forget.signals
    }
    losses = _draw(forget.metrics["loss"], seed), _draw(test.metrics["loss"][same], seed)
    attacks = {
        name: threshold_attack(*pair, config.permutations, seed) for name, pair in (sides | {"loss": losses}).items()
    }
    found = {**roc_points(*losses), "attacks": attacks}
    if forget.of_no_class:
        return {**found, "svc_efficacy": {"skipped": NO_CLASS}, "unmeasured": dict.fromkeys(SIGNALS, NO_CLASS)}
    return {**found, "svc_efficacy": _svc_efficacy(measured, config, seed)}


def _svc_efficacy(measured: Mapping[str, Predictions], config: AuditConfig, seed: int) -> dict[str, Any]:
    if "retain" not in measured:
        return {"skipped": "no evaluation['retain'] was given; this attack is trained on retained rows and reads them"}
    forget, retain, test = (measured[name].signals["confidence"] for name in ("forget", "retain", "test"))
    fewest = min(len(retain), len(test))
    if fewest < config.membership_min_rows:
        return {"skipped": f"{fewest} rows of retain or test; fewer than {config.membership_min_rows}"}
    return svc_efficacy(forget, retain, test, seed)


def _warning(forget: Predictions, test: Predictions) -> dict[str, str]:
    """Whether the model is broken, by unseen samples of labels that are not forgotten, or by all if those are few."""
    if not test.signals:
        return {}
    others = ~np.isin(test.labels, forget.labels)
    kept = others if others.sum() >= MIN_ROWS else np.ones(len(test.labels), bool)
    return prediction_warning(test.labels[kept], test.signals["predicted"][kept], test.classes)


def membership_inference(members: Column, others: Column, config: AuditConfig, seed: int) -> dict[str, Any]:
    """The figures of ``Membership``, from the losses (nats) of either side under one model."""
    random = np.random.default_rng(seed)
    if min(len(members), len(others)) < config.membership_min_rows:
        return {
            "skipped": f"{len(members)} forget and {len(others)} unseen rows (of the same classes, if rows have any); "
            f"fewer than audit.membership_min_rows = {config.membership_min_rows} on one side"
        }
    # Fit and score halves are drawn within each side, so that both halves hold the same share of members.
    order_m, order_o = random.permutation(len(members)), random.permutation(len(others))
    half_m, half_o = len(members) // 2, len(others) // 2
    fit = np.concatenate([members[order_m[:half_m]], others[order_o[:half_o]]])
    held = np.concatenate([members[order_m[half_m:]], others[order_o[half_o:]]])
    fit_truth, held_truth = np.arange(len(fit)) < half_m, np.arange(len(held)) < len(members) - half_m
    shuffle = random.permutation
    permuted = [_attack(fit, shuffle(fit_truth), held, shuffle(held_truth)) for _ in range(config.permutations)]
    return {
        "balanced_accuracy": _attack(fit, fit_truth, held, held_truth),
        "band": [float(value) for value in np.quantile(permuted, [0.025, 0.975])],
        "members": len(members),
        "non_members": len(others),
    }


def _attack(fit: Column, fit_truth: Truth, held: Column, held_truth: Truth) -> float:
    """Balanced accuracy on ``held`` of the threshold that is best on ``fit``; "member" is the side that fits better."""
    order = np.argsort(fit, kind="stable")
    truth = fit_truth[order]
    advantage = np.cumsum(truth) / truth.sum() - np.cumsum(~truth) / (~truth).sum()
    # Equal losses are not told apart, so only the last of a run of them can be a threshold.
    advantage[:-1][np.diff(fit[order]) == 0] = 0.0
    best = int(np.argmax(np.abs(advantage)))
    below = held <= fit[order[best]]
    guess = below if advantage[best] >= 0 else ~below
    return float((guess[held_truth].mean() + (~guess[~held_truth]).mean()) / 2)
