"""A run as MLflow or Weights & Biases shows it, through Ray's integrations: settings and figures, no sample and no id.

Where a tracker is and what its project is called is said by its own environment variables. One that fails costs a
warning and nothing else.
"""

import importlib.util
import logging
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from imu_ray.config import UnlearnConfig
from imu_ray.errors import ConfigError
from imu_ray.events import event
from imu_ray.section import flatten

PROJECT = "imu_ray"
# Settings that may name a sample or a person; of a list in forget_set.size the length is sent.
HIDDEN = ("forget_set.ids", "forget_set.where", "forget_set.classes", "record.key")
SIZE = "forget_set.size"


def require_tracker(name: str | None) -> None:
    """Refuse a tracker that is not installed (``ConfigError``), before anything runs."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"tracking is {name!r}, which is not installed; expected the extra: pip install imu-ray[{name}]"
        )


def project_of(name: str) -> str:
    """The experiment of MLflow, or the project of Weights & Biases."""
    keys = {"mlflow": ("MLFLOW_EXPERIMENT_NAME",), "wandb": ("WANDB_PROJECT_NAME", "WANDB_PROJECT")}[name]
    return next(filter(None, map(os.environ.get, keys)), PROJECT)


def shown_settings(config: UnlearnConfig) -> dict[str, Any]:
    """All settings by their dotted names, but for those that may name a sample."""
    shown = {key: value for key, value in flatten(config.to_dict()).items() if key not in HIDDEN}
    size = shown.get(SIZE)
    return {**shown, SIZE: f"{len(size)} classes" if isinstance(size, Sequence) else size}


def numbers_of(figures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every finite number among nested figures, by its dotted name; those of single classes are left out."""
    found: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping) and key != "per_class":
            found |= numbers_of(value, f"{prefix}{key}.")
        elif isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            found[f"{prefix}{key}"] = float(value)
    return found


def track_run(
    name: str,
    run_name: str,
    config: UnlearnConfig,
    trajectory: Sequence[Mapping[str, float]],
    figures: Mapping[str, Any],
) -> str | None:
    """Send a run that has ended: its settings, the trajectory by step, and the figures; what failed, in words."""
    settings, ended = shown_settings(config), numbers_of(figures)
    steps = [(math.ceil(record["step"]), numbers_of(record)) for record in trajectory]
    try:
        (_to_mlflow if name == "mlflow" else _to_wandb)(run_name, settings, steps, ended)
    except Exception as error:  # of many kinds, and none of them ends a run
        return failed(name, error)
    return None


def failed(name: str, error: Exception) -> str:
    """The warning that a tracker failed, which is logged too; an address in the error's text may hold a password."""
    event("tracking failed", level=logging.WARNING, tracker=name, error=type(error).__name__)
    return f"tracking by {name} failed ({type(error).__name__}); the results are complete without it"


Steps = Sequence[tuple[int, dict[str, float]]]


def _to_mlflow(run_name: str, settings: dict[str, Any], steps: Steps, ended: dict[str, float]) -> None:
    from ray.air.integrations.mlflow import setup_mlflow

    mlflow = setup_mlflow(
        settings,
        experiment_name=project_of("mlflow"),
        run_name=run_name,
        create_experiment_if_not_exists=True,
        rank_zero_only=False,
    )
    try:
        for step, record in steps:
            mlflow.log_metrics(record, step=step)
        mlflow.log_metrics(ended)
    finally:
        mlflow.end_run()


def wandb_settings() -> Any:
    """What keeps to itself the command line, in which ids may stand, what is printed, and code.

    Trials are told of by processes that have the environment of their node, and not the driver's.
    """
    import wandb

    named = {"WANDB_MODE": "mode", "WANDB_DIR": "root_dir", "WANDB_BASE_URL": "base_url"}
    here = {setting: os.environ[name] for name, setting in named.items() if name in os.environ}
    return wandb.Settings(x_disable_meta=True, console="off", disable_code=True, disable_git=True, **here)


def _to_wandb(run_name: str, settings: dict[str, Any], steps: Steps, ended: dict[str, float]) -> None:
    from ray.air.integrations.wandb import setup_wandb

    project, only = project_of("wandb"), wandb_settings()
    run = setup_wandb(settings, project=project, trial_name=run_name, rank_zero_only=False, settings=only)
    try:
        for step, record in steps:
            run.log(record, step=step)
        run.summary.update(ended)
    finally:
        run.finish()
