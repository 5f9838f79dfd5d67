"""Many runs that share one forward pass: Ray Tune over any setting, with the size of the forget set as the first axis."""

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from torch import nn

from imu_ray.audits.sweep_report import render_sweep
from imu_ray.config import UnlearnConfig
from imu_ray.distributed.session import ray_session, slots
from imu_ray.distributed.train_job import Trial
from imu_ray.errors import CheckpointError, ConfigError
from imu_ray.events import event
from imu_ray.experiments.axes import SIZE, SweepConfig, largest_size, make_trials
from imu_ray.inputs import Inputs
from imu_ray.models.checkpoint import model_hash
from imu_ray.models.spec import ModelSpec
from imu_ray.pipeline import Pipeline, resolve_settings
from imu_ray.run.directory import MANIFEST, RunDirectory, default_run_dir
from imu_ray.run.storage import below

RECORD = "sweep.json"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep gives back.

    Attributes:
        sweep_dir: where everything lies; each trial has a run directory under ``trials/``.
        table: a row per trial, as in ``results.parquet``.
        best: name of the best trial per forget-set size (the value of the axis, as text), where one reached its target.
    """

    sweep_dir: Path | str
    table: pa.Table
    best: dict[str, str]


def sweep(
    model: nn.Module | ModelSpec,
    forget_set: Any,
    axes: Mapping[str, Any],
    *,
    task: str = "classification",
    evaluation: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    config: UnlearnConfig | None = None,
    settings: SweepConfig | None = None,
    sweep_dir: str | Path | None = None,
    resume: bool = False,
) -> SweepResult:
    """Run a trial for every combination of ``axes``, on features that are computed once (``influence.features=recompute``: by every stage).

    Args:
        model: as in ``unlearn``.
        forget_set: as in ``unlearn``; with the axis ``forget_set.size`` the model runs over the largest size only.
        axes: dotted setting to a list of values, or to a ``ray.tune`` distribution (``tune.loguniform(1e-4, 1e-1)``).
        task: as in ``unlearn``.
        evaluation: as in ``unlearn``; ``"retain"`` and ``"test"`` also serve the choice of the best trial.
        recipe: as in ``unlearn``.
        config: what the trials have in common.
        settings: how trials are made, run and chosen.
        sweep_dir: directory or URI of the results; default ``runs/<time>-<id>``.
        resume: go on with the sweep in ``sweep_dir``; finished trials are not repeated.

    Returns:
        The results; the same is on disk as ``results.parquet`` and ``sweep.html``. Failed trials are rows with status ``failed``.

    Raises:
        ConfigError: an axis or a value is not valid; nothing has been run.
        CheckpointError: ``sweep_dir`` holds something else, the same sweep and ``resume`` is false, or one on another model or other samples.
    """
    base, settings = resolve_settings(recipe, config), settings or SweepConfig()
    trials = make_trials(axes, base, settings)
    run = RunDirectory(sweep_dir or default_run_dir())
    choose_by = settings.choose_by
    if choose_by == "auto" and "retain" in (evaluation or {}):
        choose_by = "retain_accuracy"
    if choose_by.removesuffix("_accuracy") in {"retain", "test"} - set(evaluation or {}):
        raise ConfigError(f"sweep.choose_by is {choose_by!r}, but there is no such evaluation set; give it, or use output_change")
    record = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "identity": hashlib.sha256(json.dumps([base.identity(), trials, settings.scheduler], sort_keys=True).encode()).hexdigest(),
        "axes": {key: str(value) for key, value in axes.items()},
        "choose_by": choose_by,
        "trials": trials,
    }
    record = _begin(run, record, resume)
    pending = {name: overrides for name, overrides in trials.items() if (_row(run, name) or {"status": "failed"})["status"] == "failed"}
    event("sweep begun", trials=len(trials), finished=len(trials) - len(pending), sweep_dir=str(run.location))
    if pending:
        largest = base.with_overrides({SIZE: largest_size([base.with_overrides(trial).forget_set.size for trial in trials.values()])})
        inputs = Inputs.open(model, forget_set, task, evaluation, largest)
        with ray_session(base.resources):
            inputs = inputs.extract(largest)
            record = _same_inputs(run, record, inputs)
            shared = Shared(inputs.without_sources(), base, str(run.location), settings.scheduler == "asha")
            _run_trials(pending, shared, settings, run)
    return _collect(run, record, list(evaluation or {}))


def _begin(run: RunDirectory, record: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The record of this sweep, or of the same one that was begun before."""
    run.storage.check_writable()
    begun: dict[str, Any] | None = run.read_json(RECORD)
    if begun is None and run.storage.entries():
        raise CheckpointError(f"sweep_dir {run.location} holds files but no {RECORD}; expected an empty or new directory")
    if begun is not None and begun["identity"] != record["identity"]:
        raise CheckpointError(f"sweep_dir {run.location} holds a sweep with other settings or axes; expected the same, or a new directory")
    if begun is not None and not resume:
        raise CheckpointError(f"sweep_dir {run.location} holds this sweep already; pass resume=True (--resume) to go on with it")
    if begun is None:
        run.write_json(RECORD, record)
    return begun or record


