import numpy as np
import torch

from imu_ray.audit.accuracy import Predictions, predict_shard, summarise
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
