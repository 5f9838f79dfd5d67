import numpy as np
import pytest
import torch

from imu_ray.errors import NonFiniteError
from imu_ray.influence.curvature import CURVATURES
from imu_ray.influence.curvature.base import Moments, damped_direction, merge_tree
from imu_ray.influence.curvature.diagonal import DampedDiagonal


def moments(count, seed):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(count, 3, 4, generator=generator, dtype=torch.float64) * 10.0 ** (seed % 7 - 3)
    return Moments(count, gradients.sum(0), (gradients**2).sum(0))


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 8, 13, 64, 100])
@pytest.mark.parametrize("run", [1, 2, 4, 64])
def test_merging_aligned_runs_first_gives_the_same_bits(blocks, run):
    parts = [moments(1 + i % 3, i) for i in range(blocks)]
    whole = merge_tree(parts)
    runs = merge_tree([merge_tree(parts[i : i + run]) for i in range(0, blocks, run)])
    assert runs.count == whole.count
    assert torch.equal(runs.gradient_sum_CD, whole.gradient_sum_CD)
    assert torch.equal(runs.squared_sum_CD, whole.squared_sum_CD)


def test_merging_in_another_order_would_give_other_bits():
    parts = [moments(2, i) for i in range(64)]
    left_to_right = parts[0]
    for part in parts[1:]:
        left_to_right = left_to_right.merge(part)
    assert not torch.equal(left_to_right.gradient_sum_CD, merge_tree(parts).gradient_sum_CD)


def test_diagonal_fisher_divides_by_the_mean_square_plus_the_damping():
    total = moments(5, 1)
    fitted = CURVATURES["diagonal_fisher"].fit(lambda statistics: total, 0.25)
    gradient = torch.ones(3, 4, dtype=torch.float64)
    np.testing.assert_allclose(fitted.apply_inverse(gradient), 1 / (total.squared_sum_CD.numpy() / 5 + 0.25), rtol=1e-15)


def test_identity_leaves_the_mean_gradient_and_fits_nothing():
    def no_statistics(statistics):
        raise AssertionError("identity asked for statistics")

    fitted = CURVATURES["identity"].fit(no_statistics, 0.25)
    assert torch.equal(damped_direction(fitted, moments(5, 1)), moments(5, 1).mean_gradient_CD)


def test_a_direction_that_is_not_finite_is_refused():
    broken = Moments(1, torch.full((2, 2), float("nan"), dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(NonFiniteError, match="4 of 4 entries"):
        damped_direction(DampedDiagonal(torch.ones(2, 2, dtype=torch.float64)), broken)
