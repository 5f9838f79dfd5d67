"""Ray as it was found: use it when it runs, start it when it does not, and stop only what was started here."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from imu_ray.config import ResourcesConfig
from imu_ray.errors import ConfigError

logger = logging.getLogger("imu_ray")


@contextmanager
def ray_session(resources: ResourcesConfig) -> Iterator[None]:
    """A running Ray with room for ``resources``.

    Raises:
        ConfigError: the cluster can never have what was asked for.
    """
    started = not ray.is_initialized()
    if started:
        # With its dashboard, on which Ray Train's clean-up of lost groups and Tune's early stopping rely.
        ray.init(logging_level=logging.WARNING)
    try:
        require_resources(resources)
        yield
    finally:
        if started:
            ray.shutdown()


def require_resources(resources: ResourcesConfig) -> None:
    """Compare what is asked for with what the nodes have; Ray itself would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(workers_on(node.get("CPU", 0), node.get("GPU", 0), resources) for node in nodes)
    if resources.workers > room:
        cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
        raise ConfigError(
            f"resources.workers is {resources.workers} with {resources.cpus_per_worker} CPU and {resources.gpus_per_worker:g} GPU each; "
            f"expected at most {room}, which is what fits on the {len(nodes)} nodes of the cluster ({cpus:g} CPU, {gpus:g} GPU in all); "
            "ask for fewer workers or a larger cluster"
        )


def workers_on(cpus: float, gpus: float, resources: ResourcesConfig) -> int:
    """Workers that fit on one node; a worker's GPUs are whole ones, or a fraction of a single one."""
    by_cpu = int(cpus // resources.cpus_per_worker)
    each = resources.gpus_per_worker
    if not each:
        return by_cpu
    by_gpu = int(gpus // each) if each >= 1 else int(gpus) * int(1 / each + 1e-9)
    return min(by_cpu, by_gpu)
