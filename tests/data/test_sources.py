import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from samples import Pairs, image_table, pairs, tensors, write_images
from torch.utils.data import IterableDataset

from imu_ray.config import ForgetSetConfig
from imu_ray.data import SOURCES, PartSource, Rows, Source, View, draw_rows, open_source
from imu_ray.data.source import UnreadableError
from imu_ray.errors import ForgetSetError

CONFIG = ForgetSetConfig()


def same(rows, table, start, stop):
    part = table.slice(start, stop - start)
    assert rows.ids == part["id"].to_pylist()
    assert rows.labels.tolist() == part["label"].to_pylist()
    assert rows.inputs == part["image"].to_pylist()


def two_files(folder):
    """A table of 40 rows, in two Parquet files."""
    parts = [image_table(20, seed=1), image_table(20, seed=2)]
    for number, part in enumerate(parts):
        pq.write_table(part, folder / f"part-{number}.parquet", row_group_size=7)
    return pa.concat_tables(parts)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 40), (6, 8), (13, 30), (39, 40)])
def test_parquet_row_ranges_cross_files_and_row_groups(tmp_path, start, stop):
    table = two_files(tmp_path)
    source = open_source(tmp_path, CONFIG)
    assert source.num_rows == 40
    same(source.read(start, stop), table, start, stop)


