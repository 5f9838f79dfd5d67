"""``imu-ray demo``, for ``ray job submit -- python jobs/demo.py``."""

import sys

from imu_ray.cli import main

sys.exit(main("demo"))
