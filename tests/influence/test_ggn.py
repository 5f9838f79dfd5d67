"""Preconditioners against dense linear algebra, built sample by sample."""

import numpy as np
import oracle
import pytest
import torch
from scipy.linalg import block_diag

from imu_ray.influence.curvature import PRECONDITIONERS
from imu_ray.influence.curvature.ggn import scaled_inverse
from imu_ray.influence.gradients import probabilities

C, D = 4, 5
DAMPING = 0.01
GRADIENT = np.random.default_rng(1).normal(size=(C, D))


def dense(name, inputs, p):
    """The inverse as one matrix over the flattened head, from the definition."""
    hessian = oracle.layer_hessian(inputs, p)
    blocks = {
        "feature_second_moment": [oracle.second_moment(inputs)] * C,
        "block_ggn": [hessian[c * D : (c + 1) * D, c * D : (c + 1) * D] for c in range(C)],
        "full_ggn": [hessian],
    }[name]
    mean = np.mean([np.linalg.eigvalsh(block).mean() for block in blocks])
    inverses = [np.linalg.inv(block / mean + DAMPING * np.eye(len(block))) for block in blocks]
    mean_inverse = np.mean([np.linalg.eigvalsh(inverse).mean() for inverse in inverses])
    return block_diag(*inverses) / mean_inverse


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("name", ["feature_second_moment", "block_ggn", "full_ggn"])
def test_the_preconditioner_is_the_dense_inverse(name, positions):
    inputs, p, _, reduce = oracle.random_layer(23, positions, C, D)
    applied = PRECONDITIONERS[name].fit(reduce, DAMPING).apply_inverse(torch.from_numpy(GRADIENT)).numpy()
    expected = (dense(name, inputs, p) @ GRADIENT.reshape(-1)).reshape(C, D)
    assert np.abs(applied - expected).max() <= 1e-9 * np.abs(expected).max()


def test_probabilities_come_back_from_output_gradients():
    _, p, output_grads, _ = oracle.random_layer(23, 3, C, D)
    np.testing.assert_allclose(probabilities(torch.from_numpy(output_grads)), p, rtol=1e-12)


def test_a_curvature_of_zero_leaves_the_gradient_as_it_is():
    inverse = scaled_inverse(torch.zeros(2, 3, 3, dtype=torch.float64), DAMPING)
    torch.testing.assert_close(inverse, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))


@pytest.mark.parametrize(
    ("name", "numbers"), [("feature_second_moment", D * D), ("block_ggn", C * D * D), ("full_ggn", (C * D) ** 2)]
)
def test_the_memory_named_is_that_of_all_copies(name, numbers):
    assert PRECONDITIONERS[name].memory(C, D) == 6 * 8 * numbers
