"""Ids from files, and the rows that they are of."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import image_table

from imu_ray import ForgetSetError, RequestError
from imu_ray.config import ForgetSetConfig
from imu_ray.data import open_source
from imu_ray.requests.rows import find_rows, only_rows, read_ids


def written(path, kind):
    """The ids 0010 and 11 in a file."""
    if kind == "parquet":
        pq.write_table(pa.table({"label": [1, 2], "id": ["0010", "11"]}), path)
    elif kind == "numbers":
        pq.write_table(pa.table({"digit": [10, 11]}), path)
    elif kind == "csv":
        path.write_text("id,name\n0010,a\n11,b\n")
    elif kind == "one column":
        path.write_text("digit\n0010\n11\n")
    else:
        path.write_text("0010\n\n 11 \n")
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.parquet", "parquet"), ("a.csv", "csv"), ("a.csv", "one column"), ("a.txt", "text"), ("list", "text")],
)
def test_ids_are_read_as_they_stand(name, kind, tmp_path):
    assert read_ids(written(tmp_path / name, kind)) == ["0010", "11"]


def test_numbers_are_ids_by_their_digits(tmp_path):
    assert read_ids(written(tmp_path / "a.parquet", "numbers")) == ["10", "11"]


def test_a_file_without_ids_is_refused(tmp_path):
    (tmp_path / "two.csv").write_text("a,b\n1,2\n")
    pq.write_table(pa.table({"id": ["a", None]}), tmp_path / "empty.parquet")
    (tmp_path / "broken.parquet").write_text("a")
    for name, message in (
        ("two.csv", "has columns a, b; expected 'id', or one column alone"),
        ("empty.parquet", "has 1 empty cells"),
        ("broken.parquet", "cannot be read"),
        ("nowhere.txt", "does not exist"),
    ):
        with pytest.raises(RequestError, match=message):
            read_ids(tmp_path / name)


@pytest.fixture(params=["text", "numbers", "no column", "folder"])
def data(request, tmp_path):
    """Twenty rows in two Parquet files, or of images; the ids of rows 3, 12 and 19."""
    table, ids = image_table(20), [f"s{row:03d}" for row in (3, 12, 19)]
    if request.param == "folder":
        for row, (image, label) in enumerate(zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True)):
            (tmp_path / str(label)).mkdir(exist_ok=True)
            (tmp_path / str(label) / f"{row:03d}.png").write_bytes(image)
        source = open_source(str(tmp_path), ForgetSetConfig())
        return source, [source.read(row, row + 1).ids[0] for row in (3, 12, 19)]
    if request.param != "text":
        table, ids = table.drop_columns("id"), ["3", "12", "19"]
    if request.param == "numbers":
        table = table.append_column("id", pa.array(range(20)))
    for part, start in enumerate((0, 11)):
        pq.write_table(table.slice(start, 11 - 2 * part), tmp_path / f"{part}.parquet", row_group_size=4)
    return open_source(str(tmp_path), ForgetSetConfig()), ids


def test_rows_are_found_by_id_whatever_they_lie_in(data):
    source, ids = data
    assert find_rows(source, [*ids, "nowhere"]) == dict(zip(ids, (3, 12, 19), strict=True))
    part = only_rows(source, [ids[2], ids[0]])
    assert part.read(0, 2).ids == [ids[0], ids[2]], "in the order of the data"
    with pytest.raises(ForgetSetError, match="has no row of 1 of 2 ids"):
        only_rows(source, [ids[0], "nowhere"])
