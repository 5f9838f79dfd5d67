"""``metrics.json``: every figure of a run."""

from collections.abc import Mapping
from typing import Any

from imu_ray.run.directory import RunDirectory

METRICS = "metrics.json"


def write_metrics(run: RunDirectory, figures: Mapping[str, Any]) -> None:
    """Write figures; NaN and infinity are refused."""
    run.write_json(METRICS, figures)


def read_metrics(run: RunDirectory) -> dict[str, Any]:
    """The figures of a run, as ``UnlearnResult.metrics`` has them; none where there is no such file."""
    found: dict[str, Any] = run.read_json(METRICS) or {}
    return found
