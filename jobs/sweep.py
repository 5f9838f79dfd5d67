"""Sweep over settings and forget-set sizes: ``python jobs/sweep.py --config sweep.yaml [--resume]``."""

from typing import Any

import imu_ray


def sweep(job: imu_ray.JobConfig) -> dict[str, Any]:
    """Write ``results.parquet`` and ``sweep.html``, and a run directory per trial."""
    result = imu_ray.sweep(
        job.model, job.forget_set, job.axes, task=job.task, evaluation=job.evaluation, config=job.config, settings=job.sweep,
        sweep_dir=job.run_dir, resume=job.resume,
    )  # fmt: skip
    statuses = result.table["status"].to_pylist()
    return {"run_dir": str(result.sweep_dir), "metrics": {"trials": len(statuses), "best": result.best, "failed": statuses.count("failed")}}


if __name__ == "__main__":
    imu_ray.run_job(__doc__, sweep, resumable=True)
