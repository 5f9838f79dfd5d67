"""How parameters move to a target, torch only: the registry of updates."""

from imu_ray.updates.base import Update
from imu_ray.updates.iterative import run_iterative
from imu_ray.updates.one_step import run_one_step

UPDATES: dict[str, Update] = {"iterative": run_iterative, "one_step": run_one_step}
