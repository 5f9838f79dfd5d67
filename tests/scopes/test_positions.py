"""Nothing in a scope takes a sample for one position: a task with outputs ``[B, T, C]`` goes through the same code."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
import torch

from imu_ray.influence.curvature.base import Moments, merge_tree
from imu_ray.scopes.features import FeatureShard, FeatureStore
from imu_ray.scopes.head import Head, HeadScope, norms_of, score_shard, shard_statistics
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.base import Metric
from imu_ray.updates.objectives import OBJECTIVES

N, T, C, F = 12, 3, 4, 5


@dataclass(frozen=True)
class Tagging:
    """A label at each position; the loss of a sample is the mean over its positions."""

    head: str = "tagger"
    num_classes: int = C

    @property
    def metrics(self):
        return {"loss": Metric(rises=True), "token_accuracy": Metric(rises=False, counted=True, chance=1 / C)}

    def target(self, labels):
        return labels

    def sample_metrics(self, outputs, labels):
        losses = torch.nn.functional.cross_entropy(outputs.transpose(1, 2), labels, reduction="none")
        return {"loss": losses.mean(1), "token_accuracy": (outputs.argmax(2) == labels).double().mean(1)}

    def output_gradient(self, outputs, labels):
        return (outputs.softmax(2) - torch.nn.functional.one_hot(labels, C)) / T


@pytest.fixture
def tagged():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, T, F, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, C, (N, T), generator=generator)
    head = Head("tagger", torch.randn(C, F + 1, generator=generator, dtype=torch.float64), True, Tagging())
    shards = []
    for start, stop in [(0, 8), (8, 12)]:
        ids, sizes = pa.array(map(str, range(start, stop))), (4,) * ((stop - start) // 4)
        shards.append(FeatureShard(features[start:stop].numpy(), labels[start:stop].numpy(), ids, sizes))
    return features, labels, head, shards


def per_sample_gradients(features, labels, head):
    """By autograd, one sample at a time."""
    found = []
    for inputs, own in zip(features, labels, strict=True):
        matrix = head.matrix_CD.clone().requires_grad_()
        outputs = inputs @ matrix[:, :-1].T + matrix[:, -1]
        torch.nn.functional.cross_entropy(outputs, own).backward()
        found.append(matrix.grad)
    return torch.stack(found)


def test_moments_scores_and_norms_are_those_of_per_sample_autograd(tagged):
    features, labels, head, shards = tagged
    gradients = per_sample_gradients(features, labels, head)
    moments = merge_tree(shard_statistics(shard, head, Moments.of) for shard in shards)
    torch.testing.assert_close(moments.mean_gradient_CD, gradients.mean(0))
    torch.testing.assert_close(moments.fisher_CD, gradients.square().mean(0))
    direction = torch.randn(C, F + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = np.concatenate([score_shard(shard, head, direction)["influence"].to_numpy() for shard in shards])
    np.testing.assert_allclose(scores, -(gradients * direction).sum((1, 2)).numpy(), rtol=1e-10)
    norms = np.concatenate([norms_of(shard, head) for shard in shards])
    np.testing.assert_allclose(norms, gradients.flatten(1).norm(dim=1).numpy(), rtol=1e-10)


def test_a_batch_gradient_is_the_weighted_mean_over_samples(tagged):
    features, labels, head, shards = tagged
    scope, weights = HeadScope(head, {"forget": FeatureStore(shards)}, Workers()), np.arange(1.0, N + 1)
    batch = np.array([1, 2, 7, 9])
    (found,) = scope.batch_gradient(scope.parameters(), batch, weights, OBJECTIVES["ascent"], 3).values()
    gradients = per_sample_gradients(features, labels, head)[batch] * torch.from_numpy(weights[batch]).view(-1, 1, 1)
    torch.testing.assert_close(found, -gradients.sum(0) / weights[batch].sum())


def test_a_check_measures_the_tasks_own_metrics(tagged):
    features, labels, head, shards = tagged
    scope = HeadScope(head, {"forget": FeatureStore(shards), "test": FeatureStore(shards)}, Workers())
    record = scope.measure(scope.parameters())
    outputs = features @ head.matrix_CD[:, :-1].T + head.matrix_CD[:, -1]
    assert record["forget.token_accuracy"] == pytest.approx(float((outputs.argmax(2) == labels).double().mean()))
    assert record["test.loss"] == record["forget.loss"]
    assert record["membership.auc"] == 0.5
