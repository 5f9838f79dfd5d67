import numpy as np
import oracle
import pytest

from imu_ray.config import IntensityConfig
from imu_ray.errors import EmptySelectionError
from imu_ray.influence.intensity import SCHEMES


def unused():
    raise AssertionError("this scheme does without the losses")


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.1, 0.001])
@pytest.mark.parametrize("quantile", [0.93, 0.5, 1.0])
def test_imu_weights_equal_the_written_out_rule(keep, quantile):
    scores = np.random.default_rng(0).normal(size=301)
    weights = SCHEMES["imu"](scores, unused, IntensityConfig(keep_fraction=keep, clip_quantile=quantile), 0)
    np.testing.assert_allclose(weights, oracle.intensities(scores, keep, quantile), rtol=1e-14)


def test_ties_keep_the_earlier_sample():
    weights = SCHEMES["imu"](np.array([-1.0, -1.0, -1.0, 2.0]), unused, IntensityConfig(keep_fraction=0.34), 0)
    assert np.flatnonzero(weights).tolist() == [0]


def test_no_negative_score_is_an_error_that_names_the_way_out():
    with pytest.raises(EmptySelectionError, match="none of 3 samples.*intensity.scheme=uniform"):
        SCHEMES["imu"](np.array([0.0, 1.0, 2.0]), unused, IntensityConfig(), 0)


def test_uniform_weighs_every_sample_alike():
    assert SCHEMES["uniform"](np.array([1.0, -1.0]), unused, IntensityConfig(), 0).tolist() == [1.0, 1.0]


def test_permuted_has_the_imu_weights_in_another_order_fixed_by_the_seed():
    scores = np.random.default_rng(1).normal(size=50)
    imu, permuted = (SCHEMES[name](scores, unused, IntensityConfig(), 3) for name in ("imu", "permuted"))
    assert sorted(imu) == sorted(permuted)
    assert imu.tolist() != permuted.tolist()
    assert permuted.tolist() == SCHEMES["permuted"](scores, unused, IntensityConfig(), 3).tolist()


def test_loss_weighs_a_sample_by_its_loss():
    assert SCHEMES["loss"](np.zeros(2), lambda: np.array([0.5, 2.0]), IntensityConfig(), 0).tolist() == [0.5, 2.0]
