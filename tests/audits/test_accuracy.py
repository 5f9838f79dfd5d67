import numpy as np
import pytest
import torch
from scipy.special import softmax

from imu_ray.audits.accuracy import Accuracy, Predictions, output_change, predict_shard
from imu_ray.scopes.features import FeatureShard
from imu_ray.scopes.head import Head


def test_figures_are_those_counted_by_hand():
    head = Head("fc", torch.eye(2, dtype=torch.float64), has_bias=False)
    shard = FeatureShard(np.array([[3.0, 0.0], [0.0, 3.0], [3.0, 0.0]]), np.array([0, 1, 1]), ["a", "b", "c"], (2, 1))
    counted = Accuracy(2)
    counted.take(predict_shard(shard, head))
    figures = counted.figures()
    right, wrong = np.log1p(np.exp(-3)), np.log1p(np.exp(3))
    assert figures["samples"] == 3
    assert figures["accuracy"] == 2 / 3
    assert np.isclose(figures["loss"], (2 * right + wrong) / 3)
    assert figures["per_class"]["1"] == {"samples": 2, "accuracy": 0.5, "loss": (right + wrong) / 2}


def test_how_the_samples_are_parted_changes_no_bit():
    random = np.random.default_rng(0)
    labels, losses, correct = random.integers(0, 5, 1000) * 2, random.exponential(size=1000), random.random(1000) < 0.7
    figures = []
    for sizes in ([1000], [1, 499, 0, 500], [7] * 142 + [6]):
        counted = Accuracy(10)
        for rows in np.split(np.arange(1000), np.cumsum(sizes)[:-1]):
            counted.take(Predictions(labels[rows], losses[rows], correct[rows]))
        assert counted.labels.tolist() == [0, 2, 4, 6, 8]
        figures.append(counted.figures())
    assert figures[0] == figures[1] == figures[2]
    assert figures[0]["samples"] == 1000
    assert figures[0]["accuracy"] == correct.mean()
    assert figures[0]["loss"] == pytest.approx(losses.mean(), rel=1e-12)
    own = labels == 4
    assert figures[0]["per_class"]["4"] == {
        "samples": own.sum(), "accuracy": correct[own].mean(), "loss": pytest.approx(losses[own].mean(), rel=1e-12)
    }  # fmt: skip


def test_output_change_is_the_divergence_among_the_other_classes():
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(7, 3)), random.integers(0, 4, 7)
    before, after = (Head("fc", torch.from_numpy(random.normal(size=(4, 3))), False) for _ in range(2))
    changes = output_change(FeatureShard(features, labels, [], (4, 3)), before, after)
    for row in range(7):
        others = [c for c in range(4) if c != labels[row]]
        p, q = (softmax(head.matrix_CD.numpy()[others] @ features[row]) for head in (before, after))
        assert changes[row] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-9)


def test_a_head_that_lowers_the_own_logit_alone_changes_no_other_output():
    features, labels = np.ones((2, 3)), np.array([1, 1])
    matrix = torch.arange(12, dtype=torch.float64).reshape(4, 3)
    lowered = matrix.clone()
    lowered[1] -= 5
    changes = output_change(FeatureShard(features, labels, [], (2,)), Head("fc", matrix, False), Head("fc", lowered, False))
    assert np.abs(changes).max() <= 1e-12
