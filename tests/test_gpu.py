"""The same numbers on a CUDA device as on the CPU, within a stated tolerance; run by `make test-gpu`."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from architectures import named
from language import TOKENS, llama
from pure import pure_features, pure_scores
from samples import pairs

from imu_ray.config import AscentConfig, ForgetSetConfig, StopConfig, UnlearnConfig
from imu_ray.influence.curvature import PRECONDITIONERS
from imu_ray.influence.curvature.base import Moments, merge_tree
from imu_ray.influence.curvature.kronecker import FactorSums
from imu_ray.scopes.features import FeatureShard, FeatureStore
from imu_ray.scopes.head import HeadScope, shard_statistics
from imu_ray.scopes.layers import Layers
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.sequence import SequenceTask
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


@pytest.mark.parametrize("output", ["", "lm_head"])
def test_layers_on_the_gpu_have_the_scores_and_sums_of_the_cpu(output):
    task = SequenceTask(ForgetSetConfig(), TOKENS.shape[1], 13)
    part = Layers.of_names(llama(), task, ["model.layers.1.mlp.up_proj"], TOKENS, UnlearnConfig())
    tokens, ids = TOKENS.numpy(), pa.array([str(row) for row in range(len(TOKENS))])
    shard = FeatureShard(tokens.astype(np.float64), np.roll(tokens, -1, 1), ids, (len(TOKENS),))

    def found(device):
        here = replace(part, device=device, output=output)
        scores = here.scores(shard, part.parameters)
        sums = [
            here.statistics(shard, dict.fromkeys(part.parameters, kind)).cpu() for kind in (Moments.of, FactorSums.of)
        ]
        tensors = [tensor for each in sums for own in each.parts.values() for tensor in vars(own).values()]
        return [scores[name].to_numpy() for name in ("loss", "influence", "gradient_norm")] + tensors

    for cpu, gpu in zip(found("cpu"), found("cuda"), strict=True):
        # Hugging Face's RMSNorm works in float32.
        np.testing.assert_allclose(
            np.asarray(gpu), np.asarray(cpu), rtol=1e-4, atol=1e-6 * np.abs(np.asarray(cpu)).max()
        )


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
