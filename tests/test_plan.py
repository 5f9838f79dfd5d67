"""What a run will cost: the counts are those of the run."""

import math

import pytest
from architectures import named
from samples import pairs

from imu_ray import ConfigError, UnlearnConfig, plan, unlearn

SETTINGS = {
    "influence.block_rows": 16,
    "influence.blocks_per_shard": 2,
    "ascent.stop.max_epochs": 1,
    "ascent.stop.targets": {"forget.accuracy": None},
}


def config(**changes):
    return UnlearnConfig.from_recipe("paper").with_overrides(
        SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    )


def test_the_counts_are_those_of_the_run(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = plan(named("fc"), pairs(50), evaluation={"test": pairs(20, seed=1)}, config=config())
    assert not list(tmp_path.iterdir()), "nothing is written"
    run = unlearn(
        named("fc"), pairs(50), evaluation={"test": pairs(20, seed=1)}, config=config(), run_dir=tmp_path / "run"
    ).manifest
    for name, described in (("forget", run["forget_set"]), ("test", run["evaluation"]["test"])):
        assert made["sets"][name]["samples"] == described["rows_used"]
        assert made["sets"][name]["blocks"] == described["forward_calls"]
        assert made["sets"][name]["feature_bytes"] == described["feature_bytes"]
        assert made["sets"][name]["shards"] == math.ceil(described["forward_calls"] / 2)
    assert made["fits"]
    assert made["notes"] == []
    assert all(value > 0 for part in (made["peak_bytes"], made["seconds"]) for value in part.values())


def test_features_made_anew_take_no_room_and_more_passes(ray_cluster):
    kept, anew = (
        plan(named("fc"), pairs(64), config=config(influence__features=way)) for way in ("cache", "recompute")
    )
    assert (kept["forward_passes"], anew["forward_passes"]) == (1, 9)
    assert (
        kept["peak_bytes"]["object_store"] - anew["peak_bytes"]["object_store"]
        == kept["sets"]["forget"]["feature_bytes"]
    )
    assert "made again in every stage" in anew["notes"][0]


def test_half_the_precision_takes_half_the_bytes(ray_cluster):
    whole, half = (
        plan(named("fc"), pairs(64), config=config(influence__feature_dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    assert whole["sets"]["forget"]["feature_bytes"] == 2 * half["sets"]["forget"]["feature_bytes"]


def test_twice_the_samples_take_twice_the_bytes(ray_cluster):
    one, two = (plan(named("fc"), pairs(count), config=config()) for count in (64, 128))
    assert two["sets"]["forget"]["feature_bytes"] == 2 * one["sets"]["forget"]["feature_bytes"]
    assert two["peak_bytes"]["driver"] == 2 * one["peak_bytes"]["driver"]
    assert two["peak_bytes"]["per_worker"] == one["peak_bytes"]["per_worker"], "a shard in flight, whatever the set"


def test_workers_that_do_not_fit_are_told_and_not_refused(ray_cluster):
    made = plan(named("fc"), pairs(20), config=config(resources__workers=99))
    assert not made["fits"]
    assert made["notes"] == ["99 workers do not fit now (4 do); an autoscaler has to add nodes"]


def test_features_beyond_the_object_store_are_told(ray_cluster, monkeypatch):
    monkeypatch.setattr("imu_ray.distributed.session.ray.cluster_resources", lambda: {"object_store_memory": 100.0})
    made = plan(named("fc"), pairs(20), config=config())
    assert not made["fits"]
    assert "will spill to disk" in made["notes"][0]


def test_what_a_run_would_refuse_is_refused(ray_cluster):
    with pytest.raises(ConfigError, match="forget_set.size is 500"):
        plan(named("fc"), pairs(20), config=config(forget_set__size=500))
