import numpy as np
import pytest

from imu_ray.audits import membership
from imu_ray.audits.base import Predictions
from imu_ray.audits.membership import Membership, membership_inference
from imu_ray.config import AuditConfig

RANDOM = np.random.default_rng(0)


def test_samples_from_one_distribution_lie_within_the_band_of_chance():
    found = membership_inference(RANDOM.exponential(size=600), RANDOM.exponential(size=500), AuditConfig(), 0)
    low, high = found["band"]
    assert low < 0.5 < high
    assert low <= found["balanced_accuracy"] <= high


@pytest.mark.parametrize("sign", [1, -1])
def test_separate_distributions_are_told_apart_on_either_side(sign):
    found = membership_inference(5 - sign * np.ones(100), 5 + sign * np.ones(80), AuditConfig(), 0)
    assert found["balanced_accuracy"] == 1.0


def test_a_known_overlap_gives_its_balanced_accuracy():
    # Members below 0 in 3 of 4 cases, others in 1 of 4: the best threshold gets (0.75 + 0.75) / 2.
    members = np.tile([-1.0, -1.0, -1.0, 1.0], 2000)
    found = membership_inference(members, -members, AuditConfig(permutations=20), 0)
    assert found["balanced_accuracy"] == pytest.approx(0.75, abs=0.03)


def draw(monkeypatch, measured, seed=0):
    """Losses of either side that the figures are made from."""
    monkeypatch.setattr(membership, "membership_inference", lambda members, others, config, seed: (members, others))
    measured = {name: Predictions(labels, {"loss": losses}, 8) for name, (labels, losses) in measured.items()}
    return Membership().run(measured, AuditConfig(), seed)["membership"]


def test_unseen_samples_of_other_classes_are_not_drawn(monkeypatch):
    forget, unseen = (np.array([0, 3]), np.array([0.5, 1.5])), np.repeat([0, 7, 3], [50, 70, 20])
    members, others = draw(monkeypatch, {"forget": forget, "test": (unseen, unseen.astype(float))})
    assert members.tolist() == [0.5, 1.5]
    assert others.tolist() == [0.0] * 50 + [3.0] * 20


def test_of_many_samples_a_part_is_drawn_evenly(monkeypatch):
    monkeypatch.setattr(membership, "LIMIT", 100)
    many = np.zeros(1000, int), np.arange(1000.0)
    counts = np.zeros(10)
    for seed in range(200):
        drawn, _ = draw(monkeypatch, {"forget": many, "test": many}, seed)
        assert len(drawn) == 100
        assert (np.diff(drawn) > 0).all(), "in order"
        counts += np.histogram(drawn, 10, (0, 1000))[0]
    # 2,000 draws in each tenth, give or take: the deviation of each is below sqrt(2000 x 0.9) = 42.
    assert np.abs(counts - 2000).max() < 5 * 42


def test_too_few_rows_are_not_measured_and_the_reason_is_given():
    assert "5 forget and 60 unseen" in membership_inference(np.ones(5), np.ones(60), AuditConfig(), 0)["skipped"]
