import functools

import leave_one_out
import numpy as np
import pytest
import torch

from imu_ray.config import IntensityConfig
from imu_ray.errors import NonFiniteError, StageFailedError
from imu_ray.influence.curvature import CURVATURES, hessian
from imu_ray.influence.curvature.base import Damping, Moments, damped_direction, describe_direction, merge_tree
from imu_ray.influence.curvature.diagonal import DampedDiagonal
from imu_ray.influence.curvature.hessian import Hessian
from imu_ray.influence.gradients import classifier_io, gradient_norms
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
    np.testing.assert_allclose(fitted.apply_inverse(gradient), 1 / (total.squared_sum_CD.numpy() / 5 + 0.25), rtol=1e-15)


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


N, C, D = 40, 4, 5
RANDOM = np.random.default_rng(0)
H, Z, LABELS = RANDOM.normal(size=(N, D)), 2 * RANDOM.normal(size=(N, C)), RANDOM.integers(0, C, N)
P = np.exp(Z) / np.exp(Z).sum(1, keepdims=True)
GRADIENT = RANDOM.normal(size=(C, D))


def reduce(statistics):
    """Over blocks of seven rows."""
    cut = lambda array, i: torch.from_numpy(array[i : i + 7])
    return merge_tree([statistics(classifier_io(cut(H, i), cut(Z, i), cut(LABELS, i))) for i in range(0, N, 7)])


def dense(name, damping, relative):
    """The matrix over the flattened head, from the definition."""
    if name == "kfac":
        factors = sum(np.diag(p) - np.outer(p, p) for p in P) / N, sum(np.outer(h, h) for h in H) / N
        matrix = np.kron(*factors)
    else:
        matrix = sum(np.kron(np.diag(p) - np.outer(p, p), np.outer(h, h)) for p, h in zip(P, H, strict=True)) / N
    return matrix + (damping * np.diag(matrix).mean() if relative else damping) * np.eye(C * D)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", ["kfac", "hessian"])
def test_a_curvature_is_the_dense_inverse(name, relative):
    applied = CURVATURES[name].fit(reduce, Damping(0.01, relative)).apply_inverse(torch.from_numpy(GRADIENT)).numpy()
    expected = np.linalg.solve(dense(name, 0.01, relative), GRADIENT.reshape(-1)).reshape(C, D)
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
    with pytest.raises(StageFailedError, match="did not converge: residual .* after 2 iterations.*raise influence.damping"):
        Hessian(dense_size=0).fit(reduce, Damping(1e-6)).apply_inverse(torch.from_numpy(GRADIENT))


def test_a_gradient_of_zero_needs_no_iteration():
    implicit = Hessian(dense_size=0).fit(reduce, Damping(0.01))
    assert not implicit.apply_inverse(torch.zeros(C, D, dtype=torch.float64)).any()
    assert implicit.figures["iterations"] == 0


def test_clipping_bounds_the_norm_with_which_a_sample_goes_in():
    gradients = np.stack([np.outer(p - np.eye(C)[y], h) for p, y, h in zip(P, LABELS, H, strict=True)])
    norms = np.linalg.norm(gradients, axis=(1, 2))
    limit = np.median(norms)
    clipped = gradients * np.minimum(1, limit / norms)[:, None, None]
    total = reduce(functools.partial(Moments.of, clip=limit))
    np.testing.assert_allclose(total.mean_gradient_CD, clipped.mean(0), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(total.fisher_CD, (clipped**2).mean(0), rtol=1e-10)
    io = classifier_io(torch.from_numpy(H), torch.from_numpy(Z), torch.from_numpy(LABELS))
    np.testing.assert_allclose(gradient_norms(io), norms, rtol=1e-10)


def test_large_damping_leaves_a_plain_gradient_product_and_small_damping_does_not():
    total = reduce(Moments.of)
    for damping, low, high in ((1e6, 1 - 1e-9, 1 + 1e-9), (1e-9, 0.0, 0.9)):
        fitted = CURVATURES["diagonal_fisher"].fit(lambda _: total, Damping(damping))
        figures = describe_direction(damped_direction(fitted, total), total, damping)
        assert low <= figures["plain_gradient_share"] <= high
        assert figures["fisher_below_damping"] == (1.0 if damping > 1 else 0.0)
    assert figures["fisher_quantiles"]["0.5"] == pytest.approx(np.quantile(total.fisher_CD.numpy(), 0.5, method="nearest"))


@pytest.fixture(scope="module")
def refitted():
    """150 refits of a regularised head, each without one row of the forget set, which is 300 of 1,000 rows."""
    return leave_one_out.truth()


def test_the_hessian_predicts_what_a_refit_without_the_row_does(refitted):
    assert leave_one_out.agreement(refitted, "hessian", leave_one_out.ROWS) >= 0.98


def test_curvatures_are_ordered_by_what_they_leave_out(refitted):
    figures = [leave_one_out.agreement(refitted, name, leave_one_out.ROWS) for name in ("identity", "diagonal_fisher", "kfac", "hessian")]
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
    (weights,) = imu_intensities(lambda: [scores], lambda: [], IntensityConfig(), 0)()
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
