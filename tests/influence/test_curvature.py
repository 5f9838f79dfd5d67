import functools

import leave_one_out
import numpy as np
import oracle
import pytest
import torch
from pure import classifier_io

from imu_ray.config import IntensityConfig
from imu_ray.errors import NonFiniteError, StageFailedError
from imu_ray.influence.curvature import CURVATURES, hessian
from imu_ray.influence.curvature.base import Damping, Moments, damped_direction, describe_direction, merge_tree
from imu_ray.influence.curvature.diagonal import DampedDiagonal
from imu_ray.influence.curvature.ggn import block_ggn_sum, full_ggn_sum, second_moment_sum
from imu_ray.influence.curvature.hessian import Hessian
from imu_ray.influence.curvature.kronecker import FactorSums
from imu_ray.influence.gradients import gradient_norms
from imu_ray.influence.intensity import imu_intensities
from imu_ray.influence.scores import influence_scores


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
    fitted = CURVATURES["diagonal_fisher"].fit(lambda statistics: total, Damping(0.25))
    gradient = torch.ones(3, 4, dtype=torch.float64)
    np.testing.assert_allclose(
        fitted.apply_inverse(gradient), 1 / (total.squared_sum_CD.numpy() / 5 + 0.25), rtol=1e-15
    )


def test_identity_leaves_the_mean_gradient_and_fits_nothing():
    def no_statistics(statistics):
        raise AssertionError("identity asked for statistics")

    fitted = CURVATURES["identity"].fit(no_statistics, Damping(0.25))
    assert torch.equal(damped_direction(fitted, moments(5, 1)), moments(5, 1).mean_gradient_CD)


def test_relative_damping_is_a_share_of_the_mean_of_the_diagonal():
    total = moments(5, 1)
    fitted = CURVATURES["diagonal_fisher"].fit(lambda statistics: total, Damping(0.1, relative=True))
    fisher = total.squared_sum_CD.numpy() / 5
    np.testing.assert_allclose(fitted.diagonal_CD, fisher + 0.1 * fisher.mean(), rtol=1e-15)
    assert fitted.figures["damping"] == pytest.approx(0.1 * fisher.mean(), rel=1e-15)


C, D = 4, 5
INPUTS, _, OUTPUT_GRADS, reduce = oracle.random_layer(40, 1, C, D)
GRADIENT = np.random.default_rng(1).normal(size=(C, D))


@pytest.mark.parametrize("positions", [1, 3])
def test_statistics_are_means_over_samples_of_sums_over_positions(positions):
    inputs, p, output_grads, reduce = oracle.random_layer(40, positions, C, D)
    moments, factors = reduce(Moments.of), reduce(FactorSums.of)
    gradients, dense = oracle.layer_gradients(inputs, output_grads), oracle.layer_hessian(inputs, p)
    of_outputs, of_inputs = oracle.kronecker_factors(inputs, p)
    product = functools.partial(hessian.product_sum, vector_CD=torch.from_numpy(GRADIENT))
    for found, expected in (
        (moments.mean_gradient_CD, gradients.mean(0)),
        (moments.fisher_CD, (gradients**2).mean(0)),
        (reduce(second_moment_sum).mean, oracle.second_moment(inputs)),
        (reduce(block_ggn_sum).mean, [dense[c * D : (c + 1) * D, c * D : (c + 1) * D] for c in range(C)]),
        (reduce(full_ggn_sum).mean, dense),
        (reduce(hessian.diagonal_sum).mean, np.diag(dense).reshape(C, D)),
        (reduce(product).mean, (dense @ GRADIENT.reshape(-1)).reshape(C, D)),
        (factors.outputs_CC / factors.count, of_outputs),
        (factors.inputs_DD / factors.positions, of_inputs),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)


def test_kronecker_factors_of_inputs_that_are_all_alike_are_the_hessian():
    inputs, p, _, _ = oracle.random_layer(4, 3, C, D)
    factors = oracle.kronecker_factors(np.broadcast_to(inputs[0, 0], inputs.shape), p)
    np.testing.assert_allclose(
        np.kron(*factors), oracle.layer_hessian(np.broadcast_to(inputs[0, 0], inputs.shape), p), atol=1e-13
    )


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", ["kfac", "hessian"])
def test_a_curvature_is_the_dense_inverse(name, relative, positions):
    inputs, p, _, reduce = oracle.random_layer(40, positions, C, D)
    matrix = np.kron(*oracle.kronecker_factors(inputs, p)) if name == "kfac" else oracle.layer_hessian(inputs, p)
    damping = 0.01 * np.diag(matrix).mean() if relative else 0.01
    applied = CURVATURES[name].fit(reduce, Damping(0.01, relative)).apply_inverse(torch.from_numpy(GRADIENT)).numpy()
    expected = np.linalg.solve(matrix + damping * np.eye(C * D), GRADIENT.reshape(-1)).reshape(C, D)
    assert np.abs(applied - expected).max() <= 1e-9 * np.abs(expected).max()


