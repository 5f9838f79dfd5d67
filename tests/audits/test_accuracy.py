import numpy as np
import pytest
import torch
from scipy.special import softmax

from imu_ray.audits import AUDITS
from imu_ray.audits.accuracy import output_change, set_figures
from imu_ray.audits.base import Predictions, predict_shard
from imu_ray.config import AuditConfig, ForgetSetConfig
from imu_ray.distributed import audit_job
from imu_ray.scopes.features import FeatureShard
from imu_ray.scopes.head import Head
from imu_ray.tasks.classification import ClassificationTask


def task(classes):
    return ClassificationTask(ForgetSetConfig(), "fc", classes)


def test_figures_are_those_counted_by_hand():
    head = Head("fc", torch.eye(2, dtype=torch.float64), False, task(2))
    shard = FeatureShard(np.array([[3.0, 0.0], [0.0, 3.0], [3.0, 0.0]]), np.array([0, 1, 1]), ["a", "b", "c"], (2, 1))
    figures = set_figures(predict_shard(shard, head))
    right, wrong = np.log1p(np.exp(-3)), np.log1p(np.exp(3))
    per_class = figures.pop("per_class")
    bounded = pytest.approx((2 * right + np.log(2)) / 3)
    assert figures == {
        "samples": 3, "accuracy": 2 / 3, "loss": pytest.approx((2 * right + wrong) / 3), "bounded_loss": bounded,
        "margin": 1.0,
    }  # fmt: skip
    assert [per_class[label]["samples"] for label in "01"] == [1, 2]
    assert [per_class[label]["loss"] for label in "01"] == pytest.approx([right, (right + wrong) / 2])


def test_classes_without_samples_have_no_figures_and_samples_of_several_labels_no_class():
    random = np.random.default_rng(0)
    labels, losses = random.integers(0, 5, 1000) * 2, random.exponential(size=1000)
    figures = set_figures(Predictions(labels, {"loss": losses}, 12))
    assert list(figures["per_class"]) == ["0", "2", "4", "6", "8"]
    assert figures["loss"] == pytest.approx(losses.mean(), rel=1e-12)
    fours = {"samples": (labels == 4).sum(), "loss": pytest.approx(losses[labels == 4].mean(), rel=1e-12)}
    assert figures["per_class"]["4"] == fours
    several = set_figures(Predictions(labels.reshape(250, 4), {"loss": losses[:250]}, 12))
    assert several == {"samples": 250, "loss": pytest.approx(losses[:250].mean(), rel=1e-12), "per_class": {}}


class Kept(list):
    """Shards in place of a feature set."""

    def map(self, stage, function):
        return [function(shard) for shard in self]


def test_a_registered_audit_is_run_on_every_set_and_stands_beside_the_others(monkeypatch):
    class Rows:
        def run(self, measured, config, seed):
            return {"rows": {name: part.labels.tolist() for name, part in measured.items()}}

    monkeypatch.setitem(AUDITS, "rows", Rows())
    shards = [FeatureShard(np.eye(2), np.array([0, label]), ["a", "b"], (2,)) for label in (0, 1)]
    head = Head("fc", torch.eye(2, dtype=torch.float64), False, task(2))
    found = audit_job.measure({"forget": Kept(shards), "other": Kept(shards[1:])}, head, AuditConfig(), 0)
    assert list(found) == ["forget", "other", "membership", "destinations", "rows"]
    assert found["rows"] == {"forget": [0, 0, 0, 1], "other": [0, 1]}
    assert found["forget"]["samples"] == 4
    assert "evaluation['test']" in found["membership"]["skipped"]


def test_output_change_is_the_divergence_among_the_other_classes():
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(7, 3)), random.integers(0, 4, 7)
    before, after = (Head("fc", torch.from_numpy(random.normal(size=(4, 3))), False, task(4)) for _ in range(2))
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
    heads = (Head("fc", each, False, task(4)) for each in (matrix, lowered))
    assert np.abs(output_change(FeatureShard(features, labels, [], (2,)), *heads)).max() <= 1e-12
