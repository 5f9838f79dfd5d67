"""Ray as it was found: use it when it runs, start it when it does not, and stop only what was started here."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.client import ray as ray_client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from imu_ray.config import ResourcesConfig
from imu_ray.errors import ConfigError
from imu_ray.events import event

# What every node must have; of the first ones the same release, because results or the objects that travel depend on it.
SAME_RELEASE = ("ray", "torch", "torchvision", "pyarrow", "numpy")
NEEDED = (*SAME_RELEASE, "scikit-learn", "safetensors", "pyyaml", "tqdm", "matplotlib", "jinja2", "tensorboardX")
NODE_SECONDS = 120.0
# Written by `ray up` on the head node: the node types that its autoscaler may start.
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")


@contextmanager
def ray_session(resources: ResourcesConfig) -> Iterator[None]:
    """A running Ray with room for ``resources``, on which every node can do the work.

    Raises:
        ConfigError: the cluster can never have what was asked for, a node's environment does not fit, or the connection is
            one of Ray Client.
    """
    if ray_client.is_connected() or (not ray.is_initialized() and os.environ.get("RAY_ADDRESS", "").startswith("ray://")):
        raise ConfigError(
            "the driver is connected through ray:// (Ray Client), on which Ray Train and the placement of results are not supported; "
            "expected a driver on the cluster; use `ray job submit`, or run the script on a node with RAY_ADDRESS=auto"
        )
    started = not ray.is_initialized()
    if started:
        # With its dashboard, on which Ray Train's clean-up of lost groups and Tune's early stopping rely.
        ray.init(logging_level=logging.WARNING)
    try:
        check_environments()
        require_resources(resources)
        yield
    finally:
        if started:
            ray.shutdown()


def submitted_job() -> Mapping[str, Any] | None:
    """What ``ray job submit`` started this process with (``metadata``, ``runtime_env``), or None when it did not."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return config if (config.get("metadata") or {}).get("job_submission_id") else None


def check_environments() -> None:
    """Compare the packages of every node with the driver's; ``ConfigError`` names the nodes and packages that differ."""

    def installed(names: Sequence[str]) -> dict[str, str | None]:
        return {name: next((found.version for found in metadata.distributions(name=name)), None) for name in names}

    # Pickled by value, so that a node can answer on which this package cannot even be imported.
    installed.__module__ = "__main__"
    here = ray.get_runtime_context().get_node_id()
    others = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here}
    if not others:
        return
    ask = ray.remote(num_cpus=0, max_retries=0)(installed)
    refs = {
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), name="check environment").remote(NEEDED): address
        for node, address in others.items()
    }
    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=NODE_SECONDS)
    answers = [(refs[ref], answer) for ref in ready if (answer := _answer(ref)) is not None]
    for address in sorted(set(refs.values()) - {node for node, _ in answers}):
        event("node not checked", level=logging.WARNING, node=address, reason=f"it left, or gave no answer in {NODE_SECONDS:g} s")
    problems = environment_problems(answers, installed(NEEDED))
    if problems:
        raise ConfigError(
            f"{len(problems)} of {len(others) + 1} nodes cannot do the work: {'; '.join(problems[:5])}; expected the driver's releases on "
            "every node; install them there, or use one image for all"
        )
    event("environments checked", nodes=len(answers) + 1)


def _answer(ref: "ray.ObjectRef[Any]") -> dict[str, str | None] | None:
    """What a node answered; None when it left meanwhile."""
    try:
        return ray.get(ref)
    except RayError:
        return None


def environment_problems(answers: Sequence[tuple[str, Mapping[str, str | None]]], own: Mapping[str, str | None]) -> list[str]:
    """What is missing or differs on each node, in words."""
    problems = []
    for address, found in sorted(answers, key=lambda answer: answer[0]):
        missing = [name for name in own if found[name] is None and own[name] is not None]
        different = [
            f"{name} {found[name]} (driver {own[name]})"
            for name in SAME_RELEASE
            if found[name] is not None and _release(found[name]) != _release(own[name])
        ]
        if missing or different:
            problems.append(f"node {address}: " + ", ".join([f"no {name}" for name in missing] + different))
    return problems


def _release(version: str | None) -> str:
    # 2.9.0+cpu and 2.9.0+cu128 are one release: a CPU head and GPU workers have different builds of it.
    return (version or "").partition("+")[0]


def slots(resources: ResourcesConfig) -> int:
    """Workers that fit on the nodes that are there now."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(workers_on(node.get("CPU", 0), node.get("GPU", 0), resources) for node in nodes)


def object_store_bytes() -> int:
    """Memory of all nodes' object stores."""
    return int(ray.cluster_resources().get("object_store_memory", 0))


def require_resources(resources: ResourcesConfig) -> None:
    """Compare what is asked for with what the cluster has, or can get; Ray itself would wait for ever."""
    room = slots(resources)
    if resources.workers <= room:
        return
    ever = autoscaler_slots(resources)
    if ever is not None and resources.workers <= max(ever, room):
        event("waiting for the autoscaler to add nodes", level=logging.WARNING, workers=resources.workers, room_now=room)
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    raise ConfigError(
        f"resources.workers is {resources.workers} with {resources.cpus_per_worker} CPU and {resources.gpus_per_worker:g} GPU each; "
        f"expected at most {max(room, ever or 0):g}, which is what fits on "
        + (f"the {len(nodes)} nodes of the cluster ({cpus:g} CPU, {gpus:g} GPU in all)" if ever is None else "all nodes it may start")
        + "; ask for fewer workers or a larger cluster"
    )


def autoscaler_slots(resources: ResourcesConfig) -> float | None:
    """Workers that fit once the autoscaler has started all it may; infinite when its limit cannot be told; None without one."""
    if resources.autoscaling == "auto":
        path = BOOTSTRAP.expanduser()
        if path.is_file():
            return _largest(yaml.safe_load(path.read_text()), resources)
        if _internal_kv_get(b"__autoscaler_v2_enabled", namespace=b"__autoscaler") == b"1":
            return float("inf")
        return None
    return float("inf") if resources.autoscaling else None


def _largest(cluster: Mapping[str, Any], resources: ResourcesConfig) -> float:
    most = 0.0
    for kind in cluster.get("available_node_types", {}).values():
        has = kind.get("resources") or {}
        if not has:  # left for Ray to detect on the machine
            return float("inf")
        most += kind.get("max_workers", cluster.get("max_workers", 0)) * workers_on(has.get("CPU", 0), has.get("GPU", 0), resources)
    return most


def workers_on(cpus: float, gpus: float, resources: ResourcesConfig) -> int:
    """Workers that fit on one node; a worker's GPUs are whole ones, or a fraction of a single one."""
    by_cpu = int(cpus // resources.cpus_per_worker)
    each = resources.gpus_per_worker
    if not each:
        return by_cpu
    by_gpu = int(gpus // each) if each >= 1 else int(gpus) * int(1 / each + 1e-9)
    return min(by_cpu, by_gpu)
