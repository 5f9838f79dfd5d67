"""The metrics of a sample set, overall and per class, and how far predictions have moved."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imu_ray.audits.base import Predictions
from imu_ray.config import AuditConfig
from imu_ray.scopes.features import FeatureShard
from imu_ray.scopes.head import Head


class SetMetrics:
    r"""Mean of every metric over each sample set, overall and per class.

    .. math:: \frac1n \sum_i m_i

    Accuracy lies in [0, 1] and loss in :math:`[0, \infty)` nats. Of the forget set, accuracy falls and loss rises
    towards what unseen samples have; of every other set both stay as they were.
    """

    def run(self, measured: Mapping[str, Predictions], config: AuditConfig, seed: int) -> dict[str, Any]:
        """Figures by name of set, as ``set_figures`` gives them."""
        return {name: set_figures(part) for name, part in measured.items()}


def set_figures(part: Predictions) -> dict[str, Any]:
    """``samples``, the mean of every metric, and ``per_class`` with the same by label, where samples have one."""
    has_classes = part.labels.ndim == 1
    labels = part.labels if has_classes else np.zeros(len(part.labels), np.int64)
    samples = np.bincount(labels, minlength=part.classes)
    sums = {name: np.bincount(labels, values, part.classes) for name, values in part.metrics.items()}

    def means(classes: int | slice) -> dict[str, Any]:
        count = int(samples[classes].sum())
        return {"samples": count, **{name: float(total[classes].sum() / count) for name, total in sums.items()}}

    return {
        **means(slice(None)),
        "per_class": {str(label): means(label) for label in np.flatnonzero(samples).tolist()} if has_classes else {},
    }


def output_change(shard: FeatureShard, before: Head, after: Head) -> npt.NDArray[np.float64]:
    r"""How far each sample's prediction among the classes that are not its own has moved, in nats, ``[n]``.

    .. math:: D_{KL}(q_0 \,\|\, q), \qquad q = \mathrm{softmax}(z) \text{ without the true class}

    Only the forget set is needed: a head that forgets a label and nothing else leaves the other classes' proportions alone.
    """
    changes = [np.empty(0)]
    for features, labels in shard.blocks():
        others = ~torch.nn.functional.one_hot(labels, before.task.num_classes).bool()
        old, new = (
            torch.log_softmax(head.logits(features)[others].view(*labels.shape, -1), dim=-1) for head in (before, after)
        )
        changes.append((old.exp() * (old - new)).sum(-1).reshape(len(labels), -1).sum(1).numpy())
    return np.concatenate(changes)
