import numpy as np
import pytest

from imu_ray.audits import membership
from imu_ray.audits.accuracy import Predictions
from imu_ray.audits.membership import LossDraw, membership_inference
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


def predictions(losses, labels):
    return Predictions(labels, losses, losses < 1)


def test_unseen_samples_of_other_classes_are_not_drawn():
    labels = np.repeat([0, 7, 3], [50, 70, 20])
    draw = LossDraw(0, np.array([0, 3]))
    draw.take(predictions(labels.astype(float), labels))
    assert draw.losses.tolist() == [0.0] * 50 + [3.0] * 20


def test_of_many_samples_a_part_is_drawn_evenly_however_they_come(monkeypatch):
    monkeypatch.setattr(membership, "LIMIT", 100)
    losses = np.arange(1000.0)
    counts = np.zeros(10)
    for seed in range(200):
        drawn = []
        for sizes in ([1000], [90, 9, 2, 399, 0, 500]):
            draw = LossDraw(seed)
            for rows in np.split(np.arange(1000), np.cumsum(sizes)[:-1]):
                draw.take(predictions(losses[rows], np.zeros(len(rows), int)))
            drawn.append(draw.losses)
        assert np.array_equal(*drawn)
        assert len(np.unique(drawn[0])) == 100
        assert (np.diff(drawn[0]) > 0).all(), "in order"
        counts += np.histogram(drawn[0], 10, (0, 1000))[0]
    # 2,000 draws in each tenth, give or take: the deviation of each is below sqrt(2000 x 0.9) = 42.
    assert np.abs(counts - 2000).max() < 5 * 42


def test_too_few_rows_are_not_measured_and_the_reason_is_given():
    assert "5 forget and 60 unseen" in membership_inference(np.ones(5), np.ones(60), AuditConfig(), 0)["skipped"]
