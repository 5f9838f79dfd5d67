"""``imu-ray sweep``, for ``ray job submit -- python jobs/sweep.py --config job.yaml``."""

import sys

from imu_ray.cli import main

sys.exit(main("sweep"))
