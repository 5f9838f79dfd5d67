import gc
import types

import pytest
import ray
import yaml
from architectures import named
from samples import Pairs, tensors

from imu_ray import ConfigError, ForgetSetError, UnlearnConfig, score
from imu_ray.config import ResourcesConfig
from imu_ray.distributed import session
from imu_ray.distributed.session import NEEDED, environment_problems, ray_session, require_resources, workers_on


@pytest.mark.parametrize(
    ("cpus", "gpus", "each", "fit"),
    [
        (2, 0, {"cpus_per_worker": 4}, 0),
        (9, 0, {"cpus_per_worker": 4}, 2),
        (16, 2, {"gpus_per_worker": 0.6}, 2),
        (16, 2, {"gpus_per_worker": 0.5}, 4),
        (16, 2, {"gpus_per_worker": 0.1}, 16),
        (16, 3, {"gpus_per_worker": 2}, 1),
        (1, 8, {"gpus_per_worker": 1}, 1),
    ],
)
def test_a_worker_takes_whole_gpus_or_a_fraction_of_one(cpus, gpus, each, fit):
    assert workers_on(cpus, gpus, ResourcesConfig(**each)) == fit


OWN = {**dict.fromkeys(NEEDED, "1.0"), "torch": "2.9.0+cpu"}


def test_a_missing_package_and_another_release_are_named_with_their_node_but_not_another_build():
    other = {**OWN, "torchvision": None, "torch": "2.8.0", "tqdm": "9.0"}
    nodes = [("10.0.0.2", other), ("10.0.0.1", OWN), ("10.0.0.3", {**OWN, "torch": "2.9.0+cu128"})]
    found = environment_problems(nodes, OWN)
    assert found == ["node 10.0.0.2: no torchvision, torch 2.8.0 (driver 2.9.0+cpu)"]


def test_what_the_nodes_need_is_what_the_project_depends_on():
    from importlib import metadata

    from packaging.requirements import Requirement

    declared = {Requirement(line) for line in metadata.requires("imu-ray") if "extra ==" not in line}
    assert {need.name.lower() for need in declared} == {name.lower() for name in NEEDED}


def test_a_ray_client_connection_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match="ray://.*use `ray job submit`"), ray_session(ResourcesConfig()):
        pass


@pytest.fixture
def small_cluster(monkeypatch, tmp_path):
    """One node of two CPUs, and no autoscaler."""
    monkeypatch.setattr(session.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2}}])
    monkeypatch.setattr(session, "is_autoscaler_v2", lambda **_: False)
    monkeypatch.setattr(session, "BOOTSTRAP", tmp_path / "bootstrap.yaml")
    return tmp_path / "bootstrap.yaml"


def test_more_workers_than_fit_are_refused(small_cluster):
    require_resources(ResourcesConfig(workers=2))
    with pytest.raises(ConfigError, match="resources.workers is 3 .* expected at most 2, which is what fits on the 1 "):
        require_resources(ResourcesConfig(workers=3))


def test_automatic_workers_are_all_that_fit_and_at_least_one_must(small_cluster):
    auto = types.SimpleNamespace(**{**vars(ResourcesConfig()), "workers": "auto"})
    assert session.resolve_workers(ResourcesConfig(workers=7)) == 7
    assert session.resolve_workers(auto) == 2
    require_resources(auto)
    auto.cpus_per_worker = 3
    with pytest.raises(ConfigError, match="resources.workers is auto with 3 CPU .* expected at most 0"):
        require_resources(auto)


def test_a_gpu_that_no_node_has_is_refused_for_what_it_is(small_cluster, monkeypatch):
    with pytest.raises(ConfigError, match="none of the 1 nodes .* has one; .* set resources.gpus_per_worker=0"):
        require_resources(ResourcesConfig(gpus_per_worker=1))
    monkeypatch.setattr(session, "is_autoscaler_v2", lambda **_: True)
    require_resources(ResourcesConfig(gpus_per_worker=1))


def test_a_gpu_that_this_machine_has_not_is_refused_before_ray_is_started(monkeypatch, tmp_path):
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", lambda **_: pytest.fail("Ray was started"))
    monkeypatch.setattr(session.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(session, "CURRENT", tmp_path / "ray_current_cluster")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    refused = pytest.raises(ConfigError, match="torch finds none on this machine; .* set resources.gpus_per_worker=0")
    with refused, ray_session(ResourcesConfig(gpus_per_worker=0.5)):
        pass
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    session.require_gpus(ResourcesConfig(gpus_per_worker=0.5))  # which that cluster may have


def test_an_intended_error_is_told_once(ray_cluster, monkeypatch):
    told = []
    monkeypatch.setattr(ray._private.worker, "_unhandled_error_handler", told.append)
    monkeypatch.setenv("RAY_IGNORE_UNHANDLED_ERRORS", "")
    monkeypatch.delenv("RAY_IGNORE_UNHANDLED_ERRORS")
    inputs, labels = tensors(40)
    labels[[3, 20, 38]] = 99
    settings = {"influence.block_rows": 10, "influence.blocks_per_shard": 1, "resources.workers": 3}
    with pytest.raises(ForgetSetError, match="has label 99"):
        score(named("fc"), Pairs(inputs, labels), config=UnlearnConfig().with_overrides(settings))
    gc.collect()
    assert told == []


def test_an_autoscaling_cluster_waits_with_a_message(small_cluster, monkeypatch, caplog):
    monkeypatch.setattr(session, "is_autoscaler_v2", lambda **_: True)
    require_resources(ResourcesConfig(workers=3))
    assert "waiting for the autoscaler to add nodes: workers=3 room_now=2" in caplog.text
    with pytest.raises(ConfigError, match="resources.workers is 3"):
        require_resources(ResourcesConfig(workers=3, autoscaling=False))


def test_what_the_autoscaler_may_start_is_the_limit(small_cluster):
    head = {"resources": {"CPU": 0}, "max_workers": 0}
    kinds = {"head": head, "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 3}}
    small_cluster.write_text(yaml.safe_dump({"available_node_types": kinds, "max_workers": 3}))
    require_resources(ResourcesConfig(workers=24))
    with pytest.raises(ConfigError, match="expected at most 24, which is what fits on all nodes it may start"):
        require_resources(ResourcesConfig(workers=25))
    require_resources(ResourcesConfig(workers=6, gpus_per_worker=0.5))
    with pytest.raises(ConfigError, match="expected at most 6"):
        require_resources(ResourcesConfig(workers=7, gpus_per_worker=0.5))