@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-6])
def test_conjugate_gradients_agree_with_cholesky_and_say_what_they_took(damping):
    by_factor = Hessian().fit(reduce, Damping(damping)).apply_inverse(torch.from_numpy(GRADIENT))
    implicit = Hessian(dense_size=0).fit(reduce, Damping(damping))
    by_iteration = implicit.apply_inverse(torch.from_numpy(GRADIENT))
    assert (by_iteration - by_factor).abs().max() <= 1e-7 * by_factor.abs().max()
    assert 0 < implicit.figures["iterations"] <= 100
    assert implicit.figures["residual"] <= 1e-10
    assert implicit.figures["damping"] == damping


def test_conjugate_gradients_that_do_not_converge_are_an_error(monkeypatch):
    monkeypatch.setattr(hessian, "MAX_ITERATIONS", 2)
    with pytest.raises(
        StageFailedError, match="did not converge: residual .* after 2 iterations.*raise influence.damping"
    ):
        Hessian(dense_size=0).fit(reduce, Damping(1e-6)).apply_inverse(torch.from_numpy(GRADIENT))


def test_conjugate_gradients_on_what_is_not_finite_end_at_once():
    with pytest.raises(StageFailedError, match="residual nan of the gradient after 1 iterations"):
        Hessian(dense_size=0).fit(reduce, Damping(0.01)).apply_inverse(
            torch.full((C, D), torch.nan, dtype=torch.float64)
        )


def test_a_gradient_of_zero_needs_no_iteration():
    implicit = Hessian(dense_size=0).fit(reduce, Damping(0.01))
    assert not implicit.apply_inverse(torch.zeros(C, D, dtype=torch.float64)).any()
    assert implicit.figures["iterations"] == 0


def test_clipping_bounds_the_norm_with_which_a_sample_goes_in():
    gradients = oracle.layer_gradients(INPUTS, OUTPUT_GRADS)
    norms = np.linalg.norm(gradients, axis=(1, 2))
    limit = np.median(norms)
    clipped = gradients * np.minimum(1, limit / norms)[:, None, None]
    total = reduce(functools.partial(Moments.of, clip=limit))
    np.testing.assert_allclose(total.mean_gradient_CD, clipped.mean(0), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(total.fisher_CD, (clipped**2).mean(0), rtol=1e-10)


def test_large_damping_leaves_a_plain_gradient_product_and_small_damping_does_not():
    total = reduce(Moments.of)
    for damping, low, high in ((1e6, 1 - 1e-9, 1 + 1e-9), (1e-9, 0.0, 0.9)):
        fitted = CURVATURES["diagonal_fisher"].fit(lambda _: total, Damping(damping))
        figures = describe_direction(damped_direction(fitted, total), total, damping)
        assert low <= figures["plain_gradient_share"] <= high
        assert figures["fisher_below_damping"] == (1.0 if damping > 1 else 0.0)
    assert figures["fisher_quantiles"]["0.5"] == pytest.approx(
        np.quantile(total.fisher_CD.numpy(), 0.5, method="nearest")
    )


@pytest.fixture(scope="module")
def refitted():
    """150 refits of a regularised head, each without one row of the forget set, which is 300 of 1,000 rows."""
    return leave_one_out.truth()


def test_the_hessian_predicts_what_a_refit_without_the_row_does(refitted):
    assert leave_one_out.agreement(refitted, "hessian", leave_one_out.ROWS) >= 0.98


def test_curvatures_are_ordered_by_what_they_leave_out(refitted):
    figures = [
        leave_one_out.agreement(refitted, name, leave_one_out.ROWS)
        for name in ("identity", "diagonal_fisher", "kfac", "hessian")
    ]
    assert figures == sorted(figures)
    assert figures[2] >= 0.8


def test_a_direction_that_is_not_finite_is_refused():
    broken = Moments(1, torch.full((2, 2), float("nan"), dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(NonFiniteError, match="4 of 4 entries"):
        damped_direction(DampedDiagonal(torch.ones(2, 2, dtype=torch.float64)), broken)


def weights_of_the_first(inputs, logits, labels, robust, kept=190):
    """The paper's weights of the first samples, scaled to a mean of 1, with and without clipping at the 0.9 quantile of the norms."""
    io = classifier_io(inputs, logits, labels)
    clip = float(gradient_norms(io).quantile(0.9)) if robust else None
    total = Moments.of(io, clip=clip)
    fitted = CURVATURES["diagonal_fisher"].fit(lambda _: total, Damping(0.01))
    scores = influence_scores(io, damped_direction(fitted, total)).numpy()[:kept]
    weights = imu_intensities(scores, np.empty(0), IntensityConfig(), 0)
    return weights / weights.mean()


def test_clipping_bounds_what_outliers_do_to_the_weights_of_the_others():
    random = np.random.default_rng(1)
    labels = random.integers(0, 3, 200)
    inputs = 2 * np.eye(3, 6)[labels] + random.normal(size=(200, 6))
    matrix = np.eye(3, 6)
    planted, mislabelled = inputs.copy(), labels.copy()
    planted[190:] *= 100  # huge norms
    mislabelled[190:] = (labels[190:] + 1) % 3
    changes = {}
    for robust in (False, True):
        clean, spoilt = (
            weights_of_the_first(torch.from_numpy(h), torch.from_numpy(h @ matrix.T), torch.from_numpy(y), robust)
            for h, y in ((inputs, labels), (planted, mislabelled))
        )
        changes[robust] = np.abs(spoilt - clean).mean()
    assert changes[True] <= 0.4, "of the mean weight"
    assert changes[False] >= 3 * changes[True]
