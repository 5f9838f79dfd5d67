"""A job's configuration file and command line, shared by every entry point in ``jobs/``."""

import argparse
import functools
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imu_ray.config import UnlearnConfig
from imu_ray.distributed.session import submitted_job
from imu_ray.errors import ConfigError, EmptySelectionError, ImuError, StageFailedError
from imu_ray.events import event, log_events
from imu_ray.experiments.axes import SweepConfig, read_axes
from imu_ray.models.spec import ModelSpec
from imu_ray.planning import plan
from imu_ray.run.directory import default_run_dir
from imu_ray.settings import flatten, nearest, parse_assignment, read_yaml, replace_settings, settings_of

_JOB_KEYS = ("forget_set.path", "run_dir", "task", "recipe")


@dataclass(frozen=True)
class JobConfig:
    """What a job's YAML file says: the arguments of ``unlearn`` and all settings."""

    model: ModelSpec
    forget_set: str
    config: UnlearnConfig
    evaluation: Mapping[str, str] = field(default_factory=dict)
    original: ModelSpec | None = None
    run_dir: Path | str = field(default_factory=default_run_dir)
    task: str = "classification"
    axes: Mapping[str, Any] = field(default_factory=dict)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    resume: bool = False

    @classmethod
    def load(cls, path: str | Path, assignments: list[str] | None = None, resume: bool = False) -> "JobConfig":
        """Read YAML, then apply ``dotted.key=value`` assignments; the recipe comes first, whatever the order.

        ``axes`` and ``sweep`` are read by ``jobs/sweep.py`` and left alone by the others.

        Raises:
            ConfigError: a key is unknown or missing, or a value is out of range.
        """
        values = dict(flatten(read_yaml(path))) | dict(parse_assignment(text) for text in assignments or [])
        texts = ("model.factory", "model.checkpoint", "original.checkpoint", "forget_set.path", "run_dir", "task", "recipe")
        for key, value in values.items():
            if (key in texts or key.startswith("evaluation.")) and not isinstance(value, str):
                raise ConfigError(f"{key} in {path} is {value!r}; expected text")
            if key in ("model", "original", "evaluation", "forget_set") or (key.startswith("evaluation.") and key.count(".") > 1):
                expected = {"evaluation": "a path per name, evaluation: {test: /path}", "forget_set": "forget_set: {path: /path}"}
                raise ConfigError(f"{key} in {path} is {value!r}; expected {expected.get(key.split('.')[0], key + ': {factory: ...}')}")
        parts: dict[str, dict[str, Any]] = {"model": {}, "original": {}, "evaluation": {}, "axes": {}, "sweep": {}}
        plain: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        for key, value in values.items():
            head, _, rest = key.partition(".")
            if head in parts and rest:
                parts[head][rest] = value
            elif key in _JOB_KEYS:
                plain[key] = value
            elif key in settings_of(UnlearnConfig):
                settings[key] = value
            else:
                raise ConfigError(f"unknown setting {key!r} in {path}; {nearest(key, [*settings_of(UnlearnConfig), *_JOB_KEYS])}")
        if not isinstance(plain.get("forget_set.path"), str):
            raise ConfigError(f"{path} has no forget_set.path; expected the path or URI of the samples to forget")
        run_dir = plain.get("run_dir")
        if submitted_job() is not None and "://" not in str(run_dir) and not Path(run_dir or "").is_absolute():
            raise ConfigError(
                f"run_dir is {run_dir!r} under `ray job submit`, whose working directory is temporary, so that the result would be lost; "
                "expected an absolute path on storage that the nodes share, or a URI (s3://bucket/path)"
            )
        config = UnlearnConfig.from_recipe(plain.get("recipe", "paper")).with_overrides(settings)
        original = _model_spec("original", parts["original"], path) if parts["original"] else None
        return cls(
            _model_spec("model", parts["model"], path), plain["forget_set.path"], config, parts["evaluation"], original,
            run_dir or default_run_dir(), plain.get("task", "classification"), read_axes(parts["axes"]), _sweep_config(parts["sweep"], path), resume,
        )  # fmt: skip


