"""The never-trained control: what the same push costs when it is of rows that the model never learnt.

Shapes: N rows to forget, M unseen rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imu_ray.audits.base import Predictions
from imu_ray.scopes.base import FORGET_VIEWS
from imu_ray.scopes.features import Positions
from imu_ray.tasks.base import Metric
from imu_ray.updates.base import UpdateOutcome
from imu_ray.updates.stopping import StopTarget

LEAST = 10  # rows; of fewer, what a push costs is chance
SHARE = 0.9  # of the rows to forget, that must be drawn: the price of a row depends on how many are pushed
AUTOMATIC = "forget.bounded_loss"
PRICES = {"accuracy": -1.0, "loss": 1.0}  # which way a figure moves when it gets worse


def draw_control(forget: Positions, unseen: Positions, seed: int) -> npt.NDArray[np.bool_] | str:
    """Which unseen rows stand for rows to forget that were never learnt, ``[M]``; or why there are none.

    Of each label as many as are to be forgotten, but no more than half of those that there are, so that the cost is
    measured on others. Sequences are of one label.

    Args:
        forget: labels of the rows to forget ``[N]``, or ``[N, T]`` of sequences.
        unseen: the same of the unseen rows, ``[M]`` or ``[M, T]``.
        seed: seed of the run.
    """
    wanted, there = (each if each.ndim == 1 else np.zeros(len(each), np.int64) for each in (forget, unseen))
    if len(wanted) < LEAST:
        return f"{len(wanted)} rows are forgotten; of fewer than {LEAST} the cost is chance"
    order = np.random.default_rng([seed, len(unseen)]).permutation(len(there))
    marks = np.zeros(len(there), bool)
    for label, count in zip(*np.unique(wanted, return_counts=True), strict=True):
        of_label = order[there[order] == label]
        marks[of_label[: min(int(count), len(of_label) // 2)]] = True
    if marks.sum() < SHARE * len(wanted):
        return (
            f"the set test has {int(marks.sum())} rows to spare of the labels of the {len(wanted)} rows to forget, at "
            f"most half of each label; fewer than {SHARE:.0%} of them"
        )
    return marks


@dataclass(frozen=True)
class Moved:
    """By which metric the forget set moved, from where, to where, and where it was to come; ``tolerance`` past that."""

    metric: str
    before: float
    after: float
    aim: float


def moved(outcome: UpdateOutcome, targets: list[StopTarget]) -> Moved | str:
    """How far the forget set moved; or why there is nothing to compare.

    The metric is that of the target that was met, or the bounded loss where that is not of the rows alone.
    """
    if outcome.status not in ("reached", "epochs_done"):
        return f"the run ended {outcome.status}, so that there is no cost to compare"
    met = {target.metric: target.threshold for target in targets if target.reached(outcome.record)}
    metric = next((name for name in met if name.rpartition(".")[0] in ("forget", FORGET_VIEWS)), AUTOMATIC)
    before, after = outcome.trajectory[0][metric], outcome.record[metric]
    return Moved(metric, before, after, met.get(metric, after))


def as_far(known: Moved, control: float, kind: Metric, rows: int, tolerance: float) -> StopTarget | str:
    """The target that moves the control by as much as the forget set was to move; or why there is none.

    Where that is beyond what the metric can come to, the target is that of the forget set.

    Args:
        known: how far the forget set moved.
        control: the metric of the control under the original model.
        kind: of the metric.
        rows: of the control.
        tolerance: ``ascent.stop.tolerance``.
    """
    metric, before, aim = known.metric, known.before, known.aim
    if (aim - before) * (1 if kind.rises else -1) <= 0:
        return f"{metric} of the forget set went from {before:.4g} to {aim:.4g}, which is no forgetting"
    threshold, reason = control + aim - before, f"as far as the forget set was moved, from {before:.4g} to {aim:.4g}"
    most = kind.chance if metric.endswith(".bounded_loss") and kind.chance is not None else np.inf
    least = 0.0 if metric.endswith((".accuracy", ".probability")) else -np.inf
    if not least <= threshold <= most - tolerance:
        threshold, reason = aim, f"where the forget set was moved to, from {before:.4g}"
    target = StopTarget(metric, threshold, reason, max(tolerance, 1 / rows) if kind.counted else tolerance, kind.rises)
    if target.reached({metric: control}):
        return f"{metric} of rows never trained on is {control:.4g} already, {reason}"
    return target


def paid(
    before: Mapping[str, Predictions], after: Mapping[str, Predictions], rows: int, gone: Positions | None = None
) -> dict[str, Any]:
    r"""What unlearning costs on other rows for each forgotten row, by set and figure.

    .. math:: \frac{1}{|\text{forget}|} \cdot \frac{1}{|S|} \sum_{i \in S} \pm (m_i(\text{after}) - m_i(\text{before}))

    of the accuracy, as a loss of it, and of the loss, nats, as a rise; unbounded, 0 costs nothing. It is
    ``utility_paid`` of one model. ``standard_error`` is over the rows of the set, as if they were drawn at random.

    Args:
        before: predictions of the original model on the sets to keep.
        after: of the unlearned one, on the same rows.
        rows: that were forgotten.
        gone: labels that were to be forgotten as a whole; rows of theirs are no cost.
    """
    found: dict[str, Any] = {}
    for name, part in before.items():
        kept = np.full(len(part.labels), True) if gone is None else ~np.isin(part.labels, gone)
        if not kept.any():
            continue
        found[name] = {"samples": int(kept.sum())}
        for metric, sign in PRICES.items():
            if metric in part.metrics:
                changes = sign * (after[name].metrics[metric] - part.metrics[metric])[kept] / rows
                error = float(changes.std(ddof=1) / np.sqrt(len(changes))) if len(changes) > 1 else None
                found[name][metric] = {"mean": float(changes.mean()), "standard_error": error}
    return found
