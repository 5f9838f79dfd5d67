import numpy as np
import pytest

from imu_ray.influence.order_statistics import OrderStatistics, quantile

RANDOM = np.random.default_rng(0)
COLUMNS = {
    "one": np.array([3.0]),
    "two": np.array([5.0, 2.0]),
    "equal": np.full(50, 0.1),
    "zeros": np.repeat([0.0, 1.0], [70, 30]),
    "many orders of magnitude": 10.0 ** RANDOM.uniform(-300, 300, 997),
    "the smallest numbers": RANDOM.integers(0, 9, 200) * 5e-324,
    "close together": 1 + RANDOM.random(500) * 1e-12,
    "few values": RANDOM.integers(0, 5, 400).astype(float),
    "plain": RANDOM.exponential(size=1001),
}


def cut(column, size):
    return lambda: (column[start : start + size] for start in range(0, len(column), size))


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("size", [1, 64, 10_000])
def test_every_rank_has_the_value_of_the_sorted_column(column, size):
    ordered = OrderStatistics(cut(column, size))
    assert ordered.count == len(column)
    found = ordered.at(*range(len(column)))
    assert [value for value, _ in found] == sorted(column)
    assert [count for _, count in found] == [int((column <= value).sum()) for value in sorted(column)]


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_a_quantile_has_the_bits_of_numpys(column):
    for level in [0.0, 0.07, 1 / 3, 0.5, 0.93, 0.95, 0.999, 1.0, *RANDOM.random(40)]:
        assert quantile(cut(column, 100), level) == np.quantile(column, level)
