"""docs/data.md: every example runs, and gives the scores of the same digits."""

import io
import json
import re
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from imu_ray.demo import digits, digits_cnn, write_digits

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory, ray_cluster):
    """What the page's code defines, after it has run beside the files that it names."""
    folder = tmp_path_factory.mktemp("data")
    write_files(folder)
    defined = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
            exec(block, defined)
    return defined


def write_files(folder):
    labels = digits()[1]
    (folder / "demo").mkdir()
    torch.manual_seed(0)
    save_file(digits_cnn().state_dict(), folder / "demo" / "original.safetensors")
    few = np.flatnonzero(np.isin(labels, (3, 8)))[:30]
    write_digits(folder / "digits.parquet", few)
    whole = pq.read_table(write_digits(folder / "all_digits.parquet", np.arange(int(few[-1]) + 1)))
    sites = pa.array(["x" if row % 7 == 0 else "y" for row in range(len(whole))])
    pq.write_table(whole.append_column("site", sites), folder / "all_digits.parquet", row_group_size=16)
    other = whole.rename_columns({"id": "name", "image": "png"})
    pq.write_table(other, folder / "other.parquet")
    ids = [f"digit-{row:04d}" for row in few[::-1]]
    rows = pq.read_table(folder / "digits.parquet").to_pylist()
    write_elsewhere(folder, rows)
    for name, label in (("soft", shares), ("several", flags)):
        labelled = [{**row, "label": label(row["label"])} for row in rows]
        pq.write_table(pa.Table.from_pylist(labelled), folder / f"{name}.parquet")
    (folder / "deletions.csv").write_text("\n".join(["id", *ids]))


def shares(digit):
    return [0.9 if each == digit else 0.05 if each < 2 else 0.0 for each in range(10)]


def flags(digit):
    return [int(digit == 0), digit % 2, *(int(each == digit) for each in range(2, 10))]


def write_elsewhere(folder, rows):
    """The digits once more, in other forms."""
    with tarfile.open(folder / "digits.tar", "w") as archive:
        for row in rows:
            for ending, content in (("png", row["image"]), ("cls", str(row["label"]).encode())):
                member = tarfile.TarInfo(f"{row['id']}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    lines = []
    for row in rows:
        for place in (
            folder / "images" / f"{row['id']}.png",
            folder / "digits" / str(row["label"]) / f"{row['id']}.png",
        ):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(row["image"])
        lines.append(json.dumps({**row, "image": f"images/{row['id']}.png"}))
    (folder / "digits.jsonl").write_text("\n".join(lines))
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved_digits")
    nested = [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows]
    pq.write_table(pa.Table.from_pylist(nested), folder / "nested.parquet")


@pytest.mark.parametrize("kind", ["tar", "lines", "saved", "dataset", "pandas", "polars", "bytes", "ray"])
def test_the_same_digits_have_the_same_scores_whatever_they_are_read_from(kind, page):
    assert page[f"of_{kind}"].equals(page["scores"])


def test_pairs_are_numbered_and_a_folder_is_in_the_order_of_its_paths(page):
    wanted = page["scores"]
    assert page["of_pairs"].drop_columns("sample_id").equals(wanted.drop_columns("sample_id"))
    order = sorted(range(30), key=lambda row: (wanted["label"][row].as_py(), wanted["sample_id"][row].as_py()))
    found = page["of_folder"]
    assert found["label"].to_pylist() == wanted["label"].take(order).to_pylist()
    np.testing.assert_allclose(found["influence"], wanted["influence"].take(order), rtol=1e-4, atol=1e-6)


def test_named_rows_have_the_scores_of_a_file_with_them_alone(page):
    assert page["named"].equals(page["scores"])
    assert page["named"].num_rows == 30


def test_a_condition_takes_the_rows_that_meet_it(page):
    ids = [sample_id for sample_id in page["scores"]["sample_id"].to_pylist() if int(sample_id[6:]) % 7]
    assert page["asked"]["sample_id"].to_pylist() == ids


def test_a_set_of_other_columns_is_measured_as_the_same_rows(page):
    assert page["figures"]["others"] == page["figures"]["retain"] != page["figures"]["forget"]


def test_a_preprocessing_of_ones_own_gives_what_the_settings_give(page):
    assert page["prepared"].equals(page["scores"])


def test_losses_of_soft_and_several_labels_are_torchs_own(page):
    torch.manual_seed(0)
    model = digits_cnn().eval()  # as ``write_files`` made it
    with torch.no_grad():
        z = model(torch.stack([digit_of(image) for image in page["rows"]["image"]])).double()
    labels = page["rows"]["label"].tolist()
    soft, several = (torch.tensor([of(digit) for digit in labels]).double() for of in (shares, flags))
    expected = torch.nn.functional.cross_entropy(z, soft, reduction="none")
    np.testing.assert_allclose(page["of_soft"]["loss"], expected, rtol=1e-5)
    weights = torch.tensor([2.0] + [1.0] * 9)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(z, several, reduction="none", pos_weight=weights)
    np.testing.assert_allclose(page["of_several"]["loss"], losses.mean(1), rtol=1e-5)
    assert page["forgotten"].status in ("reached", "already_met")


def digit_of(image):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(image)))).float().unsqueeze(0) / 255
