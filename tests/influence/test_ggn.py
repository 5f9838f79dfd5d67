"""Preconditioners against dense linear algebra, built sample by sample."""

import numpy as np
import pytest
import torch

from imu_ray.influence.curvature import PRECONDITIONERS
from imu_ray.influence.curvature.base import merge_tree
from imu_ray.influence.curvature.ggn import scaled_inverse
from imu_ray.influence.gradients import classifier_io, probabilities

N, C, D = 23, 4, 5
DAMPING = 0.01
RANDOM = np.random.default_rng(0)
H = RANDOM.normal(size=(N, D))
Z = 2 * RANDOM.normal(size=(N, C))
LABELS = RANDOM.integers(0, C, N)
P = np.exp(Z) / np.exp(Z).sum(1, keepdims=True)
GRADIENT = RANDOM.normal(size=(C, D))


def reduce(statistics):
    """Over blocks of five rows."""
    cut = lambda array, i: torch.from_numpy(array[i : i + 5])
    return merge_tree([statistics(classifier_io(cut(H, i), cut(Z, i), cut(LABELS, i))) for i in range(0, N, 5)])


def dense(name):
    """The inverse as one matrix over the flattened head, from the definition."""
    if name == "feature_second_moment":
        blocks = [sum(np.outer(h, h) for h in H) / N] * C
    elif name == "block_ggn":
        blocks = [sum(p[c] * (1 - p[c]) * np.outer(h, h) for p, h in zip(P, H, strict=True)) / N for c in range(C)]
    else:
        blocks = [sum(np.kron(np.diag(p) - np.outer(p, p), np.outer(h, h)) for p, h in zip(P, H, strict=True)) / N]
    mean = np.mean([np.linalg.eigvalsh(block).mean() for block in blocks])
    inverses = [np.linalg.inv(block / mean + DAMPING * np.eye(len(block))) for block in blocks]
    mean_inverse = np.mean([np.linalg.eigvalsh(inverse).mean() for inverse in inverses])
    matrix = np.zeros((C * D, C * D))
    for place, inverse in enumerate(inverses):
        size = len(inverse)
        matrix[place * size : (place + 1) * size, place * size : (place + 1) * size] = inverse / mean_inverse
    return matrix


@pytest.mark.parametrize("name", ["feature_second_moment", "block_ggn", "full_ggn"])
def test_the_preconditioner_is_the_dense_inverse(name):
    applied = PRECONDITIONERS[name].fit(reduce, DAMPING).apply_inverse(torch.from_numpy(GRADIENT)).numpy()
    expected = (dense(name) @ GRADIENT.reshape(-1)).reshape(C, D)
    assert np.abs(applied - expected).max() <= 1e-9 * np.abs(expected).max()


def test_probabilities_come_back_from_output_gradients():
    io = classifier_io(torch.from_numpy(H), torch.from_numpy(Z), torch.from_numpy(LABELS))
    np.testing.assert_allclose(probabilities(io.output_grads_BTC)[:, 0], P, rtol=1e-12)


def test_a_curvature_of_zero_leaves_the_gradient_as_it_is():
    inverse = scaled_inverse(torch.zeros(2, 3, 3, dtype=torch.float64), DAMPING)
    torch.testing.assert_close(inverse, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))


@pytest.mark.parametrize(("name", "numbers"), [("feature_second_moment", D * D), ("block_ggn", C * D * D), ("full_ggn", (C * D) ** 2)])
def test_the_memory_named_is_that_of_all_copies(name, numbers):
    assert PRECONDITIONERS[name].memory(C, D) == 6 * 8 * numbers
