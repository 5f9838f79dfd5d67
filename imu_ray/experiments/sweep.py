"""Many runs that share one forward pass: Ray Tune over any setting, the size of the forget set first."""

import collections
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn

from imu_ray.audits.sweep_report import render_sweep
from imu_ray.config import SweepConfig, UnlearnConfig
from imu_ray.distributed.session import ray_session
from imu_ray.distributed.tracking import require_tracker
from imu_ray.errors import CheckpointError, ConfigError
from imu_ray.events import event
from imu_ray.experiments.axes import SETS, SIZE, largest_size, make_trials
from imu_ray.experiments.trials import COLUMNS, Shared, metric_of, read_row, run_trials
from imu_ray.inputs import Inputs
from imu_ray.models.checkpoint import model_hash
from imu_ray.models.spec import ModelSpec
from imu_ray.recipes import require_classes, resolve_settings, settle_scope
from imu_ray.run.directory import RunDirectory, default_run_dir
from imu_ray.run.record import now

RECORD = "sweep.json"
MET = ("reached", "already_met")  # statuses of trials that meet their target


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
    """Run a trial for every combination of ``axes``, on features that are computed once if they are kept.

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
        resume: continue the sweep in ``sweep_dir``; finished trials are not repeated.

    Returns:
        The results; the same is on disk as ``results.parquet`` and ``sweep.html``. Failed trials are rows too.

    Raises:
        ConfigError: an axis or a value is not valid; nothing has been run.
        CheckpointError: ``sweep_dir`` is in use, or holds something else: other files, a sweep with other settings,
            model or samples, or an unfinished one and ``resume`` is false.
        KeyboardInterrupt: Ctrl-C, once the trials have stopped; the same call with ``resume`` continues.
    """
    base, settings = resolve_settings(recipe, config, task), settings or SweepConfig()
    require_classes(base, "a sweep")
    trials = make_trials(axes, base, settings, task)
    require_tracker(base.tracking)
    run = RunDirectory(sweep_dir or default_run_dir())
    stop = base.ascent.stop  # its limits are not part of what makes two runs the same
    settled = [base.identity(), stop.max_epochs, stop.max_steps, trials, settings.scheduler]
    record = {
        "created": now(),
        "resumed": [],
        "identity": hashlib.sha256(json.dumps(settled, sort_keys=True).encode()).hexdigest(),
        "axes": {key: str(value) for key, value in axes.items()},
        "choose_by": _choice(settings.choose_by, evaluation or {}),
        "trials": trials,
    }
    with run.locked():
        ended = {name: (read_row(run, name) or {"status": "failed"})["status"] for name in trials}
        pending = {name: trial for name, trial in trials.items() if ended[name] == "failed"}
        record = _begin(run, record, len(pending), resume)
        event("sweep begun", trials=len(trials), finished=len(trials) - len(pending), sweep_dir=str(run.location))
        if pending:
            sizes = [base.with_overrides(trial).forget_set.size for trial in trials.values()]
            largest = base.with_overrides({SIZE: largest_size(sizes)})
            inputs = Inputs.open(model, forget_set, task, evaluation, largest)
            largest = settle_scope(largest, inputs.task)
            with ray_session(base.resources) as resources:
                inputs = inputs.extract(largest.with_overrides({"resources.workers": resources.workers}))
                record = _same_inputs(run, record, inputs)
                # Trials run side by side, so that each needs one worker unless told otherwise.
                each = 1 if base.resources.workers == "auto" else base.resources.workers
                shared_settings = base.with_overrides({"resources.workers": each, "tracking": None})
                stops_early = settings.scheduler == "asha"
                shared = Shared(inputs.without_sources(), shared_settings, str(run.location), stops_early)
                if warnings := run_trials(pending, shared, settings, run, base.tracking):
                    record = {**record, "warnings": warnings}
                    run.write_json(RECORD, record)
        return _collect(run, record, list(evaluation or {}))


