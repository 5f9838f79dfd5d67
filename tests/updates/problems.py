"""Updates of a head on random features."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from imu_ray.config import AscentConfig, ForgetSetConfig, InfluenceConfig, IntensityConfig, StopConfig
from imu_ray.scopes.features import FeatureShard, FeatureStore
from imu_ray.scopes.head import Head, HeadScope
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.classification import ClassificationTask
from imu_ray.updates.base import UpdateProblem
from imu_ray.updates.iterative import run_iterative
from imu_ray.updates.rescoring import Rescoring

CLASSES, WIDTH = 4, 6
PAPER = {"update": "iterative", "objective": "ascent", "preconditioner": "none", "weight_decay": 5e-4, "l1": 5e-4}
TASK = ClassificationTask(ForgetSetConfig(), "fc", CLASSES)


@dataclass(frozen=True)
class Case:
    """A head, its features and what is to be done with it."""

    head: Head
    problem: UpdateProblem
    forget: FeatureStore
    evaluation: Mapping[str, FeatureStore]

    @property
    def weights(self):
        return self.problem.weights

    @property
    def config(self):
        return self.problem.config

    @property
    def start(self):
        return self.head.matrix_CD

    def scope(self, workers=None):
        return HeadScope(self.head, {"forget": self.forget, **self.evaluation}, workers or Workers())

    def but(self, **changes):
        """The same with another problem."""
        return replace(self, problem=replace(self.problem, **changes))


def run(case, workers=None, **options):
    """The outcome of the iterative update."""
    return run_iterative(case.scope(workers), case.problem, **options)


def changed(outcome):
    """The head after an update."""
    return outcome.parameters["fc"]


def store(rows=90, seed=0, dtype=np.float64, shard_rows=32, block_rows=8):
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, rows)
    features = (random.normal(size=(rows, WIDTH)) + 2 * np.eye(CLASSES, WIDTH)[labels]).astype(dtype)
    shards = []
    for start in range(0, rows, shard_rows):
        stop = min(start + shard_rows, rows)
        sizes = tuple(min(block_rows, stop - at) for at in range(start, stop, block_rows))
        shards.append(
            FeatureShard(features[start:stop], labels[start:stop], pa.array(map(str, range(start, stop))), sizes)
        )
    return FeatureStore(shards)


def head(seed=1, bias=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64) * 0.3
    weight[:, :CLASSES] += torch.eye(CLASSES)
    columns = [weight] + ([torch.zeros(CLASSES, 1, dtype=torch.float64)] if bias else [])
    return Head("fc", torch.cat(columns, dim=1), bias, TASK)


def problem(
    *,
    targets=(),
    seed=0,
    dtype=np.float64,
    rows=90,
    bias=True,
    preconditioner=None,
    stop=None,
    refresh="once",
    influence=None,
    **settings,
):
    weights = np.random.default_rng(2).random(rows)
    weights[::5] = 0
    stop = StopConfig(**{"every_steps": 2, "max_epochs": 3, **(stop or {})})
    config = AscentConfig(**{**PAPER, "batch_size": 20, "microbatch_rows": 6, "stop": stop, **settings})
    rescoring = None
    if refresh != "once":
        rescoring = Rescoring(
            InfluenceConfig(**{"refresh": refresh, **(influence or {})}), IntensityConfig(scheme="imu")
        )
    preconditioners = {} if preconditioner is None else {"fc": preconditioner}
    update = UpdateProblem(weights, config, seed, targets, preconditioners, rescoring)
    return Case(head(bias=bias), update, store(rows, dtype=dtype), {"test": store(40, seed=5, dtype=dtype)})
