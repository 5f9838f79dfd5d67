"""Ray as it was found: use it when it runs, start it when it does not, and stop only what was started here."""

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
import torch
import yaml

# Not public: which autoscaler runs is told by no public call.
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.exceptions import RayError

# Not public: under Ray Client the public calls answer as on the cluster.
from ray.util.client import ray as ray_client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from imu_ray.config import ResourcesConfig
from imu_ray.errors import ConfigError, ImuError
from imu_ray.events import event

# What every node must have; of the first ones the same release, because results or what travels depend on it.
SAME_RELEASE = ("ray", "torch", "torchvision", "pyarrow", "numpy")
NEEDED = (
    *SAME_RELEASE,
    *("pydantic", "scipy", "scikit-learn", "safetensors", "pyyaml", "tqdm", "matplotlib", "jinja2", "tensorboardX"),
)
NODE_SECONDS = 120.0
# Written by `ray up` on the head node: the node types that its autoscaler may start.
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
# Written by `ray start` on a node of a cluster, to which `ray.init` then connects. Not public; there is no call for it.
CURRENT = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"


@contextmanager
def ray_session(resources: ResourcesConfig) -> Iterator[ResourcesConfig]:
    """A running Ray with room for ``resources`` on nodes that can do the work; they come with a number of workers.

    Raises:
        ConfigError: the cluster can never have what was asked for, a node's environment does not fit, or the connection
            is one of Ray Client.
    """
    address = "" if ray.is_initialized() else os.environ.get("RAY_ADDRESS", "")
    if ray_client.is_connected() or address.startswith("ray://"):
        raise ConfigError(
            "the driver is connected through ray:// (Ray Client), on which Ray Train and the placement of results are "
            "not supported; expected a driver on the cluster; use `ray job submit`, or run the script on a node with "
            "RAY_ADDRESS=auto"
        )
    require_gpus(resources)
    started = not ray.is_initialized()
    if started:
        # With its dashboard, on which Ray Train's clean-up of lost groups and Tune's early stopping rely.
        start_ray()
    try:
        check_environments()
        require_resources(resources)
        yield resources.with_overrides({"workers": resolve_workers(resources)})
    except ImuError:
        # Ray would print the errors of the other tasks that failed, when they are let go, after this one.
        os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
        raise
    finally:
        if started:
            ray.shutdown()


def start_ray(**options: Any) -> Any:
    """Ray, with SIGTERM left to Python: Ray's native handler aborts after three seconds, during a clean-up."""
    handler = signal.getsignal(signal.SIGTERM)
    context = ray.init(logging_level=logging.WARNING, **options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler if callable(handler) else signal.getsignal(signal.SIGTERM))
    return context


@contextmanager
def ray_of_its_own(cpus: int) -> Iterator[None]:
    """The cluster of the job that this process is, or of ``RAY_ADDRESS``; else a local Ray of so many CPUs."""
    joins = submitted_job() is not None or os.environ.get("RAY_ADDRESS")
    start_ray(**({} if joins else {"address": "local", "num_cpus": cpus, "log_to_driver": False}))
    try:
        yield
    finally:
        ray.shutdown()


def submitted_job() -> Mapping[str, Any] | None:
    """What ``ray job submit`` started this process with (``metadata``, ``runtime_env``), or None when it did not."""
    # Not public, but only this variable tells it before `ray.init`.
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return config if (config.get("metadata") or {}).get("job_submission_id") else None


def connects() -> bool:
    """Whether ``ray.init()`` finds a cluster, rather than start one on this machine."""
    named = os.environ.get("RAY_ADDRESS", "local") not in ("", "local")
    return named or submitted_job() is not None or CURRENT.exists()


def check_environments() -> None:
    """Compare the packages of every node with the driver's; ``ConfigError`` names what differs."""

    def installed(names: Sequence[str]) -> dict[str, str | None]:
        return {name: next((found.version for found in metadata.distributions(name=name)), None) for name in names}

    # Pickled by value, so that a node can answer on which this package cannot even be imported.
    installed.__module__ = "__main__"
    here = ray.get_runtime_context().get_node_id()
    alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    others = {node: address for node, address in alive.items() if node != here}
    if not others:
        return
    ask = ray.remote(num_cpus=0, max_retries=0)(installed)
    refs = {}
    for node, address in others.items():
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        refs[ask.options(scheduling_strategy=there, name="check environment").remote(NEEDED)] = address
    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=NODE_SECONDS)
    answers = [(refs[ref], answer) for ref in ready if (answer := _answer(ref)) is not None]
    for address in sorted(set(refs.values()) - {node for node, _ in answers}):
        reason = f"it left, or gave no answer in {NODE_SECONDS:g} s"
        event("node not checked", level=logging.WARNING, node=address, reason=reason)
    problems = environment_problems(answers, installed(NEEDED))
    if problems:
        raise ConfigError(
            f"{len(problems)} of {len(others) + 1} nodes cannot do the work: {'; '.join(problems[:5])}; expected the "
            "driver's releases on every node; install them there, or use one image for all"
        )
    event("environments checked", nodes=len(answers) + 1)