def _same_inputs(run: RunDirectory, record: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    """The record with the digests of model and samples, which a sweep that goes on must share with the finished trials."""
    digests = {"model": model_hash(inputs.model), **inputs.digests()}
    if "inputs" in record:
        run.check_inputs(record, digests)
    else:
        run.write_json(RECORD, record | {"inputs": digests})
    return record | {"inputs": digests}


@dataclass(frozen=True)
class Shared:
    """What all trials have in common."""

    inputs: Inputs
    base: UnlearnConfig
    sweep_dir: str
    stops_early: bool


def _run_trials(pending: Mapping[str, dict[str, Any]], shared: Shared, settings: SweepConfig, run: RunDirectory) -> None:
    resources = shared.base.resources
    asha = ASHAScheduler(metric="forget_accuracy", mode="min", grace_period=2, max_t=10**6) if settings.scheduler == "asha" else None
    # A trial itself waits for its tasks and takes no room (Tune wants some resource: a byte), so that a worker group of all CPUs still
    # fits beside it; more trials at a time than fit would starve each other.
    trainable = tune.with_resources(tune.with_parameters(_run_trial, shared=shared), {"CPU": 0, "memory": 1})
    rows = _Rows(run)
    named = [{"name": name, "overrides": overrides} for name, overrides in pending.items()]
    tuner = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(named)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=max(1, slots(resources) // resources.workers),
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
            callbacks=[rows],
            verbose=0,
        ),
    )
    tuner.fit()
    rows.write_failed()


def _name_of(trial: Any) -> str:
    return str(trial.config["trial"]["name"])


def _run_trial(config: Mapping[str, Any], shared: Shared) -> None:
    """One trial: every stage but the features. It is the driver of its own tasks, outside the room that Tune gave it."""
    name, overrides = config["trial"]["name"], config["trial"]["overrides"]
    run = RunDirectory(below(shared.sweep_dir, "trials", name))
    settings = shared.base.with_overrides(overrides)
    ended = run.read_json(MANIFEST) or {}
    if (ended.get("status"), ended.get("config_identity")) == ("complete", settings.identity()):
        # What became of it was lost on the way, with the driver or with this process.
        manifest, metrics = ended, run.read_json("metrics.json")
    else:
        job = Pipeline("unlearn", shared.inputs, settings, run)
        if shared.stops_early:  # a report per check costs Tune more than the check
            job.trial = Trial(tune.report, [TuneReportCallback()])
        with job.recorded():
            job.take_inputs()
            result = job.unlearn(shared.inputs.model)
        manifest, metrics = result.manifest, result.metrics
    tune.report(_figures(manifest, metrics, shared.inputs.task.num_classes))


