import pytest

from imu_ray.config import ResourcesConfig
from imu_ray.distributed.session import workers_on


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
