"""Make a trained PyTorch model forget: influence-guided machine unlearning on Ray."""

import importlib
from typing import TYPE_CHECKING, Any

from imu_ray.config import EnsembleConfig, SweepConfig, UnlearnConfig
from imu_ray.errors import (
    CheckpointError,
    ConfigError,
    EmptySelectionError,
    ForgetSetError,
    ImuError,
    NonFiniteError,
    RequestError,
    StageFailedError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from imu_ray.api import ascend, audit, import_factors, remember, score, unlearn
    from imu_ray.experiments.ensemble import EnsembleResult, ensemble
    from imu_ray.experiments.sweep import SweepResult, sweep
    from imu_ray.handover.comparison import Comparison, compare
    from imu_ray.handover.export import export_run
    from imu_ray.handover.verify import verify_run
    from imu_ray.job import JobConfig
    from imu_ray.models.spec import ModelSpec
    from imu_ray.planning import plan
    from imu_ray.run.result import UnlearnResult

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Comparison",
    "ConfigError",
    "EmptySelectionError",
    "EnsembleConfig",
    "EnsembleResult",
    "ForgetSetError",
    "ImuError",
    "JobConfig",
    "ModelSpec",
    "NonFiniteError",
    "RequestError",
    "StageFailedError",
    "SweepConfig",
    "SweepResult",
    "UnlearnConfig",
    "UnlearnResult",
    "UnsupportedModelError",
    "ascend",
    "audit",
    "compare",
    "ensemble",
    "export_run",
    "import_factors",
    "plan",
    "remember",
    "score",
    "sweep",
    "unlearn",
    "verify_run",
]

# Imported when first asked for: a worker process needs a part of the package, and Ray Train, Tune and the plots take
# seconds to import.
_HOMES = {
    **dict.fromkeys(("ascend", "audit", "import_factors", "remember", "score", "unlearn"), "imu_ray.api"),
    **dict.fromkeys(("SweepResult", "sweep"), "imu_ray.experiments.sweep"),
    **dict.fromkeys(("EnsembleResult", "ensemble"), "imu_ray.experiments.ensemble"),
    "JobConfig": "imu_ray.job",
    **dict.fromkeys(("Comparison", "compare"), "imu_ray.handover.comparison"),
    "export_run": "imu_ray.handover.export",
    "verify_run": "imu_ray.handover.verify",
    "ModelSpec": "imu_ray.models.spec",
    "UnlearnResult": "imu_ray.run.result",
    "plan": "imu_ray.planning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'imu_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
