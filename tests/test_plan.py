"""What a run will cost: the counts are those of the run."""

import math

import pyarrow as pa
import pytest
from architectures import named
from language import llama
from samples import SMALL, pairs, paper

from imu_ray import ConfigError, ModelSpec, UnlearnConfig, plan, unlearn

SETTINGS = SMALL | {
    "influence.blocks_per_shard": 2, "ascent.stop.max_epochs": 1, "ascent.stop.targets": {"forget.accuracy": None},
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("ray_cluster")


def planned(rows, **changes):
    return plan(named("fc"), pairs(rows), config=paper(SETTINGS, **changes))


def test_the_counts_are_those_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"evaluation": {"test": pairs(20, seed=1)}, "config": paper(SETTINGS)}
    made = plan(named("fc"), pairs(50), **given)
    assert not list(tmp_path.iterdir()), "nothing is written"
    run = unlearn(named("fc"), pairs(50), **given, run_dir=tmp_path / "run").manifest
    for name, described in (("forget", run["forget_set"]), ("test", run["evaluation"]["test"])):
        assert made["sets"][name]["samples"] == described["rows_used"]
        assert made["sets"][name]["blocks"] == described["forward_calls"]
        assert made["sets"][name]["feature_bytes"] == described["feature_bytes"]
        assert made["sets"][name]["shards"] == math.ceil(described["forward_calls"] / 2)
    assert made["fits"]
    assert made["notes"] == []
    assert all(value > 0 for part in (made["peak_bytes"], made["seconds"]) for value in part.values())


def test_features_made_anew_take_no_room_and_more_passes():
    kept, anew = (planned(64, influence__features=way) for way in ("cache", "recompute"))
    saved = kept["peak_bytes"]["object_store"] - anew["peak_bytes"]["object_store"]
    assert (kept["forward_passes"], anew["forward_passes"]) == (1, 9)
    assert saved == kept["sets"]["forget"]["feature_bytes"]
    assert "made again in every stage" in anew["notes"][0]


def test_bytes_grow_with_samples_and_precision():
    one, two, half = planned(64), planned(128), planned(64, influence__feature_dtype="bfloat16")
    bytes_of = lambda made: made["sets"]["forget"]["feature_bytes"]
    assert bytes_of(two) == 2 * bytes_of(one) == 4 * bytes_of(half)
    assert two["peak_bytes"]["driver"] == 2 * one["peak_bytes"]["driver"]
    assert two["peak_bytes"]["per_worker"] == one["peak_bytes"]["per_worker"], "a shard in flight, whatever the set"


def test_what_does_not_fit_is_told_and_not_refused(monkeypatch):
    made = planned(20, resources__workers=99)
    assert not made["fits"]
    assert made["notes"] == ["99 workers do not fit now (4 do); an autoscaler has to add nodes"]
    monkeypatch.setattr("imu_ray.distributed.session.ray.cluster_resources", lambda: {"object_store_memory": 100.0})
    made = planned(20)
    assert not made["fits"]
    assert "will spill to disk" in made["notes"][0]


def test_what_a_run_would_refuse_is_refused():
    with pytest.raises(ConfigError, match="forget_set.size is 500"):
        planned(20, forget_set__size=500)


def test_a_folder_without_weights_is_counted_and_held_against_sizes_of_memory(tmp_path):
    llama().config.save_pretrained(tmp_path)
    rows = pa.table({"tokens": [[1, 2, 3, 4], [5, 6]]})
    tight = UnlearnConfig().with_overrides({"ascent.scope": ["*.q_proj"], "ascent.preconditioner_memory": 1e-6})
    made = plan(ModelSpec(f"hf:{tmp_path}"), rows, task="sequence", config=tight, memory=(1e-6, 3))
    assert (made["seconds"], made["sets"]["forget"]["forward_seconds"]) == (None, None)
    assert "no weights to run" in made["notes"][0]
    assert made["notes"][1].startswith(
        "a run is refused: ascent.preconditioner kfac of model.layers.0.self_attn.q_proj"
    )
    assert made["memory"]["fits"] == {"1e-06 GB": False, "3 GB": True}
    assert made["peak_bytes"]["per_worker"] > made["memory"]["peak"] > made["memory"]["weights"] > 0
    tight = tight.with_overrides({"ascent.preconditioner": "none"})
    assert plan(ModelSpec(f"hf:{tmp_path}"), rows, task="sequence", config=tight)["memory"]["curvature"] == 0
