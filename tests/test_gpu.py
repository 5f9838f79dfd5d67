"""The same numbers on a CUDA device as on the CPU, within a stated tolerance; run by `make test-gpu`."""

import numpy as np
import pytest
import torch
from architectures import named
from pure import pure_features, pure_scores
from samples import pairs

from imu_ray.config import AscentConfig, StopConfig
from imu_ray.influence.curvature import PRECONDITIONERS
from imu_ray.influence.curvature.base import merge_tree
from imu_ray.scopes.features import FeatureStore
from imu_ray.scopes.head import HeadScope, shard_statistics
from imu_ray.scopes.workers import Workers
from imu_ray.updates.base import UpdateProblem
from imu_ray.updates.iterative import run_iterative

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def exact():
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_scores_on_the_gpu_are_those_of_the_cpu(dtype, tolerance):
    score = lambda device: pure_scores(named("fc").to(dtype), pairs(75), block_rows=16, device=torch.device(device))
    expected, found = score("cpu"), score("cuda")
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("preconditioner", [None, "block_ggn"])
def test_the_ascent_on_the_gpu_takes_the_steps_of_the_cpu(preconditioner):
    shards, head = pure_features(named("fc"), pairs(75), block_rows=16)
    fitted = None
    if preconditioner:
        reduce = lambda statistics: merge_tree([shard_statistics(shard, head, statistics) for shard in shards])
        fitted = PRECONDITIONERS[preconditioner].fit(reduce, 0.01)
    config = AscentConfig(update="iterative", batch_size=20, stop=StopConfig(max_epochs=3, every_steps=2))
    problem = UpdateProblem(np.ones(75), config, 0, (), {} if fitted is None else {"fc": fitted})

    def ascended(device):
        scope = HeadScope(head, {"forget": FeatureStore(shards)}, Workers(device=torch.device(device)))
        return run_iterative(scope, problem).parameters["fc"]

    cpu, gpu = ascended("cpu"), ascended("cuda")
    assert (cpu - gpu).norm() <= 1e-9 * (cpu - head.matrix_CD).norm()
