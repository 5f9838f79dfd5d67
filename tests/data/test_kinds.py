"""Sources of every kind: the same samples are read alike, and what each may have wrong is told by file and row."""

import base64
import io
import json
import pickle
import tarfile

import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data as ray_data
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow
from samples import SMALL, image_table, paper

from imu_ray import ConfigError, ForgetSetError, score
from imu_ray.config import ForgetSetConfig
from imu_ray.data import open_source, select_rows

COUNT = 12
TABLE = image_table(COUNT)
IDS, IMAGES, LABELS = (TABLE[name].to_pylist() for name in ("id", "image", "label"))
PIXELS = [np.array(Pillow.open(io.BytesIO(content)), np.float32)[None] / 255 for content in IMAGES]
CONFIG = ForgetSetConfig(image_mode="L")


def nested(places=range(COUNT)):
    """Hugging Face's layout: a struct of bytes and path."""
    cells = [{"bytes": IMAGES[row], "path": f"{row}.png"} for row in places]
    return pa.table({"id": [IDS[row] for row in places], "image": cells, "label": [LABELS[row] for row in places]})


def lines(folder, image):
    """JSON lines whose images are what ``image`` says of a row."""
    rows = [{"id": IDS[row], "image": image(row), "label": LABELS[row]} for row in range(COUNT)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def add(archive, name, content, **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in attributes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def tar(path, rows=range(COUNT), labels="cls", image=lambda row: ("png", IMAGES[row])):
    with tarfile.open(path, "w") as archive:
        for row in rows:
            ending, content = image(row)
            add(archive, f"{IDS[row]}.{ending}", content)
            label = str(LABELS[row]) if labels == "cls" else json.dumps({"label": LABELS[row], "name": f"n{row}"})
            add(archive, f"{IDS[row]}.{labels}", label.encode())
    return path


def saved_array(numbers):
    content = io.BytesIO()
    np.save(content, numbers)
    return content.getvalue()


def parquet(folder, table):
    pq.write_table(table, folder / "rows.parquet", row_group_size=5)
    return folder / "rows.parquet"


def write_all(folder, names):
    for row in range(COUNT):
        (folder / names(row)).parent.mkdir(parents=True, exist_ok=True)
        (folder / names(row)).write_bytes(IMAGES[row])


def by_path(folder):
    write_all(folder, lambda row: f"images/{row}.png")
    return lines(folder, lambda row: f"images/{row}.png")


def two_tars(folder):
    tar(folder / "a.tar", range(7))
    tar(folder / "b.tar", range(7, COUNT), labels="json")
    return folder


def hugging_face():
    features = Features({"id": Value("string"), "image": Image(), "label": Value("int64")})
    return Dataset.from_dict(nested().to_pydict(), features=features)


def saved(folder):
    hugging_face().save_to_disk(folder / "saved")
    return folder / "saved"


def shuffled_back():
    """A dataset whose rows stand in another order than its Arrow table's."""
    order = np.random.default_rng(0).permutation(COUNT)
    return Dataset(nested(order)).select(np.argsort(order))


def of_files(folder):
    """A dataset that names image files."""
    write_all(folder, lambda row: f"{row}.png")
    cells = {"id": IDS, "image": [{"bytes": None, "path": str(folder / f"{row}.png")} for row in range(COUNT)]}
    return Dataset.from_dict({**cells, "label": LABELS})


ENCODED = {
    "a table": lambda folder: TABLE,
    "Parquet": lambda folder: parquet(folder, TABLE),
    "nested Parquet": lambda folder: parquet(folder, nested()),
    "pandas": lambda folder: pandas.DataFrame({"id": IDS, "image": IMAGES, "label": LABELS}),
    "polars": lambda folder: polars.DataFrame({"id": IDS, "image": IMAGES, "label": LABELS}),
    "a list of mappings": lambda folder: TABLE.to_pylist(),
    "JSON lines by path": by_path,
    "JSON lines in base64": lambda folder: lines(folder, lambda row: {"bytes": base64.b64encode(IMAGES[row]).decode()}),
    "JSON lines of data URIs": lambda folder: lines(
        folder, lambda row: f"data:image/png;base64,{base64.b64encode(IMAGES[row]).decode()}"
    ),
    "a tar": lambda folder: tar(folder / "rows.tar"),
    "two tars": two_tars,
    "a dataset of Hugging Face's": lambda folder: hugging_face(),
    "a saved one": saved,
    "one in another order": lambda folder: shuffled_back(),
    "one that names files": of_files,
    "a Dataset of Ray Data": lambda folder: ray_data.from_arrow([TABLE.slice(0, 7), TABLE.slice(7)]).materialize(),
    "one of pandas' blocks": lambda folder: ray_data.from_pandas(TABLE.to_pandas()).materialize(),
    "one that is not executed yet": lambda folder: ray_data.read_parquet(str(parquet(folder, TABLE))),
}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", ENCODED)
def test_the_same_samples_have_one_fingerprint_whatever_they_are_read_from(kind, tmp_path):
    source = open_source(ENCODED[kind](tmp_path), CONFIG)
    source.check(5)
    source = pickle.loads(pickle.dumps(source))
    wanted = open_source(TABLE, CONFIG)
    assert source.num_rows == COUNT
    assert source.read(0, COUNT).digest() == wanted.read(0, COUNT).digest()
    assert source.read(3, 8).digest() == wanted.read(3, 8).digest()
    assert source.take(np.array([1, 4, 11])).digest() == wanted.take(np.array([1, 4, 11])).digest()
    named = ForgetSetConfig(ids=("s009", "s002"))
    found = select_rows(source, named)
    assert found.read(0, 2).digest() == wanted.take(np.array([2, 9])).digest()


def tensors_of_ray_data(folder):
    """Tensors in the type that Ray Data has for them."""
    rows = [{"id": IDS[row], "image": PIXELS[row], "label": LABELS[row]} for row in range(COUNT)]
    return ray_data.from_items(rows, override_num_blocks=2).materialize()


NUMBERS = {
    "tensors of Ray Data": tensors_of_ray_data,
    "a tensor column": lambda folder: numbers(pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(PIXELS))),
    "lists": lambda folder: numbers([one.tolist() for one in PIXELS]),
    "fixed-size lists": lambda folder: parquet(folder, numbers(fixed(PIXELS))),
    "encoded arrays": lambda folder: parquet(folder, numbers([saved_array(one) for one in PIXELS])),
    "JSON lines": lambda folder: lines(folder, lambda row: PIXELS[row].tolist()),
    "a tar of arrays": lambda folder: tar(folder / "rows.tar", image=lambda row: ("npy", saved_array(PIXELS[row]))),
    "pairs of arrays": lambda folder: list(zip(PIXELS, LABELS, strict=True)),
    "pairs of tensors": lambda folder: [
        (torch.from_numpy(one), torch.tensor(y)) for one, y in zip(PIXELS, LABELS, strict=True)
    ],
    "pairs of images": lambda folder: [(Pillow.open(io.BytesIO(x)), y) for x, y in zip(IMAGES, LABELS, strict=True)],
    "pairs of bytes": lambda folder: list(zip(IMAGES, LABELS, strict=True)),
}


def numbers(column):
    return pa.table({"id": IDS, "image": column, "label": LABELS})


def fixed(arrays):
    """Lists of lists of lists, each of a fixed size."""
    column = pa.array(np.stack(arrays).reshape(-1))
    for size in arrays[0].shape[::-1]:
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 5))


