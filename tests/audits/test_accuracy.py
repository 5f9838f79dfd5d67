import numpy as np
import pytest
import torch
from scipy.special import softmax

from imu_ray.audits.accuracy import Predictions, output_change, predict_shard, summarise
from imu_ray.influence.features import FeatureShard
from imu_ray.models import Head


def test_figures_are_those_counted_by_hand():
    head = Head("fc", torch.eye(2, dtype=torch.float64), has_bias=False)
    shard = FeatureShard(np.array([[3.0, 0.0], [0.0, 3.0], [3.0, 0.0]]), np.array([0, 1, 1]), ["a", "b", "c"], (2, 1))
    figures = summarise(predict_shard(shard, head))
    right, wrong = np.log1p(np.exp(-3)), np.log1p(np.exp(3))
    assert figures["samples"] == 3
    assert figures["accuracy"] == 2 / 3
    assert np.isclose(figures["loss"], (2 * right + wrong) / 3)
    assert figures["per_class"]["1"] == {"samples": 2, "accuracy": 0.5, "loss": (right + wrong) / 2}


def test_parts_join_in_order():
    parts = [Predictions(np.array([i]), np.array([float(i)]), np.array([True])) for i in range(3)]
    assert Predictions.concatenate(parts).labels.tolist() == [0, 1, 2]


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
