import numpy as np
import pytest

from imu_ray.audits.accuracy import Predictions
from imu_ray.audits.membership import membership_inference
from imu_ray.config import AuditConfig


def predictions(losses, labels=0):
    losses = np.asarray(losses, dtype=float)
    return Predictions(np.broadcast_to(labels, losses.shape).copy(), losses, losses < 1)


RANDOM = np.random.default_rng(0)


def test_samples_from_one_distribution_lie_within_the_band_of_chance():
    found = membership_inference(predictions(RANDOM.exponential(size=600)), predictions(RANDOM.exponential(size=500)), AuditConfig(), 0)
    low, high = found["band"]
    assert low < 0.5 < high
    assert low <= found["balanced_accuracy"] <= high


@pytest.mark.parametrize("sign", [1, -1])
def test_separate_distributions_are_told_apart_on_either_side(sign):
    found = membership_inference(predictions(5 - sign * np.ones(100)), predictions(5 + sign * np.ones(80)), AuditConfig(), 0)
    assert found["balanced_accuracy"] == 1.0


def test_a_known_overlap_gives_its_balanced_accuracy():
    # Members below 0 in 3 of 4 cases, others in 1 of 4: the best threshold gets (0.75 + 0.75) / 2.
    members = np.tile([-1.0, -1.0, -1.0, 1.0], 2000)
    found = membership_inference(predictions(members), predictions(-members), AuditConfig(permutations=20), 0)
    assert found["balanced_accuracy"] == pytest.approx(0.75, abs=0.03)


def test_unseen_samples_of_other_classes_are_not_used():
    unseen = predictions(np.concatenate([np.ones(50), np.zeros(70)]), np.repeat([0, 7], [50, 70]))
    assert membership_inference(predictions(np.ones(60)), unseen, AuditConfig(), 0)["non_members"] == 50


def test_too_few_rows_are_not_measured_and_the_reason_is_given():
    assert "5 forget and 60 unseen" in membership_inference(predictions(np.ones(5)), predictions(np.ones(60)), AuditConfig(), 0)["skipped"]
