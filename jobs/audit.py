"""``imu-ray audit``, for ``ray job submit -- python jobs/audit.py --config job.yaml``."""

import sys

from imu_ray.cli import main

sys.exit(main("audit"))
