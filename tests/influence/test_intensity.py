import tracemalloc

import numpy as np
import oracle
import pytest

from imu_ray.config import IntensityConfig
from imu_ray.errors import EmptySelectionError
from imu_ray.influence.intensity import SCHEMES


def in_parts(values, sizes):
    parts = np.split(values, np.cumsum(sizes)[:-1]) if sizes else [values]
    return lambda: iter(parts)


def unused():
    raise AssertionError("this scheme does without the losses")


def weigh(scheme, scores, losses=unused, seed=0, sizes=(), **settings):
    scores = np.asarray(scores, dtype=float)
    parts = list(SCHEMES[scheme](in_parts(scores, sizes), losses, IntensityConfig(**settings), seed)())
    assert [len(part) for part in parts] == (list(sizes) or [len(scores)])
    return np.concatenate(parts)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.1, 0.001])
@pytest.mark.parametrize("quantile", [0.93, 0.5, 1.0])
def test_imu_weights_equal_the_written_out_rule(keep, quantile):
    scores = np.random.default_rng(0).normal(size=301)
    weights = weigh("imu", scores, keep_fraction=keep, clip_quantile=quantile)
    np.testing.assert_allclose(weights, oracle.intensities(scores, keep, quantile), rtol=1e-14)


@pytest.mark.parametrize("sizes", [(), (1, 0, 299, 1), (50,) * 6 + (1,)])
@pytest.mark.parametrize("decimals", [None, 1, 0])  # fewer distinct scores, more ties
def test_no_bit_of_the_weights_hangs_on_how_the_samples_are_parted(sizes, decimals):
    for seed, keep, quantile in [(0, 1.0, 0.93), (1, 0.5, 0.5), (2, 0.1, 0.07), (3, 0.013, 1.0)]:
        scores = np.random.default_rng(seed).normal(size=301) * 10.0 ** np.random.default_rng(seed).integers(-3, 3, 301)
        scores = scores if decimals is None else scores.round(decimals)
        order = np.argsort(scores, kind="stable")
        chosen = order[: max(1, round(keep * (scores < 0).sum()))]
        expected = np.zeros(301)
        strength = np.sqrt(-scores[chosen])
        expected[chosen] = np.minimum(strength, np.quantile(strength, quantile))
        assert np.array_equal(weigh("imu", scores, sizes=sizes, keep_fraction=keep, clip_quantile=quantile), expected)


def test_selection_holds_no_column():
    parts, rows = 64, 1 << 14

    def scores():
        random = np.random.default_rng(0)
        return (random.normal(size=rows) for _ in range(parts))

    tracemalloc.start()
    try:
        kept = sum(np.count_nonzero(part) for part in SCHEMES["imu"](scores, unused, IntensityConfig(keep_fraction=0.3), 0)())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert kept == round(0.3 * sum(np.count_nonzero(part < 0) for part in scores()))
    assert peak < parts * rows * 8 / 3, "bytes; a column is three times as many"


@pytest.mark.parametrize(("keep", "kept"), [(0.34, [0]), (0.67, [0, 1])])
def test_ties_keep_the_earlier_sample(keep, kept):
    assert np.flatnonzero(weigh("imu", [-1.0, -1.0, -1.0, 2.0], sizes=(1, 3), keep_fraction=keep)).tolist() == kept


def test_no_negative_score_is_an_error_that_names_the_way_out():
    with pytest.raises(EmptySelectionError, match="none of 3 samples.*intensity.scheme=uniform"):
        weigh("imu", [0.0, 1.0, 2.0], sizes=(2, 1))


def test_uniform_weighs_every_sample_alike():
    assert weigh("uniform", [1.0, -1.0, 0.0], sizes=(2, 1)).tolist() == [1.0, 1.0, 1.0]


def test_permuted_has_the_imu_weights_in_another_order_fixed_by_the_seed():
    scores = np.random.default_rng(1).normal(size=50)
    imu, permuted = (weigh(name, scores, seed=3) for name in ("imu", "permuted"))
    assert sorted(imu) == sorted(permuted)
    assert imu.tolist() != permuted.tolist()
    assert permuted.tolist() == weigh("permuted", scores, seed=3, sizes=(20, 30)).tolist()


def test_loss_weighs_a_sample_by_its_loss():
    assert weigh("loss", [0.0, 0.0], lambda: iter([np.array([0.5, 2.0])])).tolist() == [0.5, 2.0]
