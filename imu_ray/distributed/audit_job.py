"""Measuring a part on Ray tasks, from kept features. The driver holds predictions as columns, for the audits only."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from imu_ray.audits import AUDITS
from imu_ray.audits.accuracy import output_change, set_figures
from imu_ray.audits.base import Predictions, predict_shard
from imu_ray.audits.retrieval import embed_shard
from imu_ray.config import AuditConfig
from imu_ray.distributed.feature_job import FeatureSet
from imu_ray.scopes.base import Part


def predict(features: Mapping[str, FeatureSet], part: Part) -> dict[str, Predictions]:
    """Predictions on every sample set; embeddings of those that are for retrieval."""

    def of_set(name: str, made: FeatureSet) -> Predictions:
        function = embed_shard if name in part.task.retrieval_sets else predict_shard
        return Predictions.join(made.map(f"audit of {name}", functools.partial(function, part=part)))

    return {name: of_set(name, made) for name, made in features.items()}


def figures(features: Mapping[str, FeatureSet], part: Part) -> dict[str, Any]:
    """Every metric of every sample set."""
    return {name: set_figures(found) for name, found in predict(features, part).items()}


def measure(features: Mapping[str, FeatureSet], part: Part, config: AuditConfig, seed: int) -> dict[str, Any]:
    """What every audit tells."""
    measured = predict(features, part)
    return {name: found for audit in AUDITS.values() for name, found in audit.run(measured, config, seed).items()}


def mean_output_change(forget: FeatureSet, before: Part, after: Part) -> float:
    """Mean of ``output_change`` over the forget set; what a choice between runs can go by without retain data."""
    changes = forget.map("change of outputs", functools.partial(output_change, before=before, after=after))
    return float(np.concatenate(changes).mean())