@pytest.fixture(scope="module")
def wanted(ray_cluster):
    return score(net(), TABLE, config=paper(SMALL, forget_set__image_mode="L"))


@pytest.mark.parametrize("kind", [*ENCODED, *NUMBERS])
def test_the_same_pixels_have_the_same_scores_to_the_bit(kind, wanted, tmp_path):
    given = (ENCODED | NUMBERS)[kind](tmp_path)
    found = score(net(), given, config=paper(SMALL, forget_set__image_mode="L"))
    assert found.drop_columns("sample_id").equals(wanted.drop_columns("sample_id"))
    assert found["sample_id"].to_pylist() == (list(map(str, range(COUNT))) if "pairs" in kind else IDS)


def test_rows_in_another_order_have_the_same_scores_to_rounding(wanted):
    order = np.random.default_rng(1).permutation(COUNT)
    found = score(net(), TABLE.take(order), config=paper(SMALL, forget_set__image_mode="L"))
    assert found["sample_id"].to_pylist() == [IDS[row] for row in order]
    scale = np.abs(wanted["influence"]).max()
    # Sums in float64 of features in float32: 1e-6 is ten units in the last place of the latter.
    np.testing.assert_allclose(found["influence"], wanted["influence"].to_numpy()[order], atol=1e-6 * scale, rtol=0)


