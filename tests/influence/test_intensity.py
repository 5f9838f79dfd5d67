import numpy as np
import oracle
import pytest

from imu_ray.config import IntensityConfig
from imu_ray.errors import EmptySelectionError
from imu_ray.influence.intensity import SCHEMES


def weigh(scheme, scores, losses=None, seed=0, **settings):
    return SCHEMES[scheme](np.asarray(scores, dtype=float), losses, IntensityConfig(**settings), seed)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.1, 0.001])
@pytest.mark.parametrize("quantile", [0.93, 0.5, 1.0])
@pytest.mark.parametrize("decimals", [9, 1, 0])  # fewer distinct scores, more ties
def test_imu_weights_equal_the_written_out_rule(keep, quantile, decimals):
    scores = np.random.default_rng(0).normal(size=301).round(decimals)
    weights = weigh("imu", scores, keep_fraction=keep, clip_quantile=quantile)
    np.testing.assert_allclose(weights, oracle.intensities(scores, keep, quantile), rtol=1e-14)


@pytest.mark.parametrize(("keep", "kept"), [(0.34, [0]), (0.67, [0, 1])])
def test_ties_keep_the_earlier_sample(keep, kept):
    assert np.flatnonzero(weigh("imu", [-1.0, -1.0, -1.0, 2.0], keep_fraction=keep)).tolist() == kept


def test_no_negative_score_is_an_error_that_names_the_way_out():
    with pytest.raises(EmptySelectionError, match="none of 3 samples.*intensity.scheme=uniform"):
        weigh("imu", [0.0, 1.0, 2.0])


def test_uniform_weighs_every_sample_alike():
    assert weigh("uniform", [1.0, -1.0, 0.0]).tolist() == [1.0, 1.0, 1.0]


def test_permuted_has_the_imu_weights_in_another_order_fixed_by_the_seed():
    scores = np.random.default_rng(1).normal(size=50)
    imu, permuted = (weigh(name, scores, seed=3) for name in ("imu", "permuted"))
    assert sorted(imu) == sorted(permuted)
    assert imu.tolist() != permuted.tolist()
    assert permuted.tolist() == weigh("permuted", scores, seed=3).tolist()


def test_loss_weighs_a_sample_by_its_loss():
    assert weigh("loss", [0.0, 0.0], np.array([0.5, 2.0])).tolist() == [0.5, 2.0]
