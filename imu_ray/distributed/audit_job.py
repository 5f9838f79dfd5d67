"""Measuring a head on Ray tasks, from kept features. Predictions pass through the driver, which counts them and holds none."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from imu_ray.audits.accuracy import Accuracy, Predictions, output_change, predict_shard
from imu_ray.audits.membership import LossDraw, membership_inference
from imu_ray.config import AuditConfig
from imu_ray.distributed.feature_job import FeatureSet
from imu_ray.scopes.head import Head


def accuracy(name: str, features: FeatureSet, head: Head, draw: LossDraw | None = None) -> Accuracy:
    """Accuracy of one sample set, whose losses ``draw`` is given too."""
    counted = Accuracy(len(head.matrix_CD))

    def take(part: Predictions) -> None:
        counted.take(part)
        if draw is not None:
            draw.take(part)

    features.stream(f"audit of {name}", functools.partial(predict_shard, head=head), take)
    return counted


def measure(features: Mapping[str, FeatureSet], head: Head, config: AuditConfig, seed: int) -> dict[str, Any]:
    """Figures of every sample set, and membership inference when there is a set ``test``."""
    members = LossDraw(seed)
    counted = {"forget": accuracy("forget", features["forget"], head, members)}
    others = LossDraw(seed, counted["forget"].labels)
    for name in features:
        if name != "forget":
            counted[name] = accuracy(name, features[name], head, others if name == "test" else None)
    if "test" in features:
        membership = membership_inference(members.losses, others.losses, config, seed)
    else:
        membership = {"skipped": "no evaluation['test'] with unseen samples was given"}
    return {**{name: part.figures() for name, part in counted.items()}, "membership": membership}


def mean_output_change(forget: FeatureSet, before: Head, after: Head) -> float:
    """Mean of ``output_change`` over the forget set; what a choice between runs can go by without retain data."""
    total = 0.0

    def take(changes: npt.NDArray[np.float64]) -> None:
        nonlocal total
        total = float(np.cumsum(np.append(total, changes))[-1])  # one after the other, whatever the shards

    forget.stream("change of outputs", functools.partial(output_change, before=before, after=after), take)
    return total / forget.rows
