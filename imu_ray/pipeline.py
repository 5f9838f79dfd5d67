"""One run: the model, its samples, their features, every stage on them, and the record."""

import contextlib
import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from imu_ray.audits.report import DOMINATED, render_report
from imu_ray.config import UnlearnConfig
from imu_ray.distributed import audit_job, feature_job, metrics, train_job
from imu_ray.distributed.session import ray_session
from imu_ray.errors import ConfigError, EmptySelectionError, ForgetSetError, NonFiniteError, StageFailedError
from imu_ray.events import event
from imu_ray.influence.curvature import CURVATURES, PRECONDITIONERS
from imu_ray.influence.curvature.base import FittedCurvature
from imu_ray.influence.intensity import SCHEMES
from imu_ray.influence.order_statistics import Parts
from imu_ray.inputs import Inputs
from imu_ray.models.checkpoint import model_hash
from imu_ray.models.spec import ModelSpec
from imu_ray.run.directory import INTENSITIES, MANIFEST, RunDirectory, default_run_dir
from imu_ray.run.record import Manifest, label_counts
from imu_ray.scopes.head import Head, with_head
from imu_ray.settings import nearest
from imu_ray.updates.iterative import AscentOutcome, AscentProblem
from imu_ray.updates.objectives import OBJECTIVES
from imu_ray.updates.rescoring import Rescoring
from imu_ray.updates.stopping import recipe_warning, stop_targets


@dataclass(frozen=True)
class UnlearnResult:
    """What a run gives back.

    Attributes:
        model: an unlearned copy of the model; the original is not modified.
        run_dir: where the artifacts lie: a path, or the URI as given.
        metrics: accuracy, loss and membership inference, before and after.
        trajectory: a row per check of the ascent.
        manifest: the record of what was done.
    """

    model: nn.Module
    run_dir: Path | str
    metrics: dict[str, Any]
    trajectory: pa.Table
    manifest: dict[str, Any]

    @functools.cached_property
    def intensities(self) -> pa.Table:
        """``sample_id, label, loss, influence, gradient_norm, outlier, intensity``, a row per sample of the forget set.

        Read from the run directory when it is first asked for (of a large set it takes 60 bytes a sample and more), which must be there
        still.
        """
        return RunDirectory(self.run_dir).read_table(INTENSITIES)


@dataclass(frozen=True)
class Weighted:
    """The forget set's influence, intensities and table, ``[N]`` in parts, and its samples per label."""

    influence: Parts
    weights: Parts
    table: Callable[[], Iterator[pa.Table]]
    label_counts: dict[int, int]


def resolve_settings(recipe: str | None, config: UnlearnConfig | None) -> UnlearnConfig:
    """The settings that ``recipe`` or ``config`` mean, with every registered name checked."""
    if recipe is not None and config is not None:
        raise ConfigError(
            f"recipe={recipe!r} and config were both given; expected one of them; combine them with "
            "UnlearnConfig.from_recipe(name).with_overrides({...})"
        )
    if config is not None and not isinstance(config, UnlearnConfig):
        raise ConfigError(f"config is a {type(config).__name__}; expected an UnlearnConfig: UnlearnConfig().with_overrides({{...}})")
    settings = config or UnlearnConfig.from_recipe(recipe or "paper")
    for key, name, registry in (
        ("influence.curvature", settings.influence.curvature, CURVATURES),
        ("intensity.scheme", settings.intensity.scheme, SCHEMES),
        ("ascent.objective", settings.ascent.objective, OBJECTIVES),
        ("ascent.preconditioner", settings.ascent.preconditioner, {"none": None, **PRECONDITIONERS}),
    ):
        if name not in registry:
            raise ConfigError(f"{key} is {name!r}; {nearest(name, registry)}")
    return settings


