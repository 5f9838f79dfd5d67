"""Membership inference: can the forget set be told from unseen samples by the model's confidence?"""

from typing import Any

import numpy as np
import numpy.typing as npt

from imu_ray.audits.accuracy import Predictions
from imu_ray.config import AuditConfig

LIMIT = 20_000  # per side; more would not move a figure that is read to two digits


class LossDraw:
    """Losses of at most ``LIMIT`` samples, drawn evenly and without replacement from predictions as they come.

    Args:
        seed: of the draw.
        labels: labels of the samples that take part; None: all.

    Attributes:
        losses: what is drawn, in nats, in order.
    """

    def __init__(self, seed: int, labels: npt.NDArray[np.int64] | None = None) -> None:
        self._random, self._labels = np.random.default_rng(seed), labels
        self.losses, self._keys = np.empty(0), np.empty(0)

    def take(self, part: Predictions) -> None:
        """The next samples. Each draws a number, and those with the smallest stay."""
        losses = part.losses if self._labels is None else part.losses[np.isin(part.labels, self._labels)]
        self.losses = np.append(self.losses, losses)
        self._keys = np.append(self._keys, self._random.random(len(losses)))
        if len(self.losses) > LIMIT:
            kept = np.sort(np.argpartition(self._keys, LIMIT)[:LIMIT])
            self.losses, self._keys = self.losses[kept], self._keys[kept]


def membership_inference(
    members: npt.NDArray[np.float64], others: npt.NDArray[np.float64], config: AuditConfig, seed: int
) -> dict[str, Any]:
    r"""Balanced accuracy of the best confidence threshold, chosen on one half of the samples and scored on the other.

    The attacker sees the confidence :math:`p_{y}` of the true class and picks the threshold and the side. 0.5 is chance; the band
    holds 95 % of the figures under permuted membership.

    Args:
        members: losses of the forget set under one model, nats.
        others: losses under the same model of samples that it never saw, with labels that occur in the forget set, so that the class
            gives nothing away.
        config: fewest rows, number of permutations.
        seed: of the halves and permutations.

    Returns:
        ``balanced_accuracy``, ``band`` [low, high], ``members``, ``non_members``; or ``skipped`` with the reason.
    """
    random = np.random.default_rng(seed)
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
