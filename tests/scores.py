"""Influence of samples in one process, as a run scores them."""

from types import SimpleNamespace

import numpy as np
import torch

from imu_ray.config import UnlearnConfig
from imu_ray.data import open_source
from imu_ray.influence.curvature.base import merge_tree
from imu_ray.influence.direction import fit_directions
from imu_ray.inputs import open_part
from imu_ray.recipes import settle_scope
from imu_ray.scopes.extraction import extract_features
from imu_ray.tasks.classification import ClassificationTask


def scored(model, samples, **settings):
    """Part, task, settings, and the table of every sample's loss, influence and gradient norm, from uneven blocks."""
    config = UnlearnConfig().with_overrides({key.replace("__", "."): value for key, value in settings.items()})
    source = open_source(samples, config.forget_set)
    task = ClassificationTask.for_model(model, {"forget": source}, config.forget_set)
    config = settle_scope(config, task)
    part = open_part(model, task, source, config)
    shards = [extract_features(source, shard, part, model, torch.device("cpu"))[0] for shard in source.shards(4, 2)]
    names = list(part.parameters)

    def reduce(statistics):
        return merge_tree(part.statistics(shard, dict.fromkeys(names, statistics)) for shard in shards).parts

    directions, _ = fit_directions(config.influence, names, reduce, None, lambda level: 1.0)
    tables = [part.scores(shard, directions) for shard in shards]
    columns = {name: np.concatenate([table[name].to_numpy() for table in tables]) for name in tables[0].column_names}
    return SimpleNamespace(part=part, task=task, config=config, shards=shards, **columns)
