"""Faults of samples, in every source that can have them: the error names file and row, what was expected and a remedy."""

import base64
import io
import json
import tarfile

import datasets
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs
from samples import image_table
from torch.utils.data import Dataset

from imu_ray.config import ForgetSetConfig
from imu_ray.data import open_source, select_rows
from imu_ray.data.source import UnreadableError, reading
from imu_ray.errors import ForgetSetError
from imu_ray.tasks.base import read_batch, reader_of
from imu_ray.tasks.classification import ClassificationTask

COUNT, BAD = 12, 9  # rows, and the one with the fault: in the second file where there are two
ROWS = image_table(COUNT).to_pylist()
IMAGE = f"{ROWS[BAD]['label']}/{ROWS[BAD]['id']}.png"


def halves(rows):
    return {"a": rows[:6], "b": rows[6:]}.items()


def parquet(folder, rows):
    for name, part in halves(rows):
        pq.write_table(pa.Table.from_pylist(part), folder / f"{name}.parquet", row_group_size=4)
    return folder


def lines(folder, rows):
    for name, part in halves(rows):
        text = [{**row, "image": _in_json(row["image"])} if "image" in row else row for row in part]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, text)))
    return folder


def _in_json(image):
    return {"bytes": base64.b64encode(image).decode()} if isinstance(image, bytes) else image


