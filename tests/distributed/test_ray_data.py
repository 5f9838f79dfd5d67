"""Rows of a ray.data.Dataset: their order, and which blocks are fetched (what is read is in data/test_kinds.py)."""

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data
from architectures import named
from samples import image_table, paper

from imu_ray import CheckpointError, ForgetSetError, score
from imu_ray.config import ForgetSetConfig
from imu_ray.data import open_source, select_rows
from imu_ray.distributed import ray_data
from imu_ray.errors import ImuError

pytestmark = pytest.mark.usefixtures("ray_cluster")
CONFIG = ForgetSetConfig(image_mode="L")
TABLE = image_table(30)


def dataset(order=range(30), table=TABLE):
    """Three blocks, in the order in which they are given."""
    rows = table.take(list(order))
    return ray.data.from_arrow([rows.slice(start, 10) for start in (0, 10, 20)])


def executed_later(order, table=TABLE):
    return dataset(order, table).map_batches(lambda batch: batch)


def shuffled(seed):
    return np.random.default_rng(seed).permutation(30)


def test_a_materialized_dataset_has_its_own_order():
    source = open_source(dataset(shuffled(2)), CONFIG)
    assert source.read(0, 30).digest() == open_source(TABLE.take(list(shuffled(2))), CONFIG).read(0, 30).digest()


def test_without_ids_an_order_that_is_not_fixed_is_refused():
    numbered = TABLE.drop_columns("id")
    with pytest.raises(
        ForgetSetError, match=r"no column of ids, .*forget_set.id_column, or give dataset.materialize\(\)"
    ):
        open_source(executed_later(range(30), numbered), CONFIG)
    assert open_source(dataset(table=numbered), CONFIG).read(12, 14).ids == ["12", "13"]


def test_only_the_blocks_of_the_rows_that_are_read_are_fetched(monkeypatch):
    source = open_source(dataset(), CONFIG)
    fetched, get = [], ray.get
    monkeypatch.setattr(ray_data.ray, "get", lambda ref: fetched.append(ref) or get(ref))
    source.read(3, 8)
    assert fetched == [source.blocks[0]]
    source.read(9, 12)
    source.take(np.array([1, 25]))
    assert fetched[1:] == [source.blocks[place] for place in (0, 1, 0, 2)]


def test_ids_conditions_and_labels_are_looked_up_without_fetching_an_input(monkeypatch):
    source = open_source(dataset(), CONFIG)
    seen, get = [], ray.get
    monkeypatch.setattr(ray_data.ray, "get", lambda refs: seen.append(get(refs)) or seen[-1])
    source.check(5)
    named_rows = select_rows(source, ForgetSetConfig(ids=("s029", "s002")))
    met = select_rows(source, ForgetSetConfig(where="label == 3"))
    named_rows.check(5)
    assert all(set(part.column_names) <= {"id", "label"} for parts in seen for part in parts)
    assert named_rows.read(0, 2).digest() == open_source(TABLE, CONFIG).take(np.array([2, 29])).digest()
    assert met.num_rows == TABLE["label"].to_pylist().count(3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: ray.data.from_arrow(TABLE.slice(0, 0)), "the forget set the ray.data Dataset is empty"),
        (lambda: dataset(table=TABLE.drop_columns("label")), "the ray.data Dataset has no column 'label'; it has id, image"),
        (lambda: dataset([*range(29), 3]), "sample id 's003' stands 2 times in the ray.data Dataset"),
        (lambda: dataset(table=image_table(30, classes=9)), "row 's0..' of the ray.data Dataset has label .; expected 0 to 4"),
    ],
    ids=["empty", "no column", "doubles", "labels"],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(given, message):
    with pytest.raises(ImuError, match=message):
        open_source(given(), CONFIG).check(5)


def test_an_error_of_a_step_of_the_dataset_is_told_without_its_text():
    def failing(batch):
        raise ValueError("Jane Doe")

    with pytest.raises(ForgetSetError, match="the ray.data Dataset cannot be read: .*; mend or remove") as caught:
        open_source(dataset().map_batches(failing), CONFIG)
    assert "Jane" not in str(caught.value)


def test_columns_that_one_block_lacks_or_has_in_another_type_are_made_alike():
    first = TABLE.slice(0, 10).set_column(2, "label", TABLE["label"].slice(0, 10).cast(pa.int32()))
    second = TABLE.slice(10).append_column("more", pa.array(["x"] * 20))
    source = open_source(ray.data.from_arrow([first, second]), CONFIG)
    assert source.read(5, 15).digest() == open_source(TABLE, CONFIG).read(5, 15).digest()
    assert select_rows(source, ForgetSetConfig(where="more == 'x'")).num_rows == 20


@pytest.mark.slow
def test_rows_that_are_executed_anew_are_sorted_by_id_so_that_a_run_knows_them_and_no_other_order(tmp_path):
    settings, model = paper(forget_set__image_mode="L"), named("fc")
    wanted = score(model, TABLE, config=settings)
    for seed in (1, 2):
        found = score(model, executed_later(shuffled(seed)), config=settings, run_dir=tmp_path / "run")
        assert found.equals(wanted)
    with pytest.raises(CheckpointError, match="holds a run on another forget set"):
        score(model, dataset(shuffled(2)), config=settings, run_dir=tmp_path / "run")
