"""``imu-ray plan``, for ``ray job submit -- python jobs/plan.py --config job.yaml``."""

import sys

from imu_ray.cli import main

sys.exit(main("plan"))
