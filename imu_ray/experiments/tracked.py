"""A sweep as MLflow or Weights & Biases shows it: Ray's own callbacks, shown settings and figures alone."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune

from imu_ray.config import UnlearnConfig
from imu_ray.distributed.tracking import failed, numbers_of, project_of, shown_settings, wandb_settings

UPLOAD_SECONDS = 60.0  # that the end of a sweep waits for what is still on its way
COUNTED = ("training_iteration", "timesteps_total")  # what the callbacks take for a step


@dataclass(eq=False)
class Shown:
    """A trial as far as a tracker is told of it."""

    name: str
    trial_id: str
    config: dict[str, Any]
    experiment_dir_name: str
    local_path: str

    def __str__(self) -> str:
        return self.name


class Tracked(tune.Callback):
    """One of Ray's callbacks, which gets settings and figures alone; once it fails it is not called again.

    Args:
        tracker: ``mlflow`` or ``wandb``.
        base: settings that the trials have in common.
        columns: figures that are sent.
        group: what the trials stand under.

    Attributes:
        warning: what failed, in words.
    """

    def __init__(self, tracker: str, base: UnlearnConfig, columns: Collection[str], group: str) -> None:
        self.tracker, self.base, self.columns = tracker, base, {*columns, *COUNTED}
        self.warning: str | None = None
        self.shown: dict[str, Shown] = {}
        self.inner: Any = None
        self._call(self._make, group)

    def _make(self, group: str) -> None:
        if self.tracker == "mlflow":
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            self.inner = MLflowLoggerCallback(experiment_name=project_of("mlflow"), tags={"sweep": group})
        else:
            from ray.air.integrations.wandb import WandbLoggerCallback

            only = {"upload_timeout": UPLOAD_SECONDS, "settings": wandb_settings()}
            self.inner = WandbLoggerCallback(project_of("wandb"), group, **only)

    def _call(self, function: Any, *arguments: Any) -> None:
        if self.warning is not None:
            return
        try:
            (getattr(self.inner, function) if isinstance(function, str) else function)(*arguments)
        except Exception as error:  # of many kinds, and none of them ends a sweep
            self.warning = failed(self.tracker, error)

    def _of(self, trial: Any) -> Shown:
        if trial.trial_id not in self.shown:
            chosen = trial.config["trial"]
            settings = shown_settings(self.base.with_overrides(chosen["overrides"]))
            self.shown[trial.trial_id] = Shown(
                chosen["name"], trial.trial_id, settings, trial.experiment_dir_name, trial.local_path
            )
        return self.shown[trial.trial_id]

    def setup(self, *arguments: Any, **info: Any) -> None:
        """Before the first trial."""
        self._call("setup")

    def on_trial_start(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """A trial begins, or begins again."""
        self._call("log_trial_start", self._of(trial))

    def on_trial_result(
        self, iteration: int, trials: Sequence[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        """Figures of a check, or of the end."""
        kept = {key: value for key, value in result.items() if key in self.columns}
        counted = {key: value for key, value in kept.items() if key in COUNTED}
        self._call("log_trial_result", iteration, self._of(trial), {**numbers_of(kept), **counted})

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Finished, or stopped early."""
        self._call("log_trial_end", self._of(trial), False)

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Failed more often than it may be retried."""
        self._call("log_trial_end", self._of(trial), True)

    def on_experiment_end(self, trials: Sequence[Any], **info: Any) -> None:
        """After the last trial."""
        self._call("on_experiment_end", list(self.shown.values()))
