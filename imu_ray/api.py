"""The public functions: score, ascend, audit, and unlearn, which is all three."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn

from imu_ray.config import UnlearnConfig
from imu_ray.errors import ConfigError
from imu_ray.models.spec import ModelSpec
from imu_ray.pipeline import Pipeline
from imu_ray.recipes import resolve_settings
from imu_ray.run.directory import INTENSITIES
from imu_ray.run.result import UnlearnResult


def unlearn(
    model: nn.Module | ModelSpec,
    forget_set: Any,
    *,
    task: str = "classification",
    evaluation: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    config: UnlearnConfig | None = None,
    run_dir: str | Path | None = None,
) -> UnlearnResult:
    """Make a model forget: score the forget set, move its head to the target, audit the result.

    Args:
        model: a live module (not modified) or a ``ModelSpec``.
        forget_set: path or URI of Parquet files, folder of images, ``pyarrow.Table`` or map-style torch Dataset.
        task: kind of task.
        evaluation: sets that are measured and never trained on; ``"test"`` (unseen samples) also serves the automatic stop
            rule and membership inference.
        recipe: named settings: ``auto``, ``samples``, ``classes`` or ``paper``; excludes ``config``.
        config: all settings.
        run_dir: directory of the artifacts; default ``runs/<time>-<id>``. An unfinished run of the same settings and samples
            is taken up where it stopped.

    Returns:
        The unlearned copy and the record; the same is on disk.

    Raises:
        ImuError: see ``imu_ray.errors``; nothing is overwritten.
    """
    settings = resolve_settings(recipe, config)
    with Pipeline.open("unlearn", model, forget_set, task, evaluation, settings, run_dir) as job:
        return job.unlearn(_as_held(model, job))


def score(
    model: nn.Module | ModelSpec,
    forget_set: Any,
    *,
    task: str = "classification",
    recipe: str | None = None,
    config: UnlearnConfig | None = None,
    run_dir: str | Path | None = None,
) -> pa.Table:
    """Influence and intensity of every sample of the forget set.

    Arguments as in ``unlearn``; the table is also written to ``run_dir`` when one is given.

    Returns:
        ``sample_id, label, loss, influence, gradient_norm, outlier, intensity`` in the order of the forget set; intensity is 0 where not kept.
    """
    with Pipeline.open(
        "score", model, forget_set, task, None, resolve_settings(recipe, config), run_dir, write=run_dir is not None
    ) as job:
        if job.finished:
            return job.run.read_table(INTENSITIES)
        scored = job.score()
        job.recorder.complete()
        return pa.concat_tables(scored.table())


def ascend(
    model: nn.Module | ModelSpec,
    forget_set: Any,
    intensities: pa.Table,
    *,
    task: str = "classification",
    evaluation: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    config: UnlearnConfig | None = None,
    run_dir: str | Path | None = None,
) -> UnlearnResult:
    """Ascend with given intensities (as ``score`` returns them); arguments and result as in ``unlearn``, without the audit.

    Raises:
        ForgetSetError: the intensities are not those of the samples of the forget set.
    """
    settings = resolve_settings(recipe, config)
    if settings.influence.refresh == "step":
        raise ConfigError(
            "influence.refresh is 'step', which scores every batch anew, so that the given intensities would never be used; expected once "
            "or epoch (they serve the first epoch), or unlearn()"
        )
    with Pipeline.open("ascend", model, forget_set, task, evaluation, settings, run_dir) as job:
        if job.finished:
            return job.read_result(_as_held(model, job))
        samples = job.take_intensities(intensities)
        outcome = job.ascend(samples)
        changed = job.head.changed(outcome.parameters).apply(_as_held(model, job))
        return job.finish(changed, {}, samples, outcome)


def audit(
    model: nn.Module | ModelSpec,
    forget_set: Any,
    *,
    original: nn.Module | ModelSpec | None = None,
    task: str = "classification",
    evaluation: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    config: UnlearnConfig | None = None,
    run_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Measure a model, and the original beside it when given, on the forget set and the evaluation sets.

    Arguments as in ``unlearn``; ``metrics.json`` and ``report.html`` are written when ``run_dir`` is given.

    Returns:
        ``before`` (of ``original``) and ``after`` (of ``model``): figures per set, and membership inference.
    """
    settings = resolve_settings(recipe, config)
    metrics: dict[str, Any] = {}
    if original is not None:
        with Pipeline.open("audit", original, forget_set, task, evaluation, settings, None, write=False) as job:
            metrics["before"] = job.measure()
    with Pipeline.open(
        "audit", model, forget_set, task, evaluation, settings, run_dir, write=run_dir is not None
    ) as job:
        if job.finished:
            return dict(job.run.read_json("metrics.json"))
        metrics["after"] = job.measure()
        job.write_audit(metrics, None, None)
        job.recorder.complete()
    return metrics


def _as_held(model: nn.Module | ModelSpec, job: Pipeline) -> nn.Module:
    """The caller's own module, on its device; of a spec, what was built from it."""
    return model if isinstance(model, nn.Module) else job.inputs.model
