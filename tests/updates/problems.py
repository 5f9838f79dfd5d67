"""Ascent problems on random features."""

import numpy as np
import pyarrow as pa
import torch

from imu_ray.config import AscentConfig, InfluenceConfig, IntensityConfig, StopConfig
from imu_ray.scopes.features import FeatureShard
from imu_ray.scopes.head import Head
from imu_ray.updates.batches import FeatureStore
from imu_ray.updates.iterative import AscentProblem
from imu_ray.updates.rescoring import Rescoring

CLASSES, WIDTH = 4, 6


def store(rows=90, seed=0, dtype=np.float64, shard_rows=32, block_rows=8):
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, rows)
    features = (random.normal(size=(rows, WIDTH)) + 2 * np.eye(CLASSES, WIDTH)[labels]).astype(dtype)
    shards = []
    for start in range(0, rows, shard_rows):
        part = slice(start, min(start + shard_rows, rows))
        count = part.stop - part.start
        sizes = [min(block_rows, count - at) for at in range(0, count, block_rows)]
        shards.append(FeatureShard(features[part], labels[part], pa.array([str(i) for i in range(part.start, part.stop)]), tuple(sizes)))
    return FeatureStore(shards)


def head(seed=1, bias=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64) * 0.3
    weight[:, :CLASSES] += torch.eye(CLASSES)
    columns = [weight] + ([torch.zeros(CLASSES, 1, dtype=torch.float64)] if bias else [])
    return Head("fc", torch.cat(columns, dim=1), bias)


def problem(
    *, targets=(), seed=0, dtype=np.float64, rows=90, bias=True, preconditioner=None, stop=None, refresh="once", influence=None, **settings
):
    forget = store(rows, dtype=dtype)
    weights = np.random.default_rng(2).random(rows)
    weights[::5] = 0
    stop = StopConfig(**{"every_steps": 2, "max_epochs": 3, **(stop or {})})
    config = AscentConfig(**{"batch_size": 20, "microbatch_rows": 6, "stop": stop, **settings})
    rescoring = None if refresh == "once" else Rescoring(InfluenceConfig(**{"refresh": refresh, **(influence or {})}), IntensityConfig())
    evaluation = {"test": store(40, seed=5, dtype=dtype)}
    return AscentProblem(head(bias=bias), weights, config, seed, targets, preconditioner, forget, evaluation, rescoring)
