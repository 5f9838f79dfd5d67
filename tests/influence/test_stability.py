"""Scores of confident, extreme and degenerate samples: defined, or refused."""

import json

import numpy as np
import pytest
import torch
from pure import classifier_io

from imu_ray.config import InfluenceConfig
from imu_ray.influence.curvature import CURVATURES
from imu_ray.influence.curvature.base import Damping, Moments, damped_direction
from imu_ray.influence.direction import fit_directions
from imu_ray.influence.gradients import LayerIO, gradient_norms
from imu_ray.influence.scores import influence_scores

D = 6


def scores(inputs, matrix, labels, curvature="diagonal_fisher", relative=False):
    """As the engine does it: inputs of any type, everything after them in float64."""
    io = classifier_io(inputs.double(), inputs.double() @ matrix.double().T, labels)
    direction = damped_direction(
        CURVATURES[curvature].fit(lambda statistics: statistics(io), Damping(0.01, relative)), Moments.of(io)
    )
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


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("curvature", sorted(CURVATURES))
@pytest.mark.parametrize(
    ("inputs", "matrix", "labels"),
    [
        (torch.zeros(4, D), torch.eye(3, D), torch.tensor([0, 1, 2, 0])),
        (torch.ones(4, D), torch.ones(1, D), torch.zeros(4, dtype=torch.int64)),
        (torch.ones(4, D), 1e4 * torch.eye(3, 1).expand(3, D), torch.zeros(4, dtype=torch.int64)),
    ],
    ids=["features of zero", "one class alone", "fitted beyond the last digit"],
)
def test_samples_without_a_gradient_have_no_influence(inputs, matrix, labels, curvature, relative):
    assert not scores(inputs, matrix, labels, curvature, relative).any()


def test_gradients_of_zero_are_clipped_to_zero():
    io = LayerIO(
        torch.ones(2, 1, D, dtype=torch.float64), torch.tensor([[[0.0, 0.0]], [[3.0, -3.0]]], dtype=torch.float64)
    )
    assert not Moments.of(io, clip=0.0).gradient_sum_CD.any()


@pytest.mark.parametrize("curvature", sorted(CURVATURES))
def test_a_head_of_zeros_has_finite_scores_and_figures(curvature):
    inputs = torch.randn(12, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    io = classifier_io(inputs, torch.zeros(12, 4), torch.arange(12) % 4)
    settings = InfluenceConfig(curvature=curvature, robust="clip")
    directions, figures = fit_directions(
        settings, ["fc"], lambda statistics: {"fc": statistics(io)}, None, lambda _: float(gradient_norms(io).median())
    )
    json.dumps(figures, allow_nan=False)
    assert np.isfinite(influence_scores(io, directions["fc"]).numpy()).all()
