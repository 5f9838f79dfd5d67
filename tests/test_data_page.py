"""docs/data.md: every example runs, and gives the scores of the same digits."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
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
    (folder / "deletions.csv").write_text("\n".join(["id", *ids]))


def test_named_rows_have_the_scores_of_a_file_with_them_alone(page):
    assert page["named"].equals(page["scores"])
    assert page["named"].num_rows == 30


def test_a_condition_takes_the_rows_that_meet_it(page):
    ids = [sample_id for sample_id in page["scores"]["sample_id"].to_pylist() if int(sample_id[6:]) % 7]
    assert page["asked"]["sample_id"].to_pylist() == ids


def test_a_set_of_other_columns_is_measured_as_the_same_rows(page):
    assert page["figures"]["test"] == page["figures"]["retain"] == page["figures"]["forget"]


def test_a_preprocessing_of_ones_own_gives_what_the_settings_give(page):
    assert page["prepared"].equals(page["scores"])
