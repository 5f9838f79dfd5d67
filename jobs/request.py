"""``imu-ray request``, for ``ray job submit -- python jobs/request.py run s3://bucket/queue --config job.yaml``."""

import sys

from imu_ray.cli import main

sys.exit(main("request"))
