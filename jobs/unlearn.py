"""``imu-ray unlearn``, for ``ray job submit -- python jobs/unlearn.py --config job.yaml``."""

import sys

from imu_ray.cli import main

sys.exit(main("unlearn"))