def _figures(manifest: Mapping[str, Any], metrics: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """What the row of a finished trial says of its run."""
    after = metrics["after"]
    sets = {f"{name}_accuracy": figures["accuracy"] for name, figures in after.items() if name != "membership"}
    return {
        "status": manifest["ascent"]["status"],
        "reason": manifest["ascent"]["reason"],
        "label_share": len(manifest["forget_set"]["label_counts"]) / num_classes,
        "steps": manifest["ascent"]["steps"],
        "forget_accuracy_before": metrics["before"]["forget"]["accuracy"],
        "forget_loss": after["forget"]["loss"],
        **sets,
        "membership": after["membership"].get("balanced_accuracy"),
        "output_change": manifest["ascent"]["output_change"],
        "parameter_drift": manifest["ascent"]["parameter_drift"],
        "seconds": round(sum(manifest["seconds"].values()), 3),
    }


class _Rows(tune.Callback):
    """Writes the row of each trial when it ends, so that a sweep that dies has lost none that was finished."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.failed: list[Any] = []

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Finished, or stopped early by the scheduler."""
        last = dict(trial.last_result or {})
        self._write(trial, {"status": "stopped_early", "reason": "stopped by the scheduler", "steps": last.get("step"), **last})

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
        kept = {key: value for key, value in figures.items() if key in COLUMNS or key.endswith("_accuracy")}
        run_dir = below(self.run.location, "trials", chosen["name"])
        manifest = RunDirectory(run_dir).read_json(MANIFEST)  # a trial that was stopped early has no more than that
        rows = manifest["forget_set"]["rows_used"] if manifest else None
        row = {"trial": chosen["name"], **chosen["overrides"], **dict.fromkeys(COLUMNS), "rows": rows, **kept, "run_dir": run_dir}
        self.run.write_json(f"rows/{chosen['name']}.json", row)
        event("trial ended", trial=chosen["name"], status=row["status"])


COLUMNS = ("rows", "label_share", "status", "reason", "steps", "forget_accuracy_before", "forget_accuracy", "forget_loss", "membership", "output_change",
           "parameter_drift", "seconds")  # fmt: skip


def _row(run: RunDirectory, name: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = run.read_json(f"rows/{name}.json")
    return found


def _collect(run: RunDirectory, record: Mapping[str, Any], sets: list[str]) -> SweepResult:
    """Rows of all trials, the best of each size, and the page."""
    rows = [_row(run, name) or {"trial": name, **overrides, **dict.fromkeys(COLUMNS), "status": "not_run"}
            for name, overrides in record["trials"].items()]  # fmt: skip
    columns = list(dict.fromkeys(["trial", *record["axes"], *COLUMNS, *(f"{name}_accuracy" for name in sets), "run_dir"]))
    axis_text = {SIZE} & set(record["axes"])  # counts, shares and lists of classes in one column are text
    rows = [{key: row.get(key) for key in columns} | {key: json.dumps(row[key]) for key in axis_text} for row in rows]
    best = {}
    for size in dict.fromkeys(row.get(SIZE) for row in rows):
        name = best_trial([row for row in rows if row.get(SIZE) == size], record["choose_by"])
        if name is not None:
            best[str(size)] = name
    table = pa.Table.from_pylist(rows)
    run.write_table("results.parquet", table)
    run.write_text("sweep.html", render_sweep(record, rows, sets, best.values()))
    counts = {status: sum(row["status"] == status for row in rows) for status in dict.fromkeys(row["status"] for row in rows)}
    event("sweep ended", **counts)
    return SweepResult(run.location, table, best)


def best_trial(rows: Sequence[Mapping[str, Any]], choose_by: str) -> str | None:
    """Name of the best among the trials that reached their target; the first of equals; None when none did.

    ``auto`` is what agreed with the retain accuracy in tests/benchmarks/study_selection.py: least change of the outputs where the
    forget set holds fewer than half of the classes, least drift of the head where it holds more.
    """
    reached = [row for row in rows if row["status"] == "reached"]
    if choose_by == "auto" and reached:
        choose_by = "output_change" if reached[0]["label_share"] < 0.5 else "parameter_drift"
    judged = [row for row in reached if row.get(choose_by) is not None]
    sign = -1 if choose_by.endswith("_accuracy") else 1
    return min(judged, key=lambda row: sign * row[choose_by])["trial"] if judged else None
