"""``imu-ray score``, for ``ray job submit -- python jobs/score.py --config job.yaml``."""

import sys

from imu_ray.cli import main

sys.exit(main("score"))
