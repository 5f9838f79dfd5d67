"""The same numbers on a CUDA device as on the CPU, within a stated tolerance; run by `make test-gpu`."""

import numpy as np
import pytest
import torch
from architectures import named
from samples import pairs

from imu_ray.config import AscentConfig, ForgetSetConfig, StopConfig
from imu_ray.data import open_source
from imu_ray.influence.curvature import CURVATURES, PRECONDITIONERS
from imu_ray.influence.curvature.base import Damping, Moments, damped_direction, merge_tree
from imu_ray.scopes.extraction import extract_features
from imu_ray.scopes.features import FeatureStore
from imu_ray.scopes.head import Head, HeadScope, score_shard, shard_statistics
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.classification import ClassificationTask
from imu_ray.updates.base import UpdateProblem
from imu_ray.updates.iterative import run_iterative

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def features(dtype, device):
    """Feature shards made on one device. The head's arithmetic is float64 on the CPU in either case."""
    torch.backends.cudnn.allow_tf32 = False
    model = named("fc").to(dtype)
    source = open_source(pairs(75), ForgetSetConfig())
    task = ClassificationTask.for_model(model, source, ForgetSetConfig())
    made = [extract_features(source, s, task, model.to(device), torch.device(device))[0] for s in source.shards(16, 1)]
    return made, Head.of(model, task)


def scores(shards, head):
    moments = merge_tree([shard_statistics(shard, head, Moments.of) for shard in shards])
    direction = damped_direction(CURVATURES["diagonal_fisher"].fit(lambda _: moments, Damping(0.01)), moments)
    return np.concatenate([score_shard(shard, head, direction)["influence"].to_numpy() for shard in shards])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_scores_on_the_gpu_are_those_of_the_cpu(dtype, tolerance):
    expected, found = (scores(*features(dtype, device)) for device in ("cpu", "cuda"))
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("preconditioner", [None, "block_ggn"])
def test_the_ascent_on_the_gpu_takes_the_steps_of_the_cpu(preconditioner):
    shards, head = features(torch.float32, "cpu")
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
