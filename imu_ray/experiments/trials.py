"""The trials of a sweep on Ray Tune: how many at a time, what each does, and the row that it leaves."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from imu_ray.audits import AUDITS
from imu_ray.config import SweepConfig, UnlearnConfig
from imu_ray.distributed.session import slots
from imu_ray.distributed.sharing import own_code_by_value
from imu_ray.distributed.train_job import Trial
from imu_ray.events import event
from imu_ray.experiments.tracked import Tracked
from imu_ray.inputs import Inputs
from imu_ray.pipeline import Pipeline
from imu_ray.run.directory import MANIFEST, RunDirectory
from imu_ray.run.metrics import read_metrics
from imu_ray.run.storage import below


def metric_of(name: str, metric: str = "accuracy") -> str:
    """The column of a metric of a sample set, named as a check of the ascent names it."""
    return f"{name}.{metric}"


AFTER, LOSS = metric_of("forget"), metric_of("forget", "loss")
BEFORE = f"{AFTER}_before"
COLUMNS = (
    "rows", "label_share", "status", "reason", "steps", BEFORE, AFTER, LOSS, "membership", "output_change",
    "parameter_drift", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Shared:
    """What all trials have in common."""

    inputs: Inputs
    base: UnlearnConfig
    sweep_dir: str
    stops_early: bool


def run_trials(
    pending: Mapping[str, dict[str, Any]],
    shared: Shared,
    settings: SweepConfig,
    run: RunDirectory,
    tracking: str | None = None,
) -> list[str]:
    """Run trials to their rows, as many at a time as fit, and give warnings; ``KeyboardInterrupt`` after Ctrl-C."""
    # Tune's box and its advice to restore a trial would stand between our lines. It reads both when it runs.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune.tune").setLevel(logging.ERROR)
    asha = ASHAScheduler(metric=AFTER, mode="min", grace_period=2, max_t=10**6) if shared.stops_early else None
    # A trial itself waits for its tasks and takes no room (Tune wants some resource: a byte), so that a worker group of
    # all CPUs still fits beside it; more trials at a time than fit would starve each other.
    with own_code_by_value():
        trainable = tune.with_resources(tune.with_parameters(_run_trial, shared=shared), {"CPU": 0, "memory": 1})
    rows = Rows(run, [metric_of(name) for name in shared.inputs.names])
    group = str(run.location).rpartition("/")[2]
    tracked = [Tracked(tracking, shared.base, rows.columns, group)] if tracking else []
    named = [{"name": name, "overrides": overrides} for name, overrides in pending.items()]
    tuner = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(named)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=max(1, slots(shared.base.resources) // shared.base.resources.tasks),
            scheduler=asha,
            reuse_actors=True,  # a new process for each trial would spend seconds on imports
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=run.storage.root,
            storage_filesystem=run.storage.filesystem,
            failure_config=tune.FailureConfig(max_failures=settings.max_retries),
            callbacks=[rows, *tracked],
            verbose=0,
        ),
    )
    tuner.fit()
    rows.write_failed()
    left = len(pending) - rows.written
    if left:  # Tune stops the trials, restores the handler of the signal, and returns as if all were well
        advice = "the same call with resume continues it"
        event("sweep interrupted", level=logging.WARNING, trials_left=left, advice=advice)
        raise KeyboardInterrupt
    return [each.warning for each in tracked if each.warning is not None]


def _name_of(trial: Any) -> str:
    return str(trial.config["trial"]["name"])


def _run_trial(config: Mapping[str, Any], shared: Shared) -> None:
    """One trial: every stage but the features. It drives its own tasks, outside the room that Tune gave it."""
    name, overrides = config["trial"]["name"], config["trial"]["overrides"]
    run = RunDirectory(below(shared.sweep_dir, "trials", name))
    settings = shared.base.with_overrides(overrides)
    ended = run.read_json(MANIFEST) or {}
    if (ended.get("status"), ended.get("config_identity")) == ("complete", settings.identity()):
        # What became of it was lost on the way, with the driver or with this process.
        manifest, metrics = ended, read_metrics(run)
    else:
        # A report per check costs Tune more than the check.
        trial = Trial(tune.report, [TuneReportCallback()]) if shared.stops_early else None
        job = Pipeline("unlearn", shared.inputs, settings, run, trial=trial)
        with run.locked(), job.recorder.ending():
            job.take_inputs()
            job.doubt()
            result = job.unlearn(shared.inputs.model)
        manifest, metrics = result.manifest, result.metrics
    tune.report(_figures(manifest, metrics, shared.inputs.task.num_classes))


def _figures(manifest: Mapping[str, Any], metrics: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """What the row of a finished trial says of its run."""
    after, ascent = metrics["after"], manifest["ascent"]
    return {
        **{key: ascent[key] for key in ("status", "reason", "steps", "output_change", "parameter_drift")},
        **{metric_of(name): figures["accuracy"] for name, figures in after.items() if name not in AUDITS},
        "label_share": len(manifest["forget_set"]["label_counts"]) / num_classes,
        BEFORE: metrics["before"]["forget"]["accuracy"],
        LOSS: after["forget"]["loss"],
        "membership": after["membership"].get("balanced_accuracy"),
        "seconds": round(sum(manifest["seconds"].values()), 3),
    }


class Rows(tune.Callback):  # type: ignore[misc]
    """Writes the row of each trial when it ends, so that a sweep that dies has lost none that was finished."""

    def __init__(self, run: RunDirectory, measured: Sequence[str]) -> None:
        self.run, self.columns = run, {*COLUMNS, *measured}
        self.failed: list[Any] = []
        self.written = 0

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Finished, or stopped early by the scheduler."""
        last = dict(trial.last_result or {})
        stopped = {"status": "stopped_early", "reason": "stopped by the scheduler", "steps": last.get("step")}
        self._write(trial, {**stopped, **last})

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Failed more often than it may be retried."""
        self.failed.append(trial)  # Tune stores the error only after this call

    def write_failed(self) -> None:
        """Rows of the failed trials, with what stopped them."""
        for trial in self.failed:
            error = trial.get_pickled_error()
            cause = getattr(error, "cause", None) or error
            last = str(cause).strip().splitlines() or [""]
            self._write(trial, {"status": "failed", "reason": f"{type(cause).__name__}: {last[-1]}"})

    def _write(self, trial: Any, figures: Mapping[str, Any]) -> None:
        chosen = trial.config["trial"]
        kept = {key: value for key, value in figures.items() if key in self.columns}
        run_dir = below(self.run.location, "trials", chosen["name"])
        manifest = RunDirectory(run_dir).read_json(MANIFEST)  # a trial that was stopped early has no more than that
        rows = manifest["forget_set"]["rows_used"] if manifest else None
        row = {"trial": chosen["name"], **chosen["overrides"], **dict.fromkeys(COLUMNS), "rows": rows, **kept}
        row["run_dir"] = run_dir
        self.run.write_json(f"rows/{chosen['name']}.json", row)
        self.written += 1
        event("trial ended", trial=chosen["name"], status=row["status"])


def read_row(run: RunDirectory, name: str) -> dict[str, Any] | None:
    """The row of a trial that has ended, or None."""
    found: dict[str, Any] | None = run.read_json(f"rows/{name}.json")
    return found
