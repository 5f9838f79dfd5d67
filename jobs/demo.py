"""Forget a digit, and forget random digits, on a local Ray with two workers: ``make demo``."""

import json

import ray

from imu_ray.demo import run_demo
from imu_ray.run.directory import default_run_dir

if __name__ == "__main__":
    with ray.init(address="local", num_cpus=2, logging_level="warning", log_to_driver=False):
        print(json.dumps(run_demo(default_run_dir())))
