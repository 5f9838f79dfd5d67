"""Make a model forget: ``python jobs/unlearn.py --config job.yaml --set ascent.stop.max_epochs=5``."""

from typing import Any

import imu_ray


def unlearn(job: imu_ray.JobConfig) -> dict[str, Any]:
    """Score, ascend and audit."""
    result = imu_ray.unlearn(job.model, job.forget_set, task=job.task, evaluation=job.evaluation, config=job.config, run_dir=job.run_dir)
    return {"run_dir": str(result.run_dir), "metrics": result.metrics}


if __name__ == "__main__":
    imu_ray.run_job(__doc__, unlearn, plannable=True)
