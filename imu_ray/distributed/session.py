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
    """Compare what is asked for with what the cluster has; Ray itself would wait for ever."""
    have = ray.cluster_resources()
    for name, each in (("CPU", resources.cpus_per_worker), ("GPU", resources.gpus_per_worker)):
        wanted = resources.workers * each
        if wanted > have.get(name, 0):
            raise ConfigError(
                f"resources.workers is {resources.workers} with {each:g} {name} each; expected at most {have.get(name, 0):g} "
                f"{name} in all, which is what the cluster has; ask for fewer workers or a larger cluster"
            )