def _sweep_config(values: Mapping[str, Any], path: str | Path) -> SweepConfig:
    for key in values:
        if key not in settings_of(SweepConfig):
            raise ConfigError(f"unknown setting {'sweep.' + key!r} in {path}; {nearest(key, settings_of(SweepConfig))}")
    return replace_settings(SweepConfig(), values)


def _model_spec(role: str, values: Mapping[str, Any], path: str | Path) -> ModelSpec:
    keys = ("factory", "checkpoint", "head")
    named: dict[str, Any] = {"kwargs": {}}
    for key, value in values.items():
        if key.startswith("kwargs."):
            *outer, last = key.split(".")[1:]
            inner = functools.reduce(lambda level, name: level.setdefault(name, {}), outer, named["kwargs"])
            inner[last] = value
        elif key in keys:
            named[key] = value
        else:
            raise ConfigError(f"unknown setting {role + '.' + key!r} in {path}; {nearest(key, [*keys, 'kwargs'])}")
    if not isinstance(named.get("factory"), str):
        raise ConfigError(f"{path} has no {role}.factory; expected 'package.module:callable' or a torchvision classifier")
    return ModelSpec(**named)


def _warn_of_credentials() -> None:
    """Say that the runtime environment of the submitted job shows what looks like a credential."""
    variables = ((submitted_job() or {}).get("runtime_env") or {}).get("env_vars") or {}
    shown = sorted(name for name in variables if re.search("SECRET|TOKEN|PASSWORD|CREDENTIAL|ACCESS_KEY", name.upper()))
    if shown:
        advice = "the dashboard shows it to everyone; take it out and give the nodes a role, or mount a secret"
        event("credentials in the runtime environment", level=logging.WARNING, variables=", ".join(shown), advice=advice)


def _plan(job: JobConfig) -> dict[str, Any]:
    """The plan, with its figures in words on standard error."""
    made = plan(job.model, job.forget_set, task=job.task, evaluation=job.evaluation, config=job.config)
    lines = [f"{name}: {part['samples']:,} samples, {part['shards']:,} shards, {part['feature_bytes'] / 1e6:,.1f} MB of features"
             for name, part in made["sets"].items()]  # fmt: skip
    lines += [f"{key.replace('_', ' ')}: {value / 1e6:,.1f} MB at most" for key, value in made["peak_bytes"].items()]
    lines += [
        f"{made['seconds']['without_ascent']:,.1f} s on {made['workers']} workers, the ascent not included (estimate)",
        *made["notes"],
    ]
    print("\n".join(lines), file=sys.stderr)
    return {"run_dir": None, "plan": made}


def run_job(description: str, stage: Callable[[JobConfig], Mapping[str, Any]], *, resumable: bool = False, plannable: bool = False) -> None:
    """Run one stage from the command line and exit.

    The last line of standard output is one JSON object, what ``stage`` returned. Exit status 0; 2 for a bad configuration or
    input; 1 for a failed run; 130 when interrupted.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, required=True, help="YAML file with model, forget_set, evaluation and settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting; repeatable")
    if plannable:
        parser.add_argument("--plan", action="store_true", help="say what the run will cost, and run nothing")
    if resumable:
        parser.add_argument("--resume", action="store_true", help="go on with what run_dir holds; finished trials are not repeated")
    options = parser.parse_args()
    log_events("text")
    try:
        job = JobConfig.load(options.config, options.set, resumable and options.resume)
        log_events(job.config.log)
        _warn_of_credentials()
        result = _plan(job) if plannable and options.plan else stage(job)
    except ImuError as error:
        event("job failed", level=logging.ERROR, error=f"{type(error).__name__}: {error}")
        sys.exit(1 if isinstance(error, StageFailedError | EmptySelectionError) else 2)
    except KeyboardInterrupt:
        event("job interrupted", level=logging.ERROR)
        sys.exit(130)
    print(json.dumps(result), flush=True)
