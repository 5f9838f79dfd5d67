"""The metrics of a sample set, overall and per class, and how far predictions have moved."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imu_ray.audits.base import Predictions
from imu_ray.config import AuditConfig
from imu_ray.influence.gradients import classes, shares
from imu_ray.influence.projection import of_positions
from imu_ray.influence.targets import has_positions
from imu_ray.scopes.base import Part
from imu_ray.scopes.features import FeatureShard


class SetMetrics:
    r"""Mean of every metric over each sample set, overall and per class.

    .. math:: \frac1n \sum_i m_i

    Accuracy lies in [0, 1] and loss in :math:`[0, \infty)` nats. Of the forget set, accuracy falls and loss rises
    towards what unseen samples have; of every other set both stay as they were.
    """

    def run(self, measured: Mapping[str, Predictions], config: AuditConfig, seed: int) -> dict[str, Any]:
        """Figures by name of set, as ``set_figures`` gives them."""
        return {name: set_figures(part) for name, part in measured.items() if part.metrics}


def set_figures(part: Predictions) -> dict[str, Any]:
    """``samples``, the mean of every metric, and ``per_class`` with the same by label; of no one class it is empty."""
    return ClassSums.of(part).figures()


@dataclass(frozen=True)
class ClassSums:
    """Samples of each label, and sums of every metric over them; under label 0 where a sample has no one class."""

    samples_C: npt.NDArray[np.float64]
    metrics: dict[str, npt.NDArray[np.float64]]
    labelled: bool

    @classmethod
    def of(cls, part: Predictions) -> "ClassSums":
        """Sums of a shard."""
        labelled = part.labels.ndim == 1
        labels = part.labels if labelled else np.zeros(len(part.labels), np.int64)
        weights = {"": np.ones(len(labels)), **part.metrics}
        sums = {name: np.bincount(labels, each, part.classes).astype(np.float64) for name, each in weights.items()}
        return cls(sums.pop(""), sums, labelled)

    def merge(self, other: "ClassSums") -> "ClassSums":
        """Sums of both."""
        metrics = {name: column + other.metrics[name] for name, column in self.metrics.items()}
        return ClassSums(self.samples_C + other.samples_C, metrics, self.labelled)

    def figures(self) -> dict[str, Any]:
        """``samples``, the mean of every metric, and ``per_class``."""

        def means(labels: int | slice) -> dict[str, Any]:
            count = self.samples_C[labels].sum()
            return {"samples": int(count), **{name: float(x[labels].sum() / count) for name, x in self.metrics.items()}}

        found = np.flatnonzero(self.samples_C).tolist() if self.labelled else []
        return {**means(slice(None)), "per_class": {str(label): means(label) for label in found}}


def output_change(shard: FeatureShard, before: Part, after: Part) -> npt.NDArray[np.float64]:
    r"""How far each sample's prediction among the classes that are not its own has moved, in nats, ``[n]``.

    .. math:: D_{KL}(q_0 \,\|\, q), \qquad q = \mathrm{softmax}(z) \text{ without the true class}

    The mean over the labelled positions, where a sample has several. Only the forget set is needed: a model that
    forgets a label and nothing else leaves the other classes' proportions alone.
    """
    changes = [np.empty(0)]
    for rows in shard.block_rows():
        if rows.stop == rows.start:
            continue
        (first, labels), (second, _) = before.outputs(shard, rows), after.outputs(shard, rows)
        changes.append(_of_samples(_change, first, second, labels).squeeze(1).cpu().numpy())
    return np.concatenate(changes)


def divergence(shard: FeatureShard, other: FeatureShard, part: Part, reference: Part) -> npt.NDArray[np.float64]:
    r"""How far each sample's prediction is from that of a reference model, ``[n, 3]``.

    :math:`D_{KL}(p_{ref} \,\|\, p)` in nats, 0 where they are alike; whether both predict the same class; and their
    Jensen-Shannon divergence :math:`\tfrac12 D_{KL}(p \,\|\, m) + \tfrac12 D_{KL}(p_{ref} \,\|\, m)` with
    :math:`m = \tfrac12(p + p_{ref})`, in :math:`[0, \ln 2]` nats. Means over the labelled positions, where a sample has
    several; of several labels a sample means over them, each of which holds or does not.

    Args:
        shard: features of the samples.
        other: features of the same samples under the reference model.
        part: what makes outputs of the first.
        reference: what makes outputs of the second.
    """
    found = [np.empty((0, 3))]
    for rows in shard.block_rows():
        if rows.stop == rows.start:
            continue
        (outputs, labels), (wanted, _) = part.outputs(shard, rows), reference.outputs(other, rows)
        if part.task.target(labels).ndim == 3:
            some, others = (torch.stack([torch.zeros_like(each), each], -1) for each in (outputs, wanted))
            each = _apart(some, others, labels)
            found.append(each.mean(1).cpu().numpy())
        else:
            found.append(_of_samples(_apart, outputs, wanted, labels).cpu().numpy())
    return np.concatenate(found)


def _of_samples(of: Callable[[Tensor, Tensor, Tensor], Tensor], some: Tensor, others: Tensor, labels: Tensor) -> Tensor:
    """Figures of predictions ``[..., K]`` as those of samples, ``[B, K]``; of several positions some at a time."""
    if not has_positions(labels):
        return of(some, others, labels)
    return (of_positions(of, some, others, labels) * shares(labels).unsqueeze(-1)).sum(1)


def _apart(outputs: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
    """Divergence, agreement and Jensen-Shannon divergence of each prediction, ``[..., 3]`` float64."""
    log, wanted_log = (torch.log_softmax(each.double(), -1) for each in (outputs, wanted))
    middle = torch.logaddexp(log, wanted_log) - math.log(2)
    divergence, some, others = (
        (one.exp() * (one - other)).sum(-1) for one, other in ((wanted_log, log), (log, middle), (wanted_log, middle))
    )
    agreement = (outputs.argmax(-1) == wanted.argmax(-1)).double()
    return torch.stack([divergence, agreement, (some + others) / 2], -1)


def _change(before: Tensor, after: Tensor, labels: Tensor) -> Tensor:
    """That of each prediction by itself, ``[..., 1]``."""
    others = ~torch.nn.functional.one_hot(classes(labels), before.shape[-1]).bool()
    old, new = (torch.log_softmax(each[others].view(*labels.shape, -1).double(), dim=-1) for each in (before, after))
    return (old.exp() * (old - new)).sum(-1, keepdim=True)