def tars(folder, rows):
    for name, part in halves(rows):
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for row in part:
                for ending, content in (("png", row["image"]), ("cls", str(row["label"]).encode())):
                    member = tarfile.TarInfo(f"{row['id']}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


def images(folder, rows):
    for row in rows:
        (folder / str(row["label"])).mkdir(exist_ok=True)
        (folder / str(row["label"]) / f"{row['id']}.png").write_bytes(row["image"])
    return folder


def saved(folder, rows):
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


class Pairs(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]["image"], self.rows[row]["label"]


# How a source is made of rows, and what an error calls where the row with the fault lies.
SOURCES = {
    "Parquet": (parquet, "{folder}/b.parquet"),
    "JSON lines": (lines, "{folder}/b.jsonl"),
    "tars": (tars, "{folder}/b.tar"),
    "images": (images, "{folder}"),
    "a saved dataset": (saved, "{folder}/saved"),
    "a dataset": (lambda folder, rows: datasets.Dataset.from_list(rows), "the dataset"),
    "pandas": (lambda folder, rows: pandas.DataFrame(rows), "the DataFrame"),
    "polars": (lambda folder, rows: polars.DataFrame(rows), "the DataFrame"),
    "a table": (lambda folder, rows: pa.Table.from_pylist(rows), "the table"),
    "mappings": (lambda folder, rows: rows, "the list"),
    "pairs": (lambda folder, rows: [(row["image"], row["label"]) for row in rows], "the list"),
    "a torch Dataset": (lambda folder, rows: Pairs(rows), "Pairs"),
}
TABLES = ["Parquet", "JSON lines", "a saved dataset", "a dataset", "pandas", "polars", "a table", "mappings"]
CELLS = [*TABLES, "pairs", "a torch Dataset"]
BY_PATH = ["JSON lines", "a saved dataset", "a dataset"]  # where a text is the path of an image


def cell(column, value):
    return lambda rows: [{**row, column: value} if place == BAD else row for place, row in enumerate(rows)]


def every(column, value):
    return lambda rows: [{**row, column: value} for row in rows]


def without(column):
    return lambda rows: [{key: value for key, value in row.items() if key != column} for row in rows]


# What is done to the rows, the sources that can have it, and what the error says, with the remedy at its end.
ROW, FIRST = r"row '?(s00)?9(\.png)?'? of", r"(row|sample) '?(s00)?0'? of"
FAULTS = {
    "an image that breaks off": (cell("image", ROWS[BAD]["image"][:40]), [*CELLS, "tars"], ROW + ".*does not decode .*; mend it, or set"),
    "a missing image": (cell("image", None), CELLS, ROW + ".*the input is missing; .*; mend it, or set"),
    "a label outside the head": (cell("label", 7), [*CELLS, "tars"], ROW + ".* has label 7; expected 0 to 4, .*; mend it, take the row out,"),
    "a folder outside the head": (cell("label", 7), ["images"], "folder '7' of .* has label 7; expected 0 to 4, .*; mend it, take the row"),
    "a missing label": (cell("label", None), CELLS, ROW + ".* has label None; expected a whole number .*; mend it, take the row out,"),
    "text for labels": (every("label", "Jane Doe"), [*CELLS, "tars"], FIRST + ".* has label a str; expected a whole .*forget_set.label_column"),
    "text for images": (every("image", "Jane Doe"), sorted({*CELLS} - {*BY_PATH}), FIRST + ".* is a str, .*image_column.; .*; mend it,"),
    "paths to nothing": (every("image", "no.png"), BY_PATH, "no.png, the image of " + FIRST + ".*No such file .*; mend or remove"),
    "numbers for images": (every("image", 1970), CELLS, FIRST + ".* is one number, .*forget_set.image_column.; .*; mend it, or"),
    "an id twice": (cell("id", "s007"), TABLES, "sample id 's007' stands 2 times in .*; expected unique ids; remove the"),
    "a missing id": (cell("id", None), TABLES, "row 9 of .* has no 'id', as 1 of 12 rows; expected .*; mend it, or name"),
    "lists for ids": (every("id", ["Jane Doe"]), TABLES, "column 'id' of .* holds .*list<.*; expected one text or .*; name another in"),
    "no column of labels": (without("label"), TABLES, "has no column 'label'; it has id, image; name the right one in forget_set.label_c"),
    "an unknown id": (list, SOURCES, r"1 of 1 ids are not in .*\(nobody\); expected all of them; mend the list"),
}  # fmt: skip
OF_ALL = ("lists for ids", "no column of labels", "an unknown id")  # of no single file


def used(given, config):
    """Opened, checked and decoded, as a run does."""
    source = select_rows(open_source(given, config), config)
    source.check(5)
    task = reader_of(ClassificationTask(config, "fc", 5, shape=(1, 6, 6)), source)
    for start in range(0, source.num_rows, 5):
        read_batch(task, source, start, min(start + 5, source.num_rows))


@pytest.mark.parametrize(("fault", "kind"), [(fault, kind) for fault in FAULTS for kind in FAULTS[fault][1]])
def test_a_fault_of_rows_is_told_by_file_row_and_remedy(fault, kind, tmp_path):
    (spoil, _, message), (make, name) = FAULTS[fault], SOURCES[kind]
    config = ForgetSetConfig(image_mode="L", ids=("nobody",) if fault == "an unknown id" else None)
    with pytest.raises(ForgetSetError, match=message) as caught:
        used(make(tmp_path, spoil(ROWS)), config)
    name = name.format(folder=tmp_path)
    if FIRST in message:
        name = name.replace("/b.", "/a.")
    elif fault in OF_ALL and str(tmp_path) in name:
        name = str(tmp_path)
    assert name in str(caught.value)
    assert "Jane" not in str(caught.value)


@pytest.mark.parametrize("kind", SOURCES)
def test_rows_without_a_fault_are_used(kind, tmp_path):
    used(SOURCES[kind][0](tmp_path, ROWS), ForgetSetConfig(image_mode="L"))


def cut(name, size):
    """Takes so many bytes from the end of a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-size])


def blank(name):
    """Makes zeros of a file's first pages."""
    return lambda folder: (folder / name).write_bytes(b"PAR1" + bytes(500) + (folder / name).read_bytes()[504:])


# Of what source, what is done to a file, and before or after it is opened.
BROKEN = {
    "Parquet": (cut("b.parquet", 20), r"b\.parquet cannot be read: .*; expected .*; mend or remove what is not$"),
    "JSON lines": (cut("b.jsonl", 9), r"b\.jsonl cannot be read: JSON parse error.*; expected .*; mend or remove what is not$"),
    "tars": (cut("b.tar", 12000), r"b\.tar (breaks off, or is damaged|cannot be read).*; expected .*; (copy or write|mend or remove)"),
    "a saved dataset": (cut("saved/data-00000-of-00001.arrow", 900), "saved cannot be read: .*; expected .*; mend or remove what is not$"),
}  # fmt: skip
CHANGED = {
    "Parquet": (blank("b.parquet"), r"b\.parquet cannot be read: .*; expected .*; mend or remove what is not$"),
    "tars": (cut("b.tar", 12000), r"b\.tar cannot be read: it ends .*; expected .*; mend or remove what is not$"),
    "images": (lambda folder: (folder / IMAGE).unlink(), rf"{IMAGE} cannot be read: .*No such file.*; mend or remove what is not$"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_breaks_off_is_told(kind, tmp_path):
    spoil, message = BROKEN[kind]
    given = SOURCES[kind][0](tmp_path, ROWS)
    spoil(tmp_path)
    with pytest.raises(ForgetSetError, match=message):
        used(given, ForgetSetConfig(image_mode="L"))


@pytest.mark.parametrize("kind", CHANGED)
def test_a_file_that_changes_after_it_was_opened_is_told(kind, tmp_path):
    spoil, message = CHANGED[kind]
    source = open_source(SOURCES[kind][0](tmp_path, ROWS), ForgetSetConfig())
    spoil(tmp_path)
    with pytest.raises(ForgetSetError, match=message):
        source.read(0, COUNT)


def test_a_store_that_is_not_reached_is_told_with_a_remedy_of_its_own():
    remote = fs.SubTreeFileSystem("/", fs.LocalFileSystem())
    message = (
        "bucket/b.parquet cannot be read: AWS Error .*; mend or remove .*, or check the address, the credentials and"
    )
    with pytest.raises(UnreadableError, match=message), reading("bucket/b.parquet", remote):
        raise OSError("AWS Error NETWORK_CONNECTION during HeadObject operation")