def _answer(ref: "ray.ObjectRef[Any]") -> dict[str, str | None] | None:
    """What a node answered; None when it left meanwhile."""
    try:
        return ray.get(ref)
    except RayError:
        return None


Installed = Mapping[str, str | None]


def environment_problems(answers: Sequence[tuple[str, Installed]], own: Installed) -> list[str]:
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


def node_store_bytes() -> int:
    """Memory of the smallest node's object store."""
    return int(min(node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]))


def resolve_workers(resources: ResourcesConfig) -> int:
    """``resources.workers``, where ``auto`` is all that fit on the nodes that are there now."""
    return resources.workers if isinstance(resources.workers, int) else max(1, slots(resources))


def require_gpus(resources: ResourcesConfig) -> None:
    """Refuse GPUs on a machine that has none, before Ray is started there."""
    if resources.gpus_per_worker and not (ray.is_initialized() or connects() or torch.cuda.is_available()):
        raise _no_gpu(resources, "torch finds none on this machine")


def _no_gpu(resources: ResourcesConfig, found: str) -> ConfigError:
    return ConfigError(
        f"resources.gpus_per_worker is {resources.gpus_per_worker:g}, but {found}; expected 0 where there are no GPUs; "
        "set resources.gpus_per_worker=0"
    )


def require_resources(resources: ResourcesConfig) -> None:
    """Compare what is asked for with what the cluster has, or can get; Ray itself would wait for ever."""
    least, room = (resources.workers if isinstance(resources.workers, int) else 1), slots(resources)
    if least <= room:
        return
    ever = autoscaler_slots(resources)
    if ever is not None and least <= max(ever, room):
        event("waiting for the autoscaler to add nodes", level=logging.WARNING, workers=least, room_now=room)
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    if resources.gpus_per_worker and not (gpus or ever):
        raise _no_gpu(resources, f"none of the {len(nodes)} nodes of the cluster has one")
    there = f"the {len(nodes)} nodes of the cluster ({cpus:g} CPU, {gpus:g} GPU in all)"
    raise ConfigError(
        f"resources.workers is {resources.workers} with {resources.cpus_per_worker} CPU and "
        f"{resources.gpus_per_worker:g} GPU each; expected at most {max(room, ever or 0):g}, which is what fits on "
        f"{there if ever is None else 'all nodes it may start'}; ask for fewer workers, for less each, or for a larger "
        "cluster"
    )


def autoscaler_slots(resources: ResourcesConfig) -> float | None:
    """Workers that fit once the autoscaler has started all it may; infinite without a known limit; None without one."""
    if resources.autoscaling == "auto":
        path = BOOTSTRAP.expanduser()
        if path.is_file():
            return _largest(yaml.safe_load(path.read_text()), resources)
        return float("inf") if is_autoscaler_v2(fetch_from_server=True) else None
    return float("inf") if resources.autoscaling else None


def _largest(cluster: Mapping[str, Any], resources: ResourcesConfig) -> float:
    most = 0.0
    for kind in cluster.get("available_node_types", {}).values():
        has = kind.get("resources") or {}
        if not has:  # left for Ray to detect on the machine
            return float("inf")
        nodes = kind.get("max_workers", cluster.get("max_workers", 0))
        most += nodes * workers_on(has.get("CPU", 0), has.get("GPU", 0), resources)
    return most


def workers_on(cpus: float, gpus: float, resources: ResourcesConfig) -> int:
    """Workers that fit on one node; a worker's GPUs are whole ones, or a fraction of a single one."""
    by_cpu = int(cpus // resources.cpus_per_worker)
    each = resources.gpus_per_worker
    if not each:
        return by_cpu
    by_gpu = int(gpus // each) if each >= 1 else int(gpus) * int(1 / each + 1e-9)
    return min(by_cpu, by_gpu)
