"""Rows by reference and by condition: those that are named are found, they alone are read, and the record says so."""

import hashlib
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from architectures import named
from samples import SMALL, image_table, pairs, paper

from imu_ray import score
from imu_ray.config import ForgetSetConfig
from imu_ray.data import PartSource, open_source, select_rows
from imu_ray.errors import ConfigError, ForgetSetError

COUNT = 40


def selected(given, **settings):
    config = ForgetSetConfig(**settings)
    return select_rows(open_source(given, config), config)


def everything(source):
    return source.read(0, source.num_rows)


@pytest.fixture
def table():
    """Ids rise with the row, and a column that no task reads."""
    rows = image_table(COUNT)
    return rows.append_column("site", pa.array(["xyz"[row % 3] for row in range(COUNT)]))


@pytest.fixture
def files(table, tmp_path):
    """Two files with groups of 5 rows: numbers 0 to 3 in the first, 0 to 3 in the second."""
    (tmp_path / "data").mkdir()
    for number in range(2):
        pq.write_table(table.slice(20 * number, 20), tmp_path / "data" / f"{number}.parquet", row_group_size=5)
    return tmp_path / "data"


@pytest.fixture
def groups_read(monkeypatch):
    """(rows of the file, group, columns) of every row group that is decoded, as it happens."""
    read, whole, batches = [], pq.ParquetFile.read_row_group, pq.ParquetFile.iter_batches

    def read_row_group(file, group, columns=None, **options):
        read.append((group, tuple(columns)))
        return whole(file, group, columns=columns, **options)

    def iter_batches(file, *arguments, row_groups=None, columns=None, **options):
        read.extend((group, tuple(columns)) for group in row_groups)
        return batches(file, *arguments, row_groups=row_groups, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    return read


def test_of_files_only_the_row_groups_of_named_rows_are_read(files, groups_read):
    source = selected(files, ids=["s001", "s004", "s033"])
    assert groups_read == [(0, ("id",)), (2, ("id",))], "the statistics of the others rule the ids out"
    groups_read.clear()
    source.check(5)
    assert groups_read == [(0, ("label", "id")), (2, ("label", "id"))]
    groups_read.clear()
    rows = [block for shard in source.shards(2, 4) for block in source.read_blocks(shard)]
    assert groups_read == [(0, ("image", "label", "id")), (2, ("image", "label", "id"))], "once for a shard"
    assert [block.ids for block in rows] == [["s001", "s004"], ["s033"]]


def test_of_files_only_the_row_groups_that_may_meet_a_condition_are_read(files, table, groups_read):
    label = table["label"].to_pylist()
    source = selected(files, where="id >= 's033' and site == 'x' and id < 's039'")
    assert groups_read == [(2, ("id", "site")), (3, ("id", "site"))]
    assert everything(source).ids == ["s033", "s036"]
    assert everything(source).labels.tolist() == [label[33], label[36]]


def test_ids_that_are_numbers_are_compared_as_numbers(table, tmp_path, groups_read):
    numbered = table.set_column(0, "id", pa.array(range(COUNT), pa.int32()))
    pq.write_table(numbered, tmp_path / "x.parquet", row_group_size=5)
    source = selected(tmp_path / "x.parquet", ids=[9, 38])  # as texts 9 comes after 38
    assert [group for group, _ in groups_read] == [1, 7]
    assert everything(source).ids == ["9", "38"]
    with pytest.raises(ForgetSetError, match="1 of 2 ids are not in .* .09"):
        selected(tmp_path / "x.parquet", ids=["09", "9"])


@pytest.mark.parametrize("size", [None, 0.5])
def test_named_rows_are_what_a_file_with_only_them_is(files, table, size, tmp_path):
    places = [2, 3, 17, 21, 30, 39]
    pq.write_table(table.take(places), tmp_path / "alone.parquet")
    alone = open_source(tmp_path / "alone.parquet", ForgetSetConfig())
    source = selected(files, ids=[f"s{place:03d}" for place in places])
    if size is not None:
        alone, source = (PartSource(whole, np.array([1, 4])) for whole in (alone, source))
    assert everything(source).digest() == everything(alone).digest()
    assert source.rows_given == alone.rows_given
    assert source.positions(0, source.num_rows).tolist() == alone.positions(0, alone.num_rows).tolist()


@pytest.mark.parametrize("kind", ["files", "table", "json lines", "dataset", "folder"])
def test_rows_are_named_in_every_source_and_read_alone(kind, files, table, tmp_path):
    names = {"dataset": ["7", "31"], "folder": ["0/a.png", "1/a.png"]}.get(kind, ["s007", "s031"])
    given = {"files": files, "table": table, "dataset": pairs(COUNT)}.get(kind, tmp_path / "given")
    if kind == "json lines":
        given = tmp_path / "given.jsonl"
        rows = [{"id": f"s{row:03d}", "image": [float(row)], "label": row % 3} for row in range(COUNT)]
        given.write_text("\n".join(map(json.dumps, rows)))
    if kind == "folder":
        for folder in "012":
            (given / folder).mkdir(parents=True)
            for row, name in enumerate("ab"):
                (given / folder / f"{name}.png").write_bytes(table["image"][row].as_py())
    source = selected(given, ids=names)
    whole = open_source(given, ForgetSetConfig())
    rows = everything(whole)
    wanted = rows.pick(np.array([row for row, sample_id in enumerate(rows.ids) if sample_id in names]))
    if kind == "folder":
        (given / "2" / "a.png").unlink()  # between two others, and not named
    assert everything(pickle.loads(pickle.dumps(source))).digest() == wanted.digest()
    assert source.selection.rows_searched == whole.num_rows


def test_a_narrowed_table_travels_without_the_other_rows(table):
    whole = len(pickle.dumps(open_source(table, ForgetSetConfig())))
    assert len(pickle.dumps(selected(table, ids=["s003"]))) < whole / 3
    assert selected(table, where="site == 'x'").source.table.column_names == ["image", "label", "id"]


def test_rows_without_ids_are_named_by_number_and_keep_it(table):
    source = selected(table.drop_columns("id"), ids=["30", "2"])
    assert everything(source).ids == ["2", "30"]
    with pytest.raises(ForgetSetError, match="numbered from 0 for want of forget_set.id_column .s002"):
        selected(table.drop_columns("id"), ids=["s002"])


LISTS = {
    "ids.txt": "s031\n\n  s007 \ns007\n",
    "marked.txt": "\ufeffs007\ns031\ns031\n",
    "ids.csv": "who,id\nJane,s007\nJoe,s031\nJoe,s031\n",
    "named.csv": '"sample"\n"s031"\ns007\ns007\n',
}


@pytest.mark.parametrize("kind", [*LISTS, "ids.parquet", "one.parquet", "a list", "a tuple"])
def test_a_list_of_ids_gives_the_same_rows_in_any_form_and_order_and_doubles_are_counted(kind, table, tmp_path):
    given, ids = tmp_path / kind, ["s031", "s007", "s031"]
    if kind in LISTS:
        given.write_text(LISTS[kind])
    elif kind == "ids.parquet":
        pq.write_table(pa.table({"x": [1, 2, 3], "id": pa.array(ids).dictionary_encode()}), given)
    elif kind == "one.parquet":
        pq.write_table(pa.table({"customer": ids}), given)
    else:
        given = ids if kind == "a list" else tuple(ids)
    rows = table.rename_columns({"id": "sample"}) if kind == "named.csv" else table
    settings = {"id_column": "sample"} if kind == "named.csv" else {}
    source = selected(rows, ids=given if isinstance(given, list | tuple) else str(given), **settings)
    assert everything(source).ids == ["s007", "s031"]
    found = source.selection
    assert (found.ids_asked, found.ids_doubled, found.ids_missing, found.rows_found) == (2, 1, 0, 2)
    assert found.ids_digest == selected(table, ids=["s007", "s031"]).selection.ids_digest
    assert found.ids_digest != selected(table, ids=["s007", "s030"]).selection.ids_digest
    assert "s007" not in found.model_dump_json()


def test_cells_of_a_csv_are_texts(table, tmp_path):
    (tmp_path / "ids.csv").write_text("id\n0010\nNA\n")
    rows = pa.table({"id": ["0010", "10", "NA"], "image": [[1.0]] * 3, "label": [0, 1, 2]})
    assert everything(selected(rows, ids=str(tmp_path / "ids.csv"))).ids == ["0010", "NA"]


def test_missing_ids_are_refused_by_name_and_number_or_left_out_and_counted(table):
    asked = ["s003", *(f"gone-{row}" for row in range(7))]
    with pytest.raises(ForgetSetError) as caught:
        selected(table, ids=asked)
    assert str(caught.value) == (
        "7 of 8 ids are not in the table (gone-0, gone-1, gone-2, gone-3, gone-4, ...); expected all of them; mend the "
        "list, or set forget_set.missing_ids=ignore to forget the others"
    )
    source = selected(table, ids=asked, missing_ids="ignore")
    assert everything(source).ids == ["s003"]
    assert (source.selection.ids_asked, source.selection.ids_missing) == (8, 7)
    with pytest.raises(ForgetSetError, match="7 of 7 ids are not in the table .*expected one at least; mend the list$"):
        selected(table, ids=asked[1:], missing_ids="ignore")


def test_of_the_other_rows_neither_labels_nor_ids_are_checked(table):
    labels = table["label"].to_pylist()
    labels[5] = 99
    ids = table["id"].to_pylist()
    ids[8] = ids[9]
    broken = table.set_column(2, "label", pa.array(labels)).set_column(0, "id", pa.array(ids))
    selected(broken, ids=["s001", "s002"]).check(5)
    with pytest.raises(ForgetSetError, match="row 's005' of the table has label 99; expected 0 to 4"):
        selected(broken, ids=["s005"]).check(5)
    with pytest.raises(ForgetSetError, match="sample id 's009' stands in rows 8 and 9 of the table; expected unique"):
        selected(broken, ids=["s001", "s009"])


BAD_LISTS = {
    "a list that is not there": (None, "list of ids .*ids.txt does not exist"),
    "an empty list": ("", "list of ids .*ids.txt is empty; expected at least one"),
    "a table without such a column": (pa.table({"a": ["x"], "b": ["y"]}), "has the columns a, b; expected one that is"),
    "a row without an id": (pa.table({"id": ["s001", None]}), "row 1 of the list of ids .* has no id"),
    "no Parquet": ("PAR", "list of ids .*ids.parquet cannot be read: "),
    "a CSV without a first line": (
        "s001\ns002\n",
        "has the columns s001; expected one that is named 'id' in its first",
    ),
    "a CSV with an empty cell": ('id,x\ns001,1\n"",2\n', "row 1 of the list of ids .*ids.csv has no id"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_list_that_cannot_be_read_is_refused_by_file_and_row(case, table, tmp_path):
    content, message = BAD_LISTS[case]
    kind = "parquet" if "Parquet" in case or isinstance(content, pa.Table) else "csv" if "CSV" in case else "txt"
    path = tmp_path / f"ids.{kind}"
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(ForgetSetError, match=message):
        selected(table, ids=str(path))


def test_a_condition_or_ids_not_both_and_not_where_there_are_no_columns(table):
    with pytest.raises(ConfigError, match="forget_set.ids and forget_set.where are both set; expected one"):
        selected(table, ids=["s001"], where="label == 1")
    with pytest.raises(
        ForgetSetError, match="Pairs has no columns that can be asked; .*name the rows in forget_set.ids"
    ):
        selected(pairs(4), where="label == 1")
    with pytest.raises(ForgetSetError, match="no row of the table meets forget_set.where 'label == 7'; expected one"):
        selected(table, where="label == 7")


def test_a_list_in_a_bucket_names_rows_in_a_bucket(table, s3_uri, monkeypatch):
    from pyarrow import fs

    bucket, path = fs.FileSystem.from_uri(s3_uri)
    for name, write in (
        ("ids.txt", lambda file: file.write(b"s002\ns020\n")),
        ("data.parquet", lambda file: pq.write_table(table, file)),
    ):
        with bucket.open_output_stream(f"{path}/{name}") as file:
            write(file)
    base, _, options = s3_uri.partition("?")
    source = selected(f"{base}/data.parquet?{options}", ids=f"{base}/ids.txt?{options}")
    assert everything(source).ids == ["s002", "s020"]


@pytest.mark.usefixtures("ray_cluster")
def test_the_record_says_what_was_asked_and_found_and_no_id(tmp_path):
    ids = [f"person-{row}" for row in range(20)]
    inputs = np.random.default_rng(0).normal(size=(20, 36)).reshape(20, 1, 6, 6)
    table = pa.table({"id": ids, "image": inputs.tolist(), "label": [row % 5 for row in range(20)]})
    settings = {"forget_set.ids": [*ids[3:12], "person-99", ids[4]], "forget_set.missing_ids": "ignore"}
    score(named("heads.head"), table, config=paper(SMALL | settings), run_dir=tmp_path / "run")
    text = (tmp_path / "run" / "manifest.json").read_text()
    found = json.loads(text)["forget_set"]["selection"]
    listed = "".join(f"{len(one)}:{one}" for one in sorted([*ids[3:12], "person-99"]))
    assert found == {
        "rows_searched": 20, "rows_found": 9, "ids_asked": 10, "ids_doubled": 1, "ids_missing": 1, "where": None,
        "ids_digest": hashlib.sha256(listed.encode()).hexdigest(),
    }  # fmt: skip
    assert "person-" not in text
