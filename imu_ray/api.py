"""The public functions: score, ascend, audit, and unlearn, which is all three; and remember, long before them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn

from imu_ray.config import UnlearnConfig
from imu_ray.data import open_source
from imu_ray.distributed import bundle_job
from imu_ray.distributed.session import ray_session, require_gpus
from imu_ray.errors import ConfigError
from imu_ray.events import event
from imu_ray.influence.factors import read_factors
from imu_ray.inputs import Inputs
from imu_ray.models.checkpoint import model_hash
from imu_ray.models.spec import ModelSpec, require_model
from imu_ray.pipeline import Pipeline, gaps_of
from imu_ray.recipes import resolve_settings, settle_scope
from imu_ray.run.bundle import BundleRecord, check_place, write_bundle
from imu_ray.run.directory import INTENSITIES
from imu_ray.run.metrics import read_metrics
from imu_ray.run.record import now
from imu_ray.run.result import UnlearnResult
from imu_ray.tasks import TASKS


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
        forget_set: path or URI of Parquet files, JSON lines or tars, folder of images, ``pyarrow.Table``, DataFrame or
            Dataset (of ``ray.data``, Hugging Face, or map-style of torch); all of it, or the rows that
            ``forget_set.ids`` or ``forget_set.where`` name.
        task: kind of task.
        evaluation: sets that are measured and never trained on, each given as a forget set is, or as a mapping with
            that under ``path`` and ``forget_set`` settings of its own; ``"test"`` (unseen samples) also serves the
            automatic stop rule and membership inference.
        recipe: named settings: ``auto``, ``samples``, ``classes`` or ``paper``; excludes ``config``.
        config: all settings.
        run_dir: directory of the artifacts; default ``runs/<time>-<id>``. An unfinished run of the same settings and
            samples is taken up where it stopped.

    Returns:
        The unlearned copy and the record; the same is on disk.

    Raises:
        ImuError: see ``imu_ray.errors``; nothing is overwritten.
    """
    settings = resolve_settings(recipe, config, task)
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
        ``sample_id, label, loss, influence, gradient_norm, outlier, intensity`` in the order of the forget set;
        intensity is 0 where not kept.
    """
    with Pipeline.open(
        "score",
        model,
        forget_set,
        task,
        None,
        resolve_settings(recipe, config, task),
        run_dir,
        write=run_dir is not None,
    ) as job:
        if job.finished:
            return job.run.read_table(INTENSITIES)
        scored = job.score()
        job.complete()
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
    """Ascend with given intensities (as ``score`` returns them).

    Arguments and result as in ``unlearn``, without the audit.

    Raises:
        ForgetSetError: the intensities are not those of the samples of the forget set.
    """
    settings = resolve_settings(recipe, config, task)
    if settings.influence.refresh == "step":
        raise ConfigError(
            "influence.refresh is 'step', which scores every batch anew, so that the given intensities would never be "
            "used; expected once or epoch (they serve the first epoch), or unlearn()"
        )
    with Pipeline.open("ascend", model, forget_set, task, evaluation, settings, run_dir) as job:
        if job.finished:
            return job.read_result(_as_held(model, job))
        samples = job.take_intensities(intensities)
        outcome = job.ascend(samples)
        changed = job.part.changed(outcome.parameters).apply(_as_held(model, job))
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
    settings = resolve_settings(recipe, config, task)
    metrics, beside, recovery = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    if original is not None:
        with Pipeline.open("audit", original, forget_set, task, evaluation, settings, None, write=False) as job:
            metrics["before"] = job.measure()
            beside = job.compare({"before": job.part})
            recovery = job.recover({"before": job.part}, reference=False)
    with Pipeline.open(
        "audit", model, forget_set, task, evaluation, settings, run_dir, write=run_dir is not None
    ) as job:
        if job.finished:
            return read_metrics(job.run)
        metrics["after"] = job.measure()
        metrics |= job.measure_reference()
        if beside := beside | job.compare({"after": job.part}):
            metrics["reference"] = beside
            metrics["gaps"] = gaps_of(metrics)
        if recovery := recovery | job.recover({"after": job.part}):
            metrics["recovery"] = recovery
        if settings.audit.control:
            metrics["control"] = {"skipped": "an audit unlearns nothing; ask for it in the run that does"}
        job.write_audit(metrics, None, None)
        job.complete()
    return metrics


def remember(
    model: nn.Module | ModelSpec,
    train_set: Any,
    *,
    path: str | Path,
    task: str = "classification",
    config: UnlearnConfig | None = None,
    rows: int | None = None,
) -> str | Path:
    """Keep the curvature of a training set, while it is there, for later requests to forget: ``ascent.bundle = path``.

    The file holds sums over the rows for each layer of ``ascent.scope`` and the mean of every metric per class. No
    sample and no id is in it; of a class of one row, the means are that row's.

    Args:
        model: the trained model, as in ``unlearn``.
        train_set: what it was trained on, given as a forget set is.
        path: path or URI of the bundle, a safetensors file; never overwritten.
        task: as in ``unlearn``.
        config: all settings; of them count ``forget_set`` (how rows are read), ``influence`` (how the model runs),
            ``resources``, ``seed`` and ``ascent.scope``.
        rows: so many rows, drawn at random; default all.

    Returns:
        ``path``.

    Raises:
        ImuError: see ``imu_ray.errors``.
    """
    whole = {"forget_set.ids": None, "forget_set.where": None, "forget_set.size": rows}
    whole |= {"ascent.views": 0, "audit.views": 0}
    settings = resolve_settings(None, config, task).with_overrides(whole)
    check_place(path)
    require_gpus(settings.resources)
    source = open_source(train_set, settings.forget_set, "training set", TASKS[task].fields(settings.forget_set))
    inputs = Inputs.open(model, source, task, None, settings)
    settings = settle_scope(settings, inputs.task)
    inputs = dataclasses.replace(inputs, sources={"training set": inputs.sources["forget"]})
    with ray_session(settings.resources) as resources:
        settings = settings.with_overrides({"resources": resources.model_dump()})
        features = inputs.extract(settings).features["training set"]
        sums, figures = bundle_job.remember(features, inputs.part, settings.ascent)
    shapes = {name: list(matrix.shape) for name, matrix in inputs.part.parameters.items()}
    own = {"rows": features.rows, "seed": settings.seed, "shapes": shapes, "figures": figures}
    return _keep(path, inputs.model, task, settings, sums, **own)


def import_factors(
    model: nn.Module | ModelSpec,
    factors: str | Path,
    *,
    path: str | Path,
    task: str = "classification",
    config: UnlearnConfig | None = None,
) -> str | Path:
    """Make a curvature bundle of the Kronecker factors that kronfluence has fitted; no sample is read.

    The bundle has ``kfac`` of every layer in the folder, and no figures of the training set.

    Args:
        model: the model that they were fitted on, as in ``unlearn``. The folder does not name it: that it is this one
            is the caller's word, held against the names and shapes of the layers.
        factors: ``factors_NAME`` in an output folder of kronfluence's (``kfac`` or ``ekfac``).
        path: as in ``remember``.
        task: as in ``unlearn``.
        config: of it counts the loss (``forget_set.target``, ``forget_set.class_weights``).

    Returns:
        ``path``.

    Raises:
        ImuError: see ``imu_ray.errors``; ``CheckpointError`` where the factors are not those of the model's layers.
    """
    settings = resolve_settings(None, config, task)
    check_place(path)
    require_model(model)
    built = model.build() if isinstance(model, ModelSpec) else model
    found = read_factors(factors, built)
    sums = {name: {"kfac": bundle_job.to_tensors(each)} for name, each in found.items()}
    shapes = {name: [len(each.outputs_CC), len(each.inputs_DD)] for name, each in found.items()}
    rows = next(iter(found.values())).count
    own = {"rows": rows, "seed": None, "shapes": shapes, "figures": {}, "source": "kronfluence"}
    return _keep(path, built, task, settings, sums, **own)


def _keep(
    path: str | Path,
    model: nn.Module,
    task: str,
    settings: UnlearnConfig,
    sums: Mapping[str, Mapping[str, Any]],
    **own: Any,
) -> str | Path:
    """Write a bundle of some sums, by layer and kind; ``own`` are the other fields of its record."""
    record = BundleRecord(
        created=now(),
        model=model_hash(model),
        task=task,
        sums={name: list(kinds) for name, kinds in sums.items()},
        target=settings.forget_set.target,
        class_weights=settings.forget_set.class_weights,
        **own,
    )
    write_bundle(path, record, sums)
    event("remembered", path=str(path), rows=record.rows, layers=len(sums), source=record.source)
    return path


def _as_held(model: nn.Module | ModelSpec, job: Pipeline) -> nn.Module:
    """The caller's own module, on its device; of a spec, what was built from it."""
    return model if isinstance(model, nn.Module) else job.inputs.model