class Pipeline:
    """One run: its inputs, its run directory and the record."""

    def __init__(self, stage: str, inputs: Inputs, config: UnlearnConfig, run: RunDirectory, *, write: bool = True) -> None:
        self.trial: train_job.Trial | None = None  # set by a sweep
        self.inputs, self.config, self.run, self.write = inputs, config, run, write
        self.head, self.task = inputs.head, inputs.task
        self.unfinished = run.check(stage, config.identity()) if write else None
        self.manifest = Manifest(stage, config, inputs.model, self.head.name)
        guarded = config.ascent.guard
        if guarded.min_accuracy is not None and guarded.evaluation_set not in inputs.names:
            raise ConfigError(
                f"ascent.guard.min_accuracy guards evaluation set {guarded.evaluation_set!r}, which was not given; expected one of "
                f"{sorted(inputs.names)}; give it, or name another in ascent.guard.evaluation_set"
            )
        if config.influence.curvature_set not in inputs.names:
            raise ConfigError(
                f"influence.curvature_set is {config.influence.curvature_set!r}; expected forget or an evaluation set that was given, one of "
                f"{sorted(inputs.names)}"
            )
        self.begun = False

    @classmethod
    @contextmanager
    def open(cls, stage: str, model: nn.Module | ModelSpec, forget_set: Any, task: str, evaluation: Mapping[str, Any] | None,
             config: UnlearnConfig, run_dir: str | Path | None, write: bool = True) -> Iterator["Pipeline"]:  # fmt: skip
        """Check everything that can be checked, make the features, and record how the run ended."""
        run = RunDirectory(run_dir or default_run_dir())
        if write:  # before anything is read: a directory that cannot be used is the cheapest thing to find out
            run.check(stage, config.identity())
        job = cls(stage, Inputs.open(model, forget_set, task, evaluation, config), config, run, write=write)
        event("run begun", stage=stage, run_dir=str(run.location) if write else None, resumed=job.unfinished is not None)
        with ray_session(config.resources), job.recorded():
            with job.stage("features"):
                job.inputs = job.inputs.extract(config)
            job.take_inputs()
            yield job

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record how the run ended when it did not end well."""
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            with contextlib.suppress(StageFailedError):  # on a full disk the error that is on its way says so
                self.record(status="interrupted" if interrupted else "failed", error=f"{type(error).__name__}")
            event("run interrupted" if interrupted else "run failed", level=logging.WARNING, error=type(error).__name__)
            raise

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage for the manifest, the log and the metrics."""
        with self.manifest.stage(name):
            yield
        seconds = self.manifest.values["seconds"][name]
        metrics.gauge("stage_seconds", seconds, name)
        metrics.flush()
        event(f"{name} done", seconds=seconds)

    def take_inputs(self) -> None:
        """Select what ``forget_set.size`` asks for and describe the samples in the record."""
        self.inputs = self.inputs.select(self.config)
        described = dict(self.inputs.described)
        self.manifest.values |= {"forget_set": described.pop("forget"), "evaluation": described}
        self.manifest.values["inputs"] = {"model": self.manifest.values["model"]["hash_before"], **self.inputs.digests()}
        self.features = self.inputs.features

    def score(self) -> Weighted:
        """Influence and intensity of every sample; begins the run directory."""
        curvature_set = self.config.influence.curvature_set
        with self.stage("scores"):
            fitted_on = None if curvature_set == "forget" else self.features[curvature_set]
            scores = feature_job.score(self.features["forget"], self.head, self.config, fitted_on)
        figures = self.manifest.values["influence"] = scores.figures
        if figures["plain_gradient_share"] > DOMINATED and self.config.influence.curvature != "identity":
            share, below = figures["plain_gradient_share"], figures["fisher_below_damping"]
            advice = "the scores are nearly a plain gradient product; influence.damping_mode=relative or another curvature gives it a say"
            event("damping dominates", level=logging.WARNING, plain_gradient_share=share, fisher_below_damping=below, advice=advice)
        influence, losses = scores.column("influence"), scores.column("loss")
        weights = SCHEMES[self.config.intensity.scheme](influence, losses, self.config.intensity, self.config.seed)
        table = functools.partial(scores.batches, weights)
        return self._take(Weighted(influence, weights, table, dict(sorted(scores.label_counts.items()))))

    def take_intensities(self, table: pa.Table) -> Weighted:
        """A table that was given, checked to be that of the forget set."""
        missing = {"sample_id", "label", "influence", "intensity"} - set(table.column_names)
        if missing or not self.features["forget"].holds(table["sample_id"]):
            raise ForgetSetError(
                f"the intensities ({len(table)} rows, columns {', '.join(table.column_names)}) are not those of the "
                f"{self.features['forget'].rows} samples of {self.manifest.values['forget_set']['name']}; expected the table that score() gave for this "
                "forget set, in its order"
            )
        empty = [name for name in ("label", "influence", "intensity") if table[name].null_count]
        influence, weights = (table[name].to_numpy().astype(np.float64) for name in ("influence", "intensity"))
        if empty or not np.isfinite(influence).all():
            raise ForgetSetError(
                f"the intensities have rows without a number in {', '.join(empty or ['influence'])}; expected the table that score() gave for "
                "this forget set, with at most its column 'intensity' changed"
            )
        counts = label_counts(table["label"].to_numpy())
        return self._take(Weighted(lambda: [influence], lambda: [weights], lambda: iter([table]), counts))

    def _take(self, samples: Weighted) -> Weighted:
        """Check that there is something to ascend with, record it, and write the table."""
        digest, wrong, kept = hashlib.sha256(), 0, 0
        for part in samples.weights():
            digest.update(part.tobytes())
            wrong += np.count_nonzero(~(np.isfinite(part) & (part >= 0)))
            kept += np.count_nonzero(part)
        if wrong:
            raise NonFiniteError(f"{wrong} intensities are negative, infinite or NaN; expected finite weights of 0 or more")
        if not kept:
            raise EmptySelectionError(
                f"all {self.features['forget'].rows} intensities are 0; expected at least one above; see intensity.scheme"
            )
        self.manifest.values["inputs"]["set of intensities"] = digest.hexdigest()
        if self.unfinished is not None:
            self.run.check_inputs(self.unfinished, self.manifest.values["inputs"])
        self.manifest.values["forget_set"]["label_counts"] = samples.label_counts
        self.begun = True
        self.record()
        if self.write:
            self.run.write_tables(INTENSITIES, samples.table())
        return samples

    def ascend(self, samples: Weighted) -> AscentOutcome:
        """The ascent on the head, from where an unfinished run stopped."""
        counts = self.manifest.values["forget_set"]["label_counts"]
        warning = recipe_warning(self.config.recipe, counts, self.task.num_classes)
        if warning:
            event("recipe doubted", level=logging.WARNING, reason=warning)
        original = {name: audit_job.accuracy(name, features, self.head) for name, features in self.features.items() if name != "forget"}
        labels = {name: set(counted.labels.tolist()) for name, counted in original.items()}
        unseen = original["test"].figures()["accuracy"] if "test" in original else None
        kept = set().union(*(found for name, found in labels.items() if name != "test"))
        targets = stop_targets(self.config.ascent.stop, counts, self.task.num_classes, unseen, labels.get("test", ()), kept)
        weights = np.concatenate(list(samples.weights()))
        with self.stage("preconditioner"):
            preconditioner = self._fit_preconditioner()
        influence = self.config.influence
        problem = AscentProblem(
            self.head,
            weights,
            self.config.ascent,
            self.config.seed,
            targets,
            preconditioner,
            rescoring=None if influence.refresh == "once" else Rescoring(influence, self.config.intensity),
            curvature_set=None if influence.curvature_set == "forget" else influence.curvature_set,
        )
        measured = {name: features for name, features in self.features.items() if name != "forget"}
        with self.stage("ascent"):
            outcome = train_job.ascend(problem, self.features["forget"], measured, self.config.resources, self.run, self.trial)
        worrying = outcome.status in ("not_reached", "stopped_by_guard") or outcome.record["step"] == 0
        level = logging.WARNING if worrying else logging.INFO
        event("ascent ended", level=level, status=outcome.status, step=outcome.record["step"], reason=outcome.reason)
        self.manifest.values["ascent"] = {
            "status": outcome.status,
            "reason": outcome.reason,
            "steps": math.ceil(outcome.record["step"]),
            "kept_samples": int((weights > 0).sum()),
            "targets": [vars(target) for target in targets],
            "parameter_drift": outcome.record["parameter_drift"],
            "output_change": audit_job.mean_output_change(self.features["forget"], self.head, outcome.head),
            "recipe_warning": warning,
        }
        return outcome

    def _fit_preconditioner(self) -> FittedCurvature | None:
        """The curvature that steers the ascent, fitted on the forget set by one round of tasks."""
        settings = self.config.ascent
        if settings.preconditioner == "none":
            return None
        kind = PRECONDITIONERS[settings.preconditioner]
        needed = kind.memory(*self.head.matrix_CD.shape) / 2**30
        if needed > settings.preconditioner_memory:
            raise ConfigError(
                f"ascent.preconditioner {settings.preconditioner!r} takes {needed:.1f} GiB for a head of "
                f"{list(self.head.matrix_CD.shape)}; expected at most {settings.preconditioner_memory:g} GiB, "
                "ascent.preconditioner_memory; use feature_second_moment, or raise the budget"
            )
        features = self.features["forget"]
        return kind.fit(functools.partial(features.reduce, "preconditioner", self.head), settings.preconditioner_damping)

    def audit(self, changed: Head) -> dict[str, Any]:
        """Figures before and after. Only the head differs, so that no forward pass is needed."""
        with self.stage("audit"):
            return {"before": self.measure(self.head), "after": self.measure(changed)}

    def measure(self, head: Head) -> dict[str, Any]:
        """Figures of one head on every set, and membership inference."""
        return audit_job.measure(self.features, head, self.config.audit, self.config.seed)

    def unlearn(self, original: nn.Module) -> UnlearnResult:
        """Every stage after the features; ``original`` is the model as the caller holds it."""
        samples = self.score()
        outcome = self.ascend(samples)
        changed = with_head(original, outcome.head)
        return self.finish(changed, self.audit(Head.of(changed, self.head.name)), samples, outcome)

    def finish(self, changed: nn.Module, metrics: dict[str, Any], samples: Weighted, outcome: AscentOutcome) -> UnlearnResult:
        """Write what is left to write and close the record."""
        trajectory = pa.Table.from_pylist(outcome.trajectory)
        self.manifest.values["model"]["hash_after"] = model_hash(changed)
        self.run.write_table("trajectory.parquet", trajectory)
        self.run.write_events(outcome.trajectory)
        self.write_audit(metrics, samples, trajectory)
        self.run.write_model("model.safetensors", changed)
        self.run.clear_state()
        self.complete()
        return UnlearnResult(changed, self.run.location, metrics, trajectory, self.manifest.values)

    def write_audit(self, metrics: dict[str, Any], samples: Weighted | None, trajectory: pa.Table | None) -> None:
        """``metrics.json`` and the report."""
        if self.write:
            self.run.write_json("metrics.json", metrics)
            if self.config.audit.report:
                drawn = None if samples is None else (samples.influence, samples.weights)
                self.run.write_text("report.html", render_report(self.manifest.values, metrics, drawn, trajectory))

    def complete(self) -> None:
        """Close the record of a run that ended well."""
        self.record(status="complete")
        event("run complete", run_dir=str(self.run.location) if self.write else None, seconds=sum(self.manifest.values["seconds"].values()))

    def record(self, **changes: Any) -> None:
        """Write the manifest, once there is something to record: a run that failed before leaves nothing behind."""
        self.manifest.values |= changes
        if self.write and (self.begun or changes.get("status") == "complete"):
            self.run.write_json(MANIFEST, self.manifest.values)
