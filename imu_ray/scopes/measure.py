"""What a check of an update measures from cached features: every metric of the task, and how well members can be told apart.

Everything is a sum over blocks, so that each worker measures its share and one reduction brings all together.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from imu_ray.scopes.base import Record
from imu_ray.scopes.features import FeatureStore
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.base import Task

# Losses are binned by their logarithm, because the confidences of a fitted model all lie next to 1.
BINS, LOWEST, HIGHEST = 2048, -12.0, 4.0
MEMBERSHIP = "membership.auc"


def measure(
    sets: Mapping[str, FeatureStore], outputs_of: Callable[[Tensor], Tensor], task: Task, workers: Workers
) -> Record:
    """``<set>.<metric>`` for every metric of the task, and ``membership.auc`` when there are sets ``forget`` and ``test``.

    Args:
        sets: features by name of set.
        outputs_of: the target layer's outputs for the features of a block.
        task: whose metrics are measured.
        workers: who measures which blocks.
    """
    names = list(task.metrics)
    wanted = torch.from_numpy(sets["forget"].classes()) if {"test", "forget"} <= sets.keys() else None
    sums = torch.zeros(len(sets), len(names) + BINS, dtype=torch.float64, device=workers.device)
    for total, store in zip(sums, sets.values(), strict=True):
        for shard, rows in workers.take(store.blocks()):
            features, labels = (part.to(workers.device) for part in shard.read(rows))
            found = task.sample_metrics(outputs_of(features), labels)
            for place, name in enumerate(names):
                total[place] += found[name].sum()
            if wanted is not None:
                total[len(names) :] += _histogram(found["loss"][_of_classes(labels, wanted.to(workers.device))])
    workers.sum(sums)
    record: Record = {}
    for (set_name, store), totals in zip(sets.items(), sums[:, : len(names)].tolist(), strict=True):
        record |= {f"{set_name}.{name}": total / len(store) for name, total in zip(names, totals, strict=True)}
    if wanted is not None:
        by_name = dict(zip(sets, sums[:, len(names) :], strict=True))
        record[MEMBERSHIP] = membership_auc(by_name["forget"], by_name["test"])
    return record


def _of_classes(labels: Tensor, classes: Tensor) -> Tensor:
    """Which samples have a label among these classes; all, where a sample has a label at each position."""
    return (
        torch.isin(labels, classes)
        if labels.ndim == 1
        else torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    )


def _histogram(losses: Tensor) -> Tensor:
    place = (losses.clamp_min(10**LOWEST).log10() - LOWEST) / (HIGHEST - LOWEST) * BINS
    bins = place.nan_to_num(nan=BINS - 1).clamp(0, BINS - 1).long()  # a NaN loss ends the run by the guard, not here
    return torch.bincount(bins, minlength=BINS).double()


def membership_auc(forget: Tensor, unseen: Tensor) -> float:
    """Probability that a forget sample has a smaller loss than an unseen one, ties counted half, from two histograms."""
    above = unseen.sum() - unseen.cumsum(0)
    pairs = forget.sum() * unseen.sum()
    # No unseen sample of these classes: nothing to be told apart from, and no target is met by NaN.
    return float((forget * (above + unseen / 2)).sum() / pairs) if pairs else math.nan
