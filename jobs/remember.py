"""``imu-ray remember``, for ``ray job submit -- python jobs/remember.py --config job.yaml --out FILE``."""

import sys

from imu_ray.cli import main

sys.exit(main("remember"))
