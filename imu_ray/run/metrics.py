"""``metrics.json``: every figure of a run, in the form that ``metrics.schema.json`` describes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imu_ray.errors import NonFiniteError
from imu_ray.run.directory import RunDirectory
from imu_ray.section import flatten

METRICS = "metrics.json"
SCHEMA = "urn:imu-ray:metrics:1"  # the number rises where a figure is renamed, removed or of another type


def metrics_schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of ``metrics.json``."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("metrics.schema.json").read_text())
    return found


def write_metrics(run: RunDirectory, figures: Mapping[str, Any]) -> None:
    """Write figures, and the name of their schema; ``NonFiniteError`` where one is NaN or infinite."""
    found = flatten(figures).items()
    wrong = [(name, value) for name, value in found if isinstance(value, float) and not math.isfinite(value)]
    if wrong:
        name, value = wrong[0]
        raise NonFiniteError(
            f"the figure {name} is {value}, {len(wrong)} such in all; expected finite numbers; check the outputs of "
            "the model, or leave the audit that makes it out"
        )
    run.write_json(METRICS, {"$schema": SCHEMA, **figures})


def read_metrics(run: RunDirectory) -> dict[str, Any]:
    """The figures of a run, as ``UnlearnResult.metrics`` has them; none where there is no such file."""
    found: dict[str, Any] = run.read_json(METRICS) or {}
    found.pop("$schema", None)
    return found
