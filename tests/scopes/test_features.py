"""Scores of the whole pure path against the oracle."""

import numpy as np
import oracle
import pyarrow as pa
import pytest
import torch
from architectures import named
from pure import pure_features, pure_scores
from samples import Pairs, tensors
from torch import nn

from imu_ray.config import ForgetSetConfig, InfluenceConfig
from imu_ray.distributed.score_job import score_batches
from imu_ray.errors import NonFiniteError
from imu_ray.scopes.features import FeatureShard
from imu_ray.scopes.head import Head, score_shard
from imu_ray.tasks.classification import ClassificationTask


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["fc", "classifier.6", "heads.head", "head"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_scores_equal_the_autograd_oracle(name, bias, dtype, tolerance):
    model = named(name, bias=bias).to(dtype)
    inputs, labels = tensors(41, dtype=dtype)
    expected = oracle.influence(model, name, inputs, labels)
    scores = pure_scores(model, Pairs(inputs, labels))
    # Normwise: near zero the elementwise relative error of a float32 score means nothing.
    assert np.abs(scores - expected).max() <= tolerance * np.abs(expected).max()


def test_the_head_is_scored_beside_its_batch_as_the_oracle_scores_each_batch():
    model = named("fc").double()
    inputs, labels = tensors(20, dtype=torch.float64)
    expected = [
        oracle.influence(model, "fc", inputs[rows], labels[rows]) for rows in (slice(8), slice(8, 16), slice(16, 20))
    ]
    made, head = pure_features(model, Pairs(inputs, labels))
    tables = [score_batches(shard, head, InfluenceConfig())[0] for shard in made]
    found = np.concatenate([table["influence"].to_numpy() for table in tables])
    assert np.abs(found - np.concatenate(expected)).max() <= 1e-10 * np.abs(found).max()


def test_identity_curvature_is_a_plain_gradient_product():
    model = named("fc").double()
    inputs, labels = tensors(20, dtype=torch.float64)
    gradients = oracle.per_sample_gradients(model, "fc", inputs, labels)
    expected = -(gradients @ gradients.mean(0)).numpy()
    found = pure_scores(model, Pairs(inputs, labels), "identity")
    assert np.abs(found - expected).max() <= 1e-10 * np.abs(expected).max()


def test_a_model_that_gives_nan_is_refused_by_sample_id():
    model = named("fc")
    inputs, labels = tensors(9)
    with torch.no_grad():
        model.fc.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="ids 0, 1, 2"):
        pure_scores(model, Pairs(inputs, labels))


@pytest.mark.parametrize("scale", [1e100, 1e200])
def test_features_whose_squares_could_overflow_are_refused_by_sample_id(scale):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5)).double()
    inputs, labels = tensors(9, dtype=torch.float64)
    inputs[[2, 5]] *= scale
    with pytest.raises(NonFiniteError, match=r"2 samples of a block \(ids 2, 5\)"):
        pure_scores(model, Pairs(inputs, labels))


def test_scores_that_overflow_are_refused_by_sample_id():
    features, labels = np.ones((7, 3)), np.zeros(7, np.int64)
    features[[1, 4]] = 1e30
    shard = FeatureShard(features, labels, pa.array([f"s{row}" for row in range(7)]), (3, 4))
    task = ClassificationTask(ForgetSetConfig(), "fc", 2)
    head = Head("fc", torch.eye(2, 3, dtype=torch.float64) * 1e-30, False, task)
    with pytest.raises(NonFiniteError, match=r"of 2 samples is NaN or infinite \(ids s1, s4\)"):
        score_shard(shard, head, torch.full((2, 3), 1e290, dtype=torch.float64) * torch.tensor([[1.0], [-1.0]]))


def test_the_model_is_left_in_the_mode_it_was_in_and_batch_norm_unmoved():
    model = named("fc").train()
    model.body[5].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pure_scores(model, Pairs(*tensors(9)))
    assert model.training
    assert not model.body[5].training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
