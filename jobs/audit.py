"""Measure a model, beside the ``original`` one if the file names it: ``python jobs/audit.py --config job.yaml``."""

from typing import Any

import imu_ray


def audit(job: imu_ray.JobConfig) -> dict[str, Any]:
    """Write ``metrics.json`` and ``report.html``."""
    metrics = imu_ray.audit(
        job.model, job.forget_set, original=job.original, task=job.task, evaluation=job.evaluation, config=job.config,
        run_dir=job.run_dir,
    )  # fmt: skip
    return {"run_dir": str(job.run_dir), "metrics": metrics}


if __name__ == "__main__":
    imu_ray.run_job(__doc__, audit)
