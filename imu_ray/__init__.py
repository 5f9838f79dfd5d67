"""Make a trained PyTorch model forget: influence-guided machine unlearning on Ray."""

from imu_ray.api import ascend, audit, score, unlearn
from imu_ray.config import UnlearnConfig
from imu_ray.errors import (
    CheckpointError,
    ConfigError,
    EmptySelectionError,
    ForgetSetError,
    ImuError,
    NonFiniteError,
    StageFailedError,
    UnsupportedModelError,
)
from imu_ray.job import JobConfig, run_job
from imu_ray.models import ModelSpec
from imu_ray.pipeline import UnlearnResult
from imu_ray.plan import plan
from imu_ray.sweep import SweepResult, sweep
from imu_ray.sweep_axes import SweepConfig

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "EmptySelectionError",
    "ForgetSetError",
    "ImuError",
    "JobConfig",
    "ModelSpec",
    "NonFiniteError",
    "StageFailedError",
    "SweepConfig",
    "SweepResult",
    "UnlearnConfig",
    "UnlearnResult",
    "UnsupportedModelError",
    "ascend",
    "audit",
    "plan",
    "run_job",
    "score",
    "sweep",
    "unlearn",
]