def test_a_field_of_a_column_of_structs_is_read_alone():
    table = pa.table(
        {
            "about": [{"key": i, "y": y, "more": "x"} for i, y in zip(IDS, LABELS, strict=True)],
            "image": nested()["image"],
        }
    )
    config = ForgetSetConfig(id_column="about.key", label_column="about.y", image_column="image.bytes")
    source = open_source(table, config)
    source.check(5)
    assert source.read(0, COUNT).digest() == open_source(TABLE, CONFIG).read(0, COUNT).digest()


def test_nested_ids_are_pruned_and_found(tmp_path):
    table = pa.table({"about": [{"key": i} for i in IDS], "image": IMAGES, "label": LABELS})
    config = ForgetSetConfig(id_column="about.key", ids=("s003", "s010"))
    source = select_rows(open_source(parquet(tmp_path, table), config), config)
    assert source.read(0, 2).ids == ["s003", "s010"]
    with pytest.raises(ForgetSetError, match="no column 'about.kee'; it has about, image, label"):
        open_source(table, ForgetSetConfig(id_column="about.kee"))


def test_an_id_and_a_label_of_a_tar_may_be_fields_of_its_json(tmp_path):
    source = open_source(tar(tmp_path / "x.tar", labels="json"), ForgetSetConfig(id_column="name"))
    assert source.read(0, 2).ids == ["n0", "n1"]


