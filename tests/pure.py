"""The scoring pipeline in this process, without Ray."""

import numpy as np
import torch

from imu_ray.config import ForgetSetConfig
from imu_ray.data import open_source
from imu_ray.influence.curvature import CURVATURES
from imu_ray.influence.curvature.base import Damping, Moments, damped_direction, merge_tree
from imu_ray.influence.gradients import LayerIO, output_gradient
from imu_ray.scopes.extraction import extract_features
from imu_ray.scopes.head import Head, score_shard, shard_statistics
from imu_ray.tasks.classification import ClassificationTask

CPU = torch.device("cpu")


def pure_features(model, dataset, block_rows=8, device=CPU):
    """Feature shards of a dataset, and the model's head."""
    source = open_source(dataset, ForgetSetConfig())
    task = ClassificationTask.for_model(model, {"forget": source}, ForgetSetConfig())
    shards = source.shards(block_rows, 1)
    head = Head.of(model, task)
    return [extract_features(source, shard, head, model.to(device), device)[0] for shard in shards], head


def pure_scores(model, dataset, curvature="diagonal_fisher", block_rows=8, device=CPU):
    """Influence of every sample, ``[N]``."""
    shards, head = pure_features(model, dataset, block_rows, device)
    reduce = lambda statistics: merge_tree([shard_statistics(shard, head, statistics) for shard in shards])
    direction = damped_direction(CURVATURES[curvature].fit(reduce, Damping(0.01)), reduce(Moments.of))
    return np.concatenate([score_shard(shard, head, direction)["influence"].to_numpy() for shard in shards])


def classifier_io(inputs_BD, logits_BC, labels_B):
    """What a classifier head saw: one position per sample."""
    return LayerIO(inputs_BD.unsqueeze(1), output_gradient(logits_BC, labels_B).unsqueeze(1))
