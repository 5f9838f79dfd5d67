"""Membership inference: can the forget set be told from unseen samples by the model's confidence?"""

from typing import Any

import numpy as np
import numpy.typing as npt

from imu_ray.audits.accuracy import Predictions
from imu_ray.config import AuditConfig

LIMIT = 20_000  # rows per side; more would not move a figure that is read to two digits


def membership_inference(forget: Predictions, unseen: Predictions, config: AuditConfig, seed: int) -> dict[str, Any]:
    r"""Balanced accuracy of the best confidence threshold, chosen on one half of the samples and scored on the other.

    The attacker sees the confidence :math:`p_{y}` of the true class and picks the threshold and the side. Unseen samples are
    restricted to the labels that occur in the forget set, so that the class gives nothing away. 0.5 is chance; the band holds
    95 % of the figures under permuted membership.

    Args:
        forget: the forget set under one model.
        unseen: samples that the model never saw, under the same model.
        config: fewest rows, number of permutations.
        seed: of the halves and permutations.

    Returns:
        ``balanced_accuracy``, ``band`` [low, high], ``members``, ``non_members``; or ``skipped`` with the reason.
    """
    random = np.random.default_rng(seed)
    unseen = unseen.of_labels(np.unique(forget.labels))
    members, others = (_sample(part.losses, random) for part in (forget, unseen))
    if min(len(members), len(others)) < config.membership_min_rows:
        return {
            "skipped": f"{len(members)} forget and {len(others)} unseen rows of the same classes; fewer than "
            f"audit.membership_min_rows = {config.membership_min_rows} on one side"
        }
    # Fit and score halves are drawn within each side, so that both halves hold the same share of members.
    order_m, order_o = random.permutation(len(members)), random.permutation(len(others))
    half_m, half_o = len(members) // 2, len(others) // 2
    fit = np.concatenate([members[order_m[:half_m]], others[order_o[:half_o]]])
    held = np.concatenate([members[order_m[half_m:]], others[order_o[half_o:]]])
    fit_truth, held_truth = np.arange(len(fit)) < half_m, np.arange(len(held)) < len(members) - half_m
    permuted = [_attack(fit, random.permutation(fit_truth), held, random.permutation(held_truth)) for _ in range(config.permutations)]
    return {
        "balanced_accuracy": _attack(fit, fit_truth, held, held_truth),
        "band": [float(value) for value in np.quantile(permuted, [0.025, 0.975])],
        "members": len(members),
        "non_members": len(others),
    }


def _sample(losses: npt.NDArray[np.float64], random: np.random.Generator) -> npt.NDArray[np.float64]:
    return random.choice(losses, LIMIT, replace=False) if len(losses) > LIMIT else losses


def _attack(
    fit: npt.NDArray[np.float64],
    fit_truth: npt.NDArray[np.bool_],
    held: npt.NDArray[np.float64],
    held_truth: npt.NDArray[np.bool_],
) -> float:
    """Balanced accuracy on ``held`` of the loss threshold that is best on ``fit``; "member" is the side that fits better."""
    order = np.argsort(fit, kind="stable")
    truth = fit_truth[order]
    advantage = np.cumsum(truth) / truth.sum() - np.cumsum(~truth) / (~truth).sum()
    # Equal losses are not told apart, so only the last of a run of them can be a threshold.
    advantage[:-1][np.diff(fit[order]) == 0] = 0.0
    best = int(np.argmax(np.abs(advantage)))
    below = held <= fit[order[best]]
    guess = below if advantage[best] >= 0 else ~below
    return float((guess[held_truth].mean() + (~guess[~held_truth]).mean()) / 2)
