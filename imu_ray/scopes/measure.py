"""What a check of the ascent measures, from cached features: loss, accuracy and how well members can be told apart.

Everything is a sum over blocks, so that each worker measures its share and one reduction brings all together.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from imu_ray.influence.scores import sample_losses
from imu_ray.scopes.head import Head
from imu_ray.updates.batches import FeatureStore
from imu_ray.updates.workers import Workers

Record = dict[str, float]
# Losses are binned by their logarithm, because the confidences of a fitted model all lie next to 1.
BINS, LOWEST, HIGHEST = 2048, -12.0, 4.0


def measure(sets: Mapping[str, FeatureStore], head: Head, matrix_CD: Tensor, workers: Workers) -> Record:
    """``<set>_loss`` (nats), ``<set>_accuracy`` and, when there are sets ``forget`` and ``test``, ``membership_auc``.

    Args:
        sets: features by name of set.
        head: the original head, for its bias input.
        matrix_CD: the present head.
        workers: who measures which blocks.
    """
    wanted = torch.from_numpy(sets["forget"].classes()) if "test" in sets and "forget" in sets else None
    sums = torch.zeros(len(sets), 2 + BINS, dtype=torch.float64, device=workers.device)
    for total, store in zip(sums, sets.values(), strict=True):
        for shard, rows in workers.mine(store.blocks()):
            features, labels = (part.to(workers.device) for part in shard.read(rows))
            logits = head.logits(features, matrix_CD)
            losses = sample_losses(logits, labels)
            total[0] += losses.sum()
            total[1] += (logits.argmax(1) == labels).sum()
            if wanted is not None:
                total[2:] += _histogram(losses[torch.isin(labels, wanted.to(workers.device))])
    workers.sum(sums)
    record: Record = {}
    for (name, store), (loss, hits) in zip(sets.items(), sums[:, :2].tolist(), strict=True):
        record |= {f"{name}_loss": loss / len(store), f"{name}_accuracy": hits / len(store)}
    if wanted is not None:
        by_name = dict(zip(sets, sums[:, 2:], strict=True))
        record["membership_auc"] = membership_auc(by_name["forget"], by_name["test"])
    return record


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
