"""Scores of other engines, in files laid out as theirs are."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import save_file

from imu_ray import CheckpointError
from imu_ray.influence.given import given_influence, read_scores

SCORES = np.random.default_rng(0).normal(size=(5, 3))  # samples, queries


def bergson(folder, scores=SCORES, written=True, **config):
    """Pairs of a float32 and a flag, padded to 8 bytes, one after another for each query."""
    folder.mkdir(exist_ok=True)
    count = scores.shape[1]
    names = [f"{kind}_{place}" for place in range(count) for kind in ("score", "written")]
    layout = {
        "names": names,
        "formats": ["float32", "bool"] * count,
        "offsets": [8 * place + offset for place in range(count) for offset in (0, 4)],
        "itemsize": 8 * count,
    }
    rows = np.zeros(len(scores), np.dtype(layout))
    for place in range(count):
        rows[f"score_{place}"], rows[f"written_{place}"] = scores[:, place], written
    rows.tofile(folder / "scores.bin")
    info = {"num_items": len(scores), "num_scores": count, "dtype": layout}
    (folder / "info.json").write_text(json.dumps(info))
    (folder / "config.yaml").write_text(yaml.safe_dump({"score_cfg": config}))
    return folder


@pytest.mark.parametrize(
    ("config", "sign"), [({}, -1), ({"higher_is_better": True}, -1), ({"higher_is_better": False}, 1)]
)
def test_bergsons_scores_are_the_mean_over_the_queries_in_our_sign(config, sign, tmp_path):
    scores, ids = read_scores(str(bergson(tmp_path, **config)))
    np.testing.assert_allclose(scores, sign * SCORES.astype(np.float32).mean(1), rtol=1e-6)
    assert ids is None


def test_a_score_that_bergson_has_not_written_is_refused(tmp_path):
    bergson(tmp_path)
    rows = np.fromfile(tmp_path / "scores.bin", np.uint8)
    rows[4] = 0  # the flag of the first score
    rows.tofile(tmp_path / "scores.bin")
    with pytest.raises(CheckpointError, match="lacks 1 of 15 scores"):
        read_scores(str(tmp_path))


def test_kronfluences_pairwise_scores_are_minus_the_mean_over_the_queries(tmp_path):
    parts = {"fc1": SCORES.T[:, :5].astype(np.float32), "fc2": 2 * SCORES.T.astype(np.float32)}
    save_file(
        {name: np.ascontiguousarray(part) for name, part in parts.items()}, tmp_path / "pairwise_scores.safetensors"
    )
    for place in (tmp_path, tmp_path / "pairwise_scores.safetensors"):
        np.testing.assert_allclose(read_scores(str(place))[0], -3 * SCORES.mean(1), rtol=1e-6)


def test_partitions_of_kronfluences_scores_follow_each_other_and_add_up(tmp_path):
    whole = SCORES.T.astype(np.float32)
    for data, rows in enumerate((slice(0, 2), slice(2, 5))):
        for module, share in enumerate((0.25, 0.75)):
            name = f"pairwise_scores_data_partition{data}_module_partition{module}.safetensors"
            save_file({"all_modules": np.ascontiguousarray(share * whole[:, rows])}, tmp_path / name)
    np.testing.assert_allclose(read_scores(str(tmp_path))[0], -SCORES.mean(1), rtol=1e-6)
    for module in range(2):
        (tmp_path / f"pairwise_scores_data_partition0_module_partition{module}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"data partitions \[1\]"):
        read_scores(str(tmp_path))


def test_kronfluences_self_scores_are_turned(tmp_path):
    save_file({"all_modules": np.abs(SCORES[:, 0])}, tmp_path / "self_scores.safetensors")
    np.testing.assert_allclose(read_scores(str(tmp_path))[0], -np.abs(SCORES[:, 0]))
    save_file({"all_modules": SCORES.T.copy()}, tmp_path / "pairwise_scores.safetensors")
    with pytest.raises(CheckpointError, match="pairwise_scores and self_scores"):
        read_scores(str(tmp_path))


def test_scores_are_joined_by_order_and_checked_where_ids_are_named(tmp_path):
    place = str(bergson(tmp_path))
    known = pa.chunked_array([["a", "b", "c", "d", "e"]])

    def holds(ids):
        return ids.to_pylist() == known.to_pylist()

    assert len(given_influence(place, 5, holds, "the set")) == 5
    with pytest.raises(CheckpointError, match="holds 5 scores for the 6 samples of the set"):
        given_influence(place, 6, holds, "the set")
    (tmp_path / "sample_ids.txt").write_text("a\nb\nc\nd\ne\n")
    assert len(given_influence(place, 5, holds, "the set")) == 5
    (tmp_path / "sample_ids.txt").write_text("b\na\nc\nd\ne\n")
    with pytest.raises(CheckpointError, match="other samples, or in another order"):
        given_influence(place, 5, holds, "the set")


def test_parquet_brings_its_ids_and_what_is_no_number_is_refused(tmp_path):
    table = pa.table({"sample_id": ["a", "b"], "influence": [-1.0, 2.0]})
    pq.write_table(table, tmp_path / "scores.parquet")
    scores, ids = read_scores(str(tmp_path / "scores.parquet"))
    assert (scores.tolist(), ids.to_pylist()) == ([-1.0, 2.0], ["a", "b"])
    pq.write_table(table.set_column(1, "influence", [[-1.0, float("nan")]]), tmp_path / "broken.parquet")
    with pytest.raises(CheckpointError, match="1 scores that are not finite"):
        read_scores(str(tmp_path / "broken.parquet"))


@pytest.mark.parametrize("broken", ["no folder", "empty folder", "half a file", "no info"])
def test_what_cannot_be_read_is_named(broken, tmp_path):
    place = tmp_path / "scores"
    if broken != "no folder":
        place.mkdir()
    if broken in ("half a file", "no info"):
        bergson(place)
        info = place / "info.json"
        info.write_text("{") if broken == "no info" else (place / "scores.bin").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="scores"):
        read_scores(str(place))