def test_one_of_two_images_of_a_sample_is_named_by_its_ending(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for ending, content in (("mask.png", b"m"), ("png", IMAGES[0]), ("jpg", b"x"), ("cls", b"3")):
            add(archive, f"folder.d/one.{ending}", content)
    source = open_source(tmp_path / "x.tar", ForgetSetConfig(image_column="png"))
    assert (source.read(0, 1).ids, source.read(0, 1).inputs) == (["folder.d/one"], [IMAGES[0]])
    with pytest.raises(
        ForgetSetError, match="sample 'folder.d/one' of .* has images png, jpg among mask.png, png, jpg"
    ):
        open_source(tmp_path / "x.tar", CONFIG)


def members(*given, cut=0):
    """Writes an archive of these members, with so many bytes taken from its end."""

    def write(folder):
        with tarfile.open(folder / "x.tar", "w") as archive:
            for name, content, attributes in given:
                add(archive, name, content, **attributes)
        content = (folder / "x.tar").read_bytes()
        (folder / "x.tar").write_bytes(content[: len(content) - cut] if cut else content)
        return folder / "x.tar"

    return write


def member(name, content=b"1", **attributes):
    return name, content, attributes


PICTURE, NUMBER = member("a.png", b"x" * 700), member("a.cls")
FAULTS = {
    "a tar that is cut in a sample": (members(PICTURE, NUMBER, cut=10240 - 1024), "x.tar (cannot be read|breaks off)"),
    "a tar without its end": (members(PICTURE, NUMBER, cut=10240 - 3 * 512 - 2 * 512), "x.tar breaks off, or is damaged, 2560"),
    "no tar": (lambda folder: write(folder / "x.tar", b"no" * 600), "x.tar cannot be read: ReadError|x.tar breaks off"),
    "a packed tar": (lambda folder: write(folder / "x.tar.gz", b"x"), "x.tar.gz is compressed, .*unpack it to .tar"),
    "a pickle": (members(PICTURE, NUMBER, member("a.extra.PKL")), "'a.extra.PKL' in .*x.tar is a pickle, which runs code"),
    "a name that leads up": (members(member("x/../../a.png")), "'x/../../a.png' leads out of .*x.tar"),
    "a name from the root": (members(member("/etc/a.png")), "'/etc/a.png' leads out of .*x.tar"),
    "a link": (members(member("a.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")), "'a.png' in .* is a link or"),
    "a name without an ending": (members(member("README")), "'README' in .*x.tar has no ending; expected names such as"),
    "a sample without an image": (members(NUMBER), "sample 'a' of .*x.tar has no image among cls"),
    "a sample without a label": (members(PICTURE), "sample 'a' of .*x.tar has no a.cls, and no 'label' in a.json"),
    "a label that is none": (members(PICTURE, member("a.cls", b"Jane")), "sample 'a' of .*x.tar has label a str; expected"),
    "JSON that is none": (members(PICTURE, member("a.json", b"{")), "a.json of .*x.tar is no JSON object"),
    "a file that stands twice": (members(PICTURE, PICTURE, NUMBER), "'a.png' stands twice in .*x.tar"),
    "a sample that comes again": (
        members(PICTURE, NUMBER, member("b.png"), member("b.cls"), PICTURE, NUMBER),
        "sample id 'a' stands more than once in .*x.tar; expected unique ids",
    ),
    "a label outside the head in a tar": (members(PICTURE, member("a.cls", b"5")), "row 'a' of .*x.tar has label 5; expected 0"),
    "a path that leads out": (lambda folder: lines(folder, lambda row: "../x.png"), r"row 's000' of .*rows.jsonl names '../x.png', outside"),
    "a path from the root": (lambda folder: lines(folder, lambda row: "/etc/passwd"), "names '/etc/passwd', outside of"),
    "a path to nothing": (lambda folder: lines(folder, lambda row: "no.png"), "no.png, the image of row 's000' of .*rows.jsonl, cannot be read"),
    "JSON lines that break off": (lambda folder: write(folder / "x.jsonl", b'{"id": 1}\n{"id"'), "x.jsonl cannot be read: JSON parse error"),
    "JSON lines of several types": (
        lambda folder: write(folder / "x.jsonl", b'{"image": 1, "label": 1}\n{"image": 1, "label": [2]}'),
        "x.jsonl cannot be read: JSON parse error: .*row 1",
    ),
    "Parquet that breaks off": (lambda folder: write(folder / "x.parquet", parquet(folder, TABLE).read_bytes()[:-20]), "x.parquet cannot be read"),
    "a group of datasets": (lambda folder: DatasetDict(train=hugging_face(), test=hugging_face()), "is a DatasetDict of train, test; expected one"),
    "a saved group": (lambda folder: save_two(folder), "saved is a DatasetDict of train, test; expected one Dataset"),
    "a streamed dataset": (lambda folder: hugging_face().to_iterable_dataset(), "is a IterableDataset; expected"),
    "a dataset without the column": (lambda folder: hugging_face().remove_columns("label"), "the dataset has no column 'label'"),
    "a pair of three": (lambda folder: [(1, 2), (1, 2, 3)], "row 1 of the list is a tuple; expected an .input, label. pair"),
    "a label of a pair that is none": (lambda folder: [(b"x", 1), (b"x", 1.5)], "row 1 of the list has label 1.5; expected a whole"),
    "a column of labels of another type": (lambda folder: TABLE.set_column(2, "label", pa.array([0.5] * COUNT)), "has label 0.5; expected a whole"),
}  # fmt: skip


def write(path, content):
    for other in path.parent.iterdir():
        other.unlink()
    path.write_bytes(content)
    return path


def used(given):
    """Opened, checked and read."""
    source = open_source(given, CONFIG)
    source.check(5)
    source.read(0, source.num_rows)


def save_two(folder):
    DatasetDict(train=hugging_face(), test=hugging_face()).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_wrong_with_a_source_is_told_by_file_and_row_without_its_content(case, tmp_path):
    make, message = FAULTS[case]
    given = make(tmp_path)
    with pytest.raises(ForgetSetError, match=message) as caught:
        used(given)
    assert "Jane" not in str(caught.value)


def test_an_archive_that_changed_is_refused_where_it_is_read(tmp_path):
    source = open_source(tar(tmp_path / "x.tar"), CONFIG)
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:3000])
    with pytest.raises(ForgetSetError, match="x.tar cannot be read: it ends .* bytes before a sample does"):
        source.read(0, COUNT)


def test_the_extra_of_a_saved_dataset_is_named(tmp_path, monkeypatch):
    folder = saved(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        ConfigError, match=r"saved by Hugging Face's datasets; expected the extra: pip install imu-ray\[hf\]"
    ):
        open_source(folder, CONFIG)
