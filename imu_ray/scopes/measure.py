"""What a check measures from cached features: every metric of the task, and how well members can be told apart.

Everything is a sum over blocks, so that each worker or task measures its share and one reduction brings all together.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from imu_ray.scopes.base import Record
from imu_ray.scopes.features import FeatureShard, FeatureStore, Positions
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.base import Task

# Losses are binned by their logarithm, because the confidences of a fitted model all lie next to 1.
BINS, LOWEST, HIGHEST = 2048, -12.0, 4.0
MEMBERSHIP = "membership.auc"


# Outputs and labels of some rows of a shard, under the parameters that are measured.
OutputsOf = Callable[[FeatureShard, slice], tuple[Tensor, Tensor]]


def measure(sets: Mapping[str, FeatureStore], outputs_of: OutputsOf, task: Task, workers: Workers) -> Record:
    """``<set>.<metric>`` for every metric of the task, and ``membership.auc`` where there is a set ``test``.

    Args:
        sets: features by name of set.
        outputs_of: what the parameters make of them.
        task: whose metrics are measured.
        workers: who measures which blocks.
    """
    classes = sets["forget"].classes() if {"test", "forget"} <= sets.keys() else None
    sums = torch.stack(
        [sum_blocks(workers.take(store.blocks()), outputs_of, task, classes, workers.device) for store in sets.values()]
    )
    workers.sum(sums)
    return record_of(dict(zip(sets, sums, strict=True)), {name: len(store) for name, store in sets.items()}, task)


def sum_blocks(
    blocks: Iterable[tuple[FeatureShard, slice]],
    outputs_of: OutputsOf,
    task: Task,
    classes: Positions | None,
    device: torch.device,
) -> Tensor:
    """Sums of every metric over some blocks, then the histogram of losses of samples of ``classes`` (None: of none)."""
    names = list(task.metrics)
    total = torch.zeros(len(names) + BINS, dtype=torch.float64, device=device)
    wanted = None if classes is None else torch.from_numpy(classes.copy()).to(device)
    for shard, rows in blocks:
        outputs, labels = outputs_of(shard, rows)
        found = task.sample_metrics(outputs, labels)
        for place, name in enumerate(names):
            total[place] += found[name].sum()
        if wanted is not None:
            total[len(names) :] += _histogram(found["loss"][_of_classes(labels, wanted)])
    return total


def record_of(sums: Mapping[str, Tensor], rows: Mapping[str, int], task: Task) -> Record:
    """The record that ``measure`` gives, from the sums over all blocks of each set."""
    names = list(task.metrics)
    record: Record = {}
    for set_name, totals in sums.items():
        values = zip(names, totals[: len(names)].tolist(), strict=True)
        record |= {f"{set_name}.{name}": total / rows[set_name] for name, total in values}
    if {"test", "forget"} <= sums.keys():
        record[MEMBERSHIP] = membership_auc(*(sums[name][len(names) :] for name in ("forget", "test")))
    return record


def _of_classes(labels: Tensor, classes: Tensor) -> Tensor:
    """Which samples have a label among these classes; all, where a sample has no one class."""
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
    """Probability that a forget sample has less loss than an unseen one, ties counted half, from two histograms."""
    above = unseen.sum() - unseen.cumsum(0)
    pairs = forget.sum() * unseen.sum()
    # No unseen sample of these classes: nothing to be told apart from, and no target is met by NaN.
    return float((forget * (above + unseen / 2)).sum() / pairs) if pairs else math.nan