def _choice(choose_by: str, evaluation: Mapping[str, Any]) -> str:
    if choose_by == "auto" and "retain" in evaluation:
        return "retain"
    if choose_by in set(SETS) - set(evaluation):
        reason = "there is no such evaluation set; give it, or use output_change"
        raise ConfigError(f"sweep.choose_by is {choose_by!r}; {reason}")
    return choose_by


def _begin(run: RunDirectory, record: dict[str, Any], pending: int, resume: bool) -> dict[str, Any]:
    """The record of this sweep, or of the same one that was begun before."""
    begun: dict[str, Any] | None = run.read_json(RECORD)
    if begun is None:
        if run.storage.entries():
            raise CheckpointError(f"sweep_dir {run.location} holds files but no {RECORD}; expected a new directory")
        run.write_json(RECORD, record)
        return record
    if begun["identity"] != record["identity"]:
        raise CheckpointError(
            f"sweep_dir {run.location} holds a sweep with other settings or axes; expected the same, or a new directory"
        )
    if not pending:
        event("this sweep is finished; nothing is left to do", sweep_dir=str(run.location))
        return begun
    if not resume:
        raise CheckpointError(
            f"sweep_dir {run.location} holds this sweep, of which {pending} trials are left; expected resume=True "
            "(--resume) to continue it, or a new directory"
        )
    begun = {**begun, "resumed": [*begun["resumed"], now()]}
    run.write_json(RECORD, begun)
    return begun


def _same_inputs(run: RunDirectory, record: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    """The record with the digests of model and samples, which all trials must share."""
    digests = {"model": model_hash(inputs.model), **inputs.digests()}
    if "inputs" in record:
        run.check_inputs(record, digests)
    else:
        run.write_json(RECORD, record | {"inputs": digests})
    return record | {"inputs": digests}


def _collect(run: RunDirectory, record: Mapping[str, Any], sets: list[str]) -> SweepResult:
    """Rows of all trials, the best of each size, and the page."""
    unread = {**dict.fromkeys(COLUMNS), "status": "not_run"}
    trials = record["trials"].items()
    rows = [read_row(run, name) or {"trial": name, **overrides, **unread} for name, overrides in trials]
    measured = {name: metric_of(name) for name in ("forget", *sets)}
    columns = list(dict.fromkeys(["trial", *record["axes"], *COLUMNS, *measured.values(), "run_dir"]))
    axis_text = {SIZE} & set(record["axes"])  # counts, shares and lists of classes in one column are text
    rows = [{key: row.get(key) for key in columns} | {key: json.dumps(row[key]) for key in axis_text} for row in rows]
    best = {}
    for size in dict.fromkeys(row.get(SIZE) for row in rows):
        if name := best_trial([row for row in rows if row.get(SIZE) == size], record["choose_by"]):
            best[str(size)] = name
    table = pa.Table.from_pylist(rows)
    run.write_table("results.parquet", table)
    run.write_text("sweep.html", render_sweep(record, rows, measured, best.values()))
    event("sweep ended", **collections.Counter(row["status"] for row in rows))
    return SweepResult(run.location, table, best)


def best_trial(rows: Sequence[Mapping[str, Any]], choose_by: str) -> str | None:
    """Name of the best among the trials that reached their target; the first of equals; None when none did.

    ``auto`` is what agreed with the retain accuracy (tests/benchmarks/results/selection-2026-11-21.json): least change
    of the outputs where the forget set holds fewer than half of the classes, least drift of the head otherwise.
    """
    met = [row for row in rows if row["status"] in MET]
    if choose_by == "auto" and met:
        choose_by = "output_change" if met[0]["label_share"] < 0.5 else "parameter_drift"
    column, sign = (metric_of(choose_by), -1) if choose_by in SETS else (choose_by, 1)
    judged = [row for row in met if row.get(column) is not None]
    return min(judged, key=lambda row: sign * row[column])["trial"] if judged else None
