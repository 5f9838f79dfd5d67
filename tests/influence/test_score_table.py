import functools
import os
import tempfile

import numpy as np
import pyarrow as pa
import pytest

from imu_ray.errors import StageFailedError
from imu_ray.influence import score_table
from imu_ray.influence.score_table import INTENSITY_SCHEMA, ColumnFile, ScoreTable
from imu_ray.scopes.features import SCORE_SCHEMA


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
    taken = ScoreTable({"damping": 0.01})
    for part in parts(sizes):
        taken.take(part)
    taken.close(0.95)
    weights = np.arange(60.0)
    lengths = [len(part) for part in taken.column("influence")()]
    groups = list(taken.batches(lambda: np.split(weights, np.cumsum(lengths)[:-1])))
    assert len(groups) > 2, "a part at a time"
    table, given = pa.concat_tables(groups), pa.concat_tables(parts(sizes))
    assert table.schema == INTENSITY_SCHEMA
    assert table.select(SCORE_SCHEMA.names).equals(given)
    for name in ("influence", "loss", "gradient_norm"):
        assert np.array_equal(np.concatenate(list(taken.column(name)())), given[name].to_numpy())
    assert np.array_equal(table["intensity"].to_numpy(), weights)
    norm = given["gradient_norm"].to_numpy()
    assert np.array_equal(table["outlier"].to_numpy(), norm / np.quantile(norm, 0.95))
    assert taken.label_counts == dict(zip(*np.unique(given["label"], return_counts=True), strict=True))


def test_it_can_be_gone_through_again():
    taken = ScoreTable({})
    taken.take(next(parts([3])))
    taken.close(0.5)
    first, second = (pa.concat_tables(taken.batches(lambda: [np.ones(3)])) for _ in range(2))
    assert first.equals(second)


def test_weights_that_are_not_those_of_the_samples_are_refused():
    taken = ScoreTable({})
    taken.take(next(parts([3])))
    taken.close(0.5)
    for weights in ([], [np.ones(2)], [np.ones(3), np.ones(1)]):
        with pytest.raises(ValueError, match="argument 2|length"):
            list(taken.batches(lambda weights=weights: weights))


def test_a_column_comes_back_from_its_file_as_often_as_asked_for(monkeypatch):
    monkeypatch.setattr(score_table, "ROW_GROUP", 20)
    values = np.random.default_rng(0).normal(size=90)
    with ColumnFile() as file:
        for part in np.split(values, [0, 1, 50]):
            file.take(part)
        for _ in range(2):
            read = list(file.parts())
            assert [len(part) for part in read] == [20, 20, 20, 20, 10]
            assert np.array_equal(np.concatenate(read), values)


def fill_table(rows):
    taken = ScoreTable({})
    taken.take(next(parts([rows])))
    taken.close(0.5)


def fill_column(rows):
    with ColumnFile() as file:
        file.take(np.ones(rows))
        next(file.parts())


@pytest.mark.parametrize("fill", [fill_table, fill_column])
@pytest.mark.parametrize("rows", [3, 300_000])  # what a buffer holds, and more
def test_a_full_temporary_disk_is_a_clear_failure(monkeypatch, fill, rows):
    monkeypatch.setattr(tempfile, "TemporaryFile", functools.partial(open, "/dev/full", "w+b"))
    with pytest.raises(StageFailedError, match="No space left on device; make room there, or name another place in TMPDIR"):
        fill(rows)


def test_a_killed_process_leaves_no_samples_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    taken = ScoreTable({})
    taken.take(next(parts([3])))
    taken.close(0.5)
    with ColumnFile() as file:
        file.take(np.ones(3))
        next(file.parts())
        assert os.listdir(tmp_path) == [], "the files have no names"
    assert len(next(taken.batches(lambda: [np.ones(3)]))) == 3
