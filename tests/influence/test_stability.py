"""Scores of confident, extreme and degenerate samples: defined, or refused."""

import numpy as np
import pytest
import torch

from imu_ray.influence.curvature import CURVATURES
from imu_ray.influence.curvature.base import Damping, Moments, damped_direction
from imu_ray.influence.gradients import classifier_io
from imu_ray.influence.scores import influence_scores

D = 6


def scores(inputs, matrix, labels, curvature="diagonal_fisher"):
    """As the engine does it: inputs of any type, everything after them in float64."""
    io = classifier_io(inputs.double(), inputs.double() @ matrix.double().T, labels)
    direction = damped_direction(CURVATURES[curvature].fit(lambda statistics: statistics(io), Damping(0.01)), Moments.of(io))
    return influence_scores(io, direction).numpy()


@pytest.mark.parametrize("curvature", sorted(CURVATURES))
@pytest.mark.parametrize("margin", [0, 5, 10, 20, 30])
def test_float32_features_keep_the_sign_of_confident_samples(margin, curvature):
    random = np.random.default_rng(margin)
    labels = torch.from_numpy(random.integers(0, 5, 400))
    inputs = torch.from_numpy(margin * np.eye(5, D)[labels] + 0.3 * random.normal(size=(400, D)))
    matrix = torch.from_numpy(np.eye(5, D))
    exact, rounded = scores(inputs, matrix, labels, curvature), scores(inputs.float(), matrix, labels, curvature)
    largest = np.abs(exact).max()
    assert np.abs(rounded - exact).max() <= 1e-3 * largest
    clear = np.abs(exact) > 1e-5 * largest
    assert clear.any()
    assert (np.sign(rounded[clear]) == np.sign(exact[clear])).all()


@pytest.mark.parametrize("curvature", sorted(CURVATURES))
def test_extreme_logits_give_finite_scores(curvature):
    inputs = torch.eye(4, D, dtype=torch.float64).repeat(3, 1)
    matrix = 1e4 * torch.sign(torch.randn(4, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    found = scores(inputs, matrix, torch.arange(12) % 4, curvature)
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 0


@pytest.mark.parametrize("curvature", sorted(CURVATURES))
def test_one_sample_lowers_its_own_loss(curvature):
    found = scores(torch.ones(1, D), torch.eye(3, D), torch.tensor([1]), curvature)
    assert found.shape == (1,)
    assert found[0] < 0


@pytest.mark.parametrize("curvature", sorted(CURVATURES))
def test_features_of_zero_have_no_influence(curvature):
    found = scores(torch.zeros(4, D), torch.eye(3, D), torch.tensor([0, 1, 2, 0]), curvature)
    assert not found.any()


@pytest.mark.parametrize("curvature", sorted(CURVATURES))
def test_one_class_alone_has_no_influence(curvature):
    found = scores(torch.ones(4, D), torch.ones(1, D), torch.zeros(4, dtype=torch.int64), curvature)
    assert not found.any()