@pytest.mark.parametrize("size", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["files", "table", "dataset", "folder"])
def test_the_blocks_of_a_shard_are_what_reading_them_gives(kind, size, tmp_path):
    given = {"table": image_table(40), "dataset": pairs(40)}.get(kind, tmp_path)
    if kind == "files":
        two_files(tmp_path)
    elif kind == "folder":
        image_folder(tmp_path, ["0", "1"])
    source = open_source(given, CONFIG)
    if size < 1:
        source = PartSource(source, draw_rows(source.num_rows, size, seed=0))
    read = [rows for shard in source.shards(3, 4) for rows in source.read_blocks(shard)]
    wanted = [source.read(start, stop) for shard in source.shards(3, 4) for start, stop in shard.blocks()]
    assert len(read) == -(-source.num_rows // 3)
    assert [rows.ids for rows in read] == [rows.ids for rows in wanted]
    assert [rows.digest() for rows in read] == [rows.digest() for rows in wanted]


def test_a_file_that_lost_rows_since_it_was_opened_is_refused(tmp_path):
    write_images(tmp_path / "set.parquet", 11)
    source = open_source(tmp_path, CONFIG)
    write_images(tmp_path / "set.parquet", 9)
    with pytest.raises(ForgetSetError, match=r"fewer rows than when the run began; expected 11"):
        source.read(6, 11)


def test_shards_are_aligned_runs_of_blocks_that_cover_every_row_once():
    source = open_source(pairs(103), CONFIG)
    shards = source.shards(block_rows=10, blocks_per_shard=4)
    assert [(shard.start, shard.stop) for shard in shards] == [(0, 40), (40, 80), (80, 103)]
    assert list(shards[2].blocks()) == [(80, 90), (90, 100), (100, 103)]


def test_an_arrow_table_and_a_parquet_file_read_alike_and_have_one_fingerprint(tmp_path):
    table = write_images(tmp_path / "set.parquet", 11)
    from_file, from_table = open_source(str(tmp_path / "set.parquet"), CONFIG), open_source(table, CONFIG)
    same(from_table.read(2, 9), table, 2, 9)
    assert from_file.read(2, 9).digest() == from_table.read(2, 9).digest()


def test_the_fingerprint_sees_ids_labels_and_content():
    rows = open_source(pairs(4), CONFIG).read(0, 4)
    base = rows.digest()
    inputs, labels = tensors(4)
    inputs[2, 0, 0, 0] += 1e-6
    assert open_source(Pairs(inputs, labels), CONFIG).read(0, 4).digest() != base
    rows.labels[1] += 1
    assert rows.digest() != base


def test_equal_inputs_are_told_whatever_their_ids_and_labels():
    rows = open_source(pairs(4), CONFIG).read(0, 4)
    again = Rows(["x", "y"], np.array([7, 8]), [rows.inputs[3], View(rows.inputs[3], "flip", 1)])
    assert again.contents[0] == rows.contents[3]
    assert len({*rows.contents, *again.contents}) == 5


def test_arrays_come_from_list_and_tensor_columns():
    numbers = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(numbers)
    for column in (tensor, pa.array(numbers.tolist())):
        read = open_source(pa.table({"image": column, "label": [0, 1, 2]}), CONFIG).read(1, 3)
        np.testing.assert_array_equal(np.stack(read.inputs), numbers[1:])
        assert read.ids == ["1", "2"], "rows without an id column are numbered"


def image_folder(root, folders):
    table = image_table(6)
    for place, name in enumerate(folders):
        (root / name).mkdir(parents=True)
        for row in range(2):
            (root / name / f"{row}.png").write_bytes(table["image"][2 * place + row].as_py())
    return root


def test_a_folder_is_labelled_by_the_listed_classes_or_by_its_index_not_by_its_place_in_the_alphabet(tmp_path):
    named = open_source(image_folder(tmp_path / "named", ["truck"]), ForgetSetConfig(classes=("cat", "dog", "truck")))
    rows = named.read(0, 2)
    assert rows.ids == ["truck/0.png", "truck/1.png"]
    assert rows.labels.tolist() == [2, 2]
    numbered = open_source(image_folder(tmp_path / "numbered", ["4", "10"]), CONFIG)
    assert numbered.read(0, 4).labels.tolist() == [10, 10, 4, 4]


def test_the_fingerprint_of_what_is_missing_or_no_array_of_numbers_is_defined():
    digest = lambda value: Rows(["a"], np.array([0]), [value]).digest()
    odd = [torch.ones(2).bfloat16(), torch.eye(2).to_sparse(), {"a": 1}, [[1], [1, 2]], torch.empty(0)]
    values = [None, np.float32(1), *odd]
    assert len(set(map(digest, values))) == len(values)
    assert digest(torch.ones(2)) == digest(np.ones(2, np.float32))


def test_the_text_of_a_label_is_not_shown():
    table = pa.table({"image": [[1.0]], "label": ["Jane Doe, born 1970"]})
    for config in (CONFIG, ForgetSetConfig(classes=("a", "b"))):
        with pytest.raises(ForgetSetError) as caught:
            open_source(table, config).read(0, 1)
        assert "Jane" not in str(caught.value)


def test_labels_by_name_are_looked_up():
    table = pa.table({"image": [[1.0], [2.0]], "label": ["b", "a"]})
    for given in (table, Odd(lambda row: (1.0, "ba"[row % 2]))):
        assert open_source(given, ForgetSetConfig(classes=("a", "b"))).read(0, 2).labels.tolist() == [1, 0]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


class Odd(Pairs):
    """A Dataset whose rows, or whose length, are what ``make`` gives."""

    def __init__(self, make, *length):
        super().__init__(*tensors(4))
        self.make, self.length = make, length

    def __len__(self):
        return self.make(*self.length) if self.make in (len, int) else super().__len__()

    def __getitem__(self, row):
        return self.make(row)


def twice(name):
    table = image_table(5)
    return table.append_column(name, table[name])


def pipe(path):
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    return path


def image_file(folder, name):
    """A folder of images, and a file among them."""
    (image_folder(folder, ["4"]) / "4" / name).write_text("x")
    return folder


def linked(folder):
    (image_folder(folder, ["4"]) / "5").symlink_to(folder / "4")
    return folder


def mixed(folder):
    write_images(image_folder(folder, ["4"]) / "more.parquet", 3)
    return folder


def broken(folder):
    (folder / "x.parquet").write_text("no")
    return folder


def other_columns(folder):
    write_images(folder / "a.parquet", 3)
    pq.write_table(image_table(3).drop_columns("id"), folder / "b.parquet")
    return folder


BAD = {
    "a missing path": (lambda tmp: tmp / "nowhere.parquet", "nowhere.parquet does not exist"),
    "an empty folder": (lambda tmp: tmp, "holds no file that is read"),
    "an empty table": (lambda tmp: image_table(5).slice(0, 0), "is empty"),
    "an empty Dataset": (lambda tmp: pairs(0), "is empty"),
    "a Dataset without length": (lambda tmp: Stream(), "Stream has no length"),
    "a Dataset without end": (
        lambda tmp: Odd(int, 2**62),
        "Odd says that it has 4611686018427387904 rows; expected at",
    ),
    "a Dataset whose length fails": (lambda tmp: Odd(len), r"Odd cannot be read: TypeError in .*test_sources.py, line"),
    "something else": (lambda tmp: [1, 2], "is a list; expected a path"),
    "two columns of one name": (lambda tmp: twice("image"), "has 2 columns 'image'; it has id, image, label, image"),
    "a missing column": (
        lambda tmp: image_table(5).drop_columns("label"),
        "no column 'label'; .*forget_set.label_column",
    ),
    "a path with a NUL": (lambda tmp: "a\0b", r"'a\\x00b' is not UTF-8, or holds a NUL"),
    "an over-long path": (lambda tmp: "a" * 5000, "a cannot be read: .*File name too long"),
    "a pipe": (lambda tmp: pipe(tmp / "x.parquet"), "x.parquet is a pipe, socket or device"),
    "a pipe named as an image": (
        lambda tmp: pipe(tmp / "4" / "x.png").parents[1],
        "x.png is a pipe, socket, device or",
    ),
    "a name that is not UTF-8": (
        lambda tmp: pipe(tmp / "4" / "\udcff.png").parents[1],
        r"/4/\\udcff.png' is not UTF-8",
    ),
    "no Parquet": (broken, "x.parquet cannot be read: Parquet file size is 2 bytes"),
    "files with other columns": (other_columns, "b.parquet has columns image: binary, label: int64, .*a.parquet has"),
    "named folders and no list": (lambda tmp: image_folder(tmp, ["truck"]), "named truck.*forget_set.classes"),
    "an image of another kind": (lambda tmp: image_file(tmp, "photo.heic"), "photo.heic is no image that is read"),
    "a text among images": (lambda tmp: image_file(tmp, "notes.txt"), "notes.txt is no image that is read"),
    "a linked folder": (linked, "5 is a link to a folder"),
    "files of several kinds": (mixed, r"holds files of several kinds \(ParquetSource, FolderSource\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_opened_is_refused(case, tmp_path):
    make, message = BAD[case]
    with pytest.raises(ForgetSetError, match=message):
        open_source(make(tmp_path), CONFIG)


def test_a_page_that_is_broken_is_refused_by_file_and_may_be_read_again(tmp_path):
    write_images(tmp_path / "x.parquet", 11)
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    content[4:400] = bytes(396)
    source = open_source(tmp_path, CONFIG)
    (tmp_path / "x.parquet").write_bytes(content)
    for read in (lambda: source.read(0, 3), lambda: source.check(5)):
        # Ray runs a task again that ended in an OSError.
        with pytest.raises(UnreadableError, match="x.parquet cannot be read: ") as caught:
            read()
        again = pickle.loads(pickle.dumps(caught.value))
        assert isinstance(again, OSError)
        assert str(again) == str(caught.value)


def test_an_image_that_vanishes_is_refused_by_name(tmp_path):
    source = open_source(image_folder(tmp_path, ["4"]), CONFIG)
    (tmp_path / "4" / "1.png").unlink()
    with pytest.raises(UnreadableError, match="4/1.png cannot be read: .*No such file"):
        source.read(0, 2)


ROWS = {
    "raises": (lambda row: {}["Jane Doe"], r"row 2 of Odd cannot be read: KeyError in .*test_sources.py, line \d+"),
    "ends early": (lambda row: [][row], "row 2 of Odd cannot be read: IndexError"),
    "gives three items": (lambda row: (1, 2, 3), "row 2 of Odd is a tuple; expected an .input, label. pair"),
    "gives a label that is no number": (
        lambda row: (1, torch.eye(3)[0]),
        "row 2 of Odd has label a Tensor; expected a",
    ),
    "gives a label that is not whole": (lambda row: (1, 2.5), "row 2 of Odd has label 2.5"),
    "gives a label beyond 64 bits": (
        lambda row: (1, 2**63),
        f"row 2 of Odd has label {2**63}; expected a whole number",
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_that_a_dataset_does_not_give_is_refused_by_number_without_its_content(case):
    make, message = ROWS[case]
    with pytest.raises(ForgetSetError, match=message) as caught:
        open_source(Odd(make), CONFIG).read(2, 4)
    assert "Jane" not in str(caught.value)


def test_a_registered_kind_of_source_is_opened(monkeypatch):
    class Numbers(Source):
        def __init__(self, given, config, fields=None):
            self.name, self.num_rows = "numbers", given

        @classmethod
        def takes(cls, given):
            return isinstance(given, int)

        def read(self, start, stop):
            return Rows(list(map(str, range(start, stop))), np.zeros(stop - start, np.int64), [None] * (stop - start))

    monkeypatch.setattr("imu_ray.data.opening.SOURCES", (*SOURCES, Numbers))
    assert open_source(7, CONFIG).read(2, 4).ids == ["2", "3"]
    assert open_source(image_table(3), CONFIG).name == "the table"


def column(name, values, kind=None):
    table, values = image_table(5), values if isinstance(values, pa.Array) else pa.array(values, kind)
    return table.set_column(table.schema.get_field_index(name), name, values)


RANGE, CODES = range(5), pa.dictionary(pa.int32(), pa.string())
BAD_KEYS = {
    "ids that are lists": (
        column("id", [[row] for row in RANGE]),
        "column 'id' of .* holds list<.*; expected one text or",
    ),
    "ids that are structs": (column("id", [{"a": row} for row in RANGE]), "column 'id' of .* holds struct<a: int64>"),
    "duplicate ids in a dictionary": (column("id", list("abacd"), CODES), "sample id 'a' stands 2 times"),
    "labels that are structs": (column("label", [{"a": 1}] * 5), "column 'label' of .* holds struct<a: int64>"),
    "labels beyond 64 bits": (column("label", [2**63 + row for row in RANGE], pa.uint64()), f"has label {2**63}"),
    "labels of thousands of digits": (
        column("label", ["9" * 5000] * 5),
        "has label a str; expected a whole number of 64",
    ),
    "duplicate ids": (column("id", ["a", "b", "a", "c", "d"]), "sample id 'a' stands 2 times"),
    "a missing id": (column("id", ["a", None, "b", "c", "d"]), "row 1 of .* has no 'id', as 1 of 5 rows"),
    "a label that is too large": (column("label", [0, 1, 5, 2, 3]), "row 's002' .* has label 5; expected 0 to 4"),
    "a negative label": (column("label", [0, 1, -1, 2, 3]), "row 's002' .* has label -1"),
    "a label that is not whole": (column("label", [0.5, 1, 1, 2, 3]), "has label 0.5; expected a whole number"),
    "a label in a dictionary": (column("label", [0, 1, 9, 2, 3], pa.dictionary(pa.int32(), pa.int64())), "has label 9"),
    "a missing label": (column("label", [0, None, 1, 2, 3]), "has label None"),
}


@pytest.mark.parametrize("case", BAD_KEYS)
@pytest.mark.parametrize("where", ["table", "file"])
def test_bad_ids_and_labels_are_refused_before_any_image_is_read(case, where, tmp_path):
    table, message = BAD_KEYS[case]
    if where == "file":
        pq.write_table(table, tmp_path / "set.parquet")
    with pytest.raises(ForgetSetError, match=message):
        open_source(table if where == "table" else tmp_path / "set.parquet", CONFIG).check(5)


def test_ids_that_are_not_utf8_are_refused():
    broken = pa.Array.from_buffers(pa.string(), 5, pa.array([b"\xff%d" % row for row in range(5)]).buffers())
    with pytest.raises(ForgetSetError, match="the table cannot be read: UnicodeDecodeError in"):
        open_source(column("id", broken), CONFIG).read(0, 1)
