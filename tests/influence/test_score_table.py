import numpy as np
import pyarrow as pa
import pytest

from imu_ray.errors import StageFailedError
from imu_ray.influence import score_table
from imu_ray.influence.features import SCORE_SCHEMA
from imu_ray.influence.score_table import INTENSITY_SCHEMA, ScoreTable


def parts(sizes):
    random, start = np.random.default_rng(0), 0
    for size in sizes:
        ids = [f"sample-{row}" for row in range(start, start + size)]
        numbers = [random.normal(size=size), random.normal(size=size), np.abs(random.normal(size=size))]
        yield pa.table([pa.array(ids, pa.string()), pa.array(random.integers(0, 4, size)), *map(pa.array, numbers)], schema=SCORE_SCHEMA)
        start += size


def test_the_table_comes_back_whole_with_outliers_and_intensities(monkeypatch):
    monkeypatch.setattr(score_table, "ROW_GROUP", 20)  # parts end within groups and groups within parts
    sizes = [7, 8, 9, 1, 30, 5]
    taken = ScoreTable(60, {"damping": 0.01})
    for part in parts(sizes):
        taken.take(part)
    taken.close(0.95)
    weights = np.arange(60.0)
    groups = list(taken.batches(weights))
    assert len(groups) > 2, "a part at a time"
    table, given = pa.concat_tables(groups), pa.concat_tables(parts(sizes))
    assert table.schema == INTENSITY_SCHEMA
    assert table.select(SCORE_SCHEMA.names).equals(given)
    assert np.array_equal(taken.influence, given["influence"].to_numpy())
    assert np.array_equal(taken.loss(), given["loss"].to_numpy())
    assert np.array_equal(table["intensity"].to_numpy(), weights)
    norm = given["gradient_norm"].to_numpy()
    assert np.array_equal(table["outlier"].to_numpy(), norm / np.quantile(norm, 0.95))
    assert taken.label_counts == dict(zip(*np.unique(given["label"], return_counts=True), strict=True))


def test_it_can_be_gone_through_again():
    taken = ScoreTable(3, {})
    taken.take(next(parts([3])))
    taken.close(0.5)
    first, second = (pa.concat_tables(taken.batches(np.ones(3))) for _ in range(2))
    assert first.equals(second)


def test_a_full_temporary_disk_is_a_clear_failure(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    taken = ScoreTable(3, {})
    taken.take(next(parts([3])))
    monkeypatch.setattr(score_table.pq.ParquetWriter, "write_table", full)
    with pytest.raises(StageFailedError, match="No space left on device; make room there, or name another place in TMPDIR"):
        taken.close(0.5)
