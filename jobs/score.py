"""Score a forget set without changing the model: ``python jobs/score.py --config job.yaml --set run_dir=/runs/scores``."""

from typing import Any

import imu_ray


def score(job: imu_ray.JobConfig) -> dict[str, Any]:
    """Write ``intensities.parquet``."""
    table = imu_ray.score(job.model, job.forget_set, task=job.task, config=job.config, run_dir=job.run_dir)
    kept = sum(weight > 0 for weight in table["intensity"].to_pylist())
    return {"run_dir": str(job.run_dir), "metrics": {"samples": len(table), "kept": kept}}


if __name__ == "__main__":
    imu_ray.run_job(__doc__, score)
