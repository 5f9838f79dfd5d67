"""What computes: every stage of a run on open inputs, from the features to the audit."""

import contextlib
import dataclasses
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

from imu_ray.audits.answers import check_settings
from imu_ray.audits.gaps import reference_gaps
from imu_ray.audits.language import read_retain_log
from imu_ray.audits.report import DOMINATED, render_report
from imu_ray.audits.samples import Shown
from imu_ray.audits.verdict import verdict
from imu_ray.config import UnlearnConfig
from imu_ray.control import STATE, measure_control
from imu_ray.distributed import (
    audit_job,
    bundle_job,
    factor_job,
    feature_job,
    metrics,
    recovery_job,
    score_job,
    train_job,
)
from imu_ray.distributed.recovery_job import Side
from imu_ray.distributed.session import ray_session, require_gpus
from imu_ray.distributed.tracking import require_tracker, track_run
from imu_ray.errors import ConfigError, EmptySelectionError, ForgetSetError, NonFiniteError
from imu_ray.events import event
from imu_ray.influence.curvature.base import FittedCurvature
from imu_ray.influence.given import given_influence
from imu_ray.influence.intensity import SCHEMES, Column
from imu_ray.inputs import Inputs
from imu_ray.models.checkpoint import load_checkpoint, model_hash, save_as_it_came
from imu_ray.models.copies import plain_copy
from imu_ray.models.spec import ModelSpec
from imu_ray.recipes import choose_recipe, overlaps, resolve_targets, settle_scope, warnings_of
from imu_ray.run.bundle import Bundle
from imu_ray.run.directory import INTENSITIES, MODEL, MODEL_FOLDER, SEAL, WITH_SAMPLES, RunDirectory, default_run_dir
from imu_ray.run.fingerprint import IDS, fingerprint, fingerprint_table, read_key
from imu_ray.run.metrics import read_metrics, write_metrics
from imu_ray.run.record import AscentRecord, CurvatureRecord, RunRecord, TargetRecord, VerdictRecord
from imu_ray.run.recorder import Recorder
from imu_ray.run.result import UnlearnResult
from imu_ray.run.storage import below
from imu_ray.scopes.base import FORGET_VIEWS, TEST_VIEWS, VIEWS, Parameters, Part
from imu_ray.scopes.features import of_rows
from imu_ray.updates.base import UpdateOutcome, UpdateProblem
from imu_ray.updates.rescoring import Rescoring
from imu_ray.updates.stopping import StopTarget, Unseen

AUDITED = ("unlearn", "audit")  # stages that end in an audit


@dataclass(frozen=True)
class Weighted:
    """The forget set's influence ``[N]`` and intensities, what gives its table in parts, and its samples per label.

    Intensities are ``[N]``, or of tokens ``[N, T]``, NaN where a position has no label.
    """

    influence: Column
    weights: Column
    table: Callable[[], Iterator[pa.Table]]
    label_counts: dict[int, int]


class Pipeline:
    """The stages of one run, on its inputs; the recorder keeps what they did."""

    def __init__(
        self,
        stage: str,
        inputs: Inputs,
        config: UnlearnConfig,
        run: RunDirectory,
        *,
        write: bool = True,
        trial: train_job.Trial | None = None,
        targets: list[StopTarget] | None = None,
    ) -> None:
        identity, config = config.identity(), settle_scope(config, inputs.task)
        self.inputs, self.config, self.run, self.write, self.trial = inputs, config, run, write, trial
        self.part, self.task, self.targets = inputs.part, inputs.task, targets
        self.begun = run.check(stage, identity, config.ascent.stop.limits) if write else None
        self.recorder = Recorder(RunRecord.begin(stage, config, inputs.describe_model(), inputs.dtype), run, write)
        self.record = self.recorder.record
        self.record.config_identity = identity  # of what was asked for, by which a run that goes on is known
        if self.begun is not None:
            self.record.resume(self.begun)
        inputs.require_sets(config)
        require_tracker(config.tracking)
        check_settings(config, self.task)
        self.key = None if config.record.key is None else read_key(config.record.key)
        if config.audit.samples and not inputs.sources:
            raise ConfigError(
                f"audit.samples is {config.audit.samples} in a sweep, whose trials do not read the rows again; "
                "expected 0; audit the run that you keep"
            )
        self.reference = self._open_reference() if stage in AUDITED else None
        self.bundle: Bundle | None = None
        self.given: Column | None = None  # influence of another engine
        self.controlled = False  # whether unseen rows were unlearned too, for comparison
        if stage in ("unlearn", "ascend") and config.ascent.curvature != "none":
            self.bundle = self._open_bundle()
            factor_job.kinds_of(self.part, config.ascent)  # whether it has room

    @property
    def finished(self) -> bool:
        """Whether the run directory holds the finished run of the same settings."""
        return self.begun is not None and self.begun["status"] == "complete"

    @classmethod
    @contextmanager
    def open(
        cls,
        stage: str,
        model: nn.Module | ModelSpec,
        forget_set: Any,
        task: str,
        evaluation: Mapping[str, Any] | None,
        config: UnlearnConfig,
        run_dir: str | Path | None,
        write: bool = True,
    ) -> Iterator["Pipeline"]:
        """Check everything that can be checked, make the features, and record how the run ended."""
        run = RunDirectory(run_dir or default_run_dir())
        with run.locked() if write else contextlib.nullcontext():
            if write:  # before anything is read: a directory that cannot be used is the cheapest thing to find out
                run.check(stage, config.identity(), config.ascent.stop.limits)
            require_gpus(config.resources)
            # Nothing is audited of the other stages.
            reading = config if stage in AUDITED else config.with_overrides({"audit.views": 0})
            job = cls(stage, Inputs.open(model, forget_set, task, evaluation, reading), config, run, write=write)
            event("run begun", stage=stage, run_dir=str(run.location) if write else None, resumed=job.begun is not None)
            with ray_session(config.resources) as resources, job.recorder.ending():
                job.config = job.inputs.fitting(job.config.with_overrides({"resources": resources.model_dump()}))
                with job.stage("features"):
                    job.inputs = job.inputs.extract(job.config)
                if job.reference is not None:
                    with job.stage("reference"):
                        job.reference = job.reference.extract(job.config).select(job.config)
                job.take_inputs()
                job.doubt()
                yield job

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage for the record, the log and the metrics."""
        with self.record.timed(name):
            yield
        seconds = self.record.seconds[name]
        metrics.gauge("stage_seconds", seconds, name)
        metrics.flush()
        event(f"{name} done", seconds=seconds)

    def take_inputs(self) -> None:
        """Select what ``forget_set.size`` asks for and describe the samples in the record."""
        self.inputs = self.inputs.select(self.config)
        described = dict(self.inputs.described)
        self.record.forget_set, self.record.evaluation = described.pop("forget"), described
        self.record.inputs = {"model": self.record.model.hash_before, **self.inputs.digests()}
        if self.bundle is not None:
            self.record.inputs["curvature bundle"] = self.bundle.digest
        if self.config.audit.retain_log is not None:
            ratios = read_retain_log(self.config.audit.retain_log)
            self.record.inputs["retain log"] = hashlib.sha256(ratios.data).hexdigest()
        self.features = self.inputs.measured
        if self.config.influence.scores is not None:
            forget, name = self.features["forget"], self.inputs.described["forget"].name
            self.given = given_influence(self.config.influence.scores, forget.rows, forget.holds, name)
            self.record.inputs["set of influence scores"] = hashlib.sha256(self.given.data).hexdigest()
        if self.begun is not None:
            self.run.check_inputs(self.begun, self.record.inputs)
        if self.finished:
            event("run is finished already; nothing is done", level=logging.WARNING, run_dir=str(self.run.location))
            if SEAL not in self.run.storage.entries():  # it was killed between record and seal
                self.run.seal()

    def doubt(self) -> None:
        """Tell of evaluation sets that hold rows to forget, in log and record."""
        self.record.overlaps = overlaps(self.record.evaluation, self.task.retrieval_sets)
        for reason in self.record.overlaps:
            event("doubt", level=logging.WARNING, reason=reason)

    def score(self) -> Weighted:
        """Influence and intensity of every sample; begins the run directory."""
        curvature_set = self.config.influence.curvature_set
        with self.stage("scores"):
            if self.given is not None:
                scores = self._with_given(self.given)
            else:
                fitted_on = None if curvature_set == "forget" else self.features[curvature_set]
                scores = score_job.score(self.features["forget"], self.part, self.config, fitted_on)
        figures = self.record.influence = scores.figures
        weighted = self.config.intensity.scheme in ("imu", "permuted") and self.config.influence.curvature != "identity"
        if weighted and figures.get("plain_gradient_share", 0) > DOMINATED:
            share, below = figures["plain_gradient_share"], figures["fisher_below_damping"]
            advice = (
                "the scores are nearly a plain gradient product; influence.damping_mode=relative or another curvature "
                "gives it a say"
            )
            event(
                "damping dominates",
                level=logging.WARNING,
                plain_gradient_share=share,
                fisher_below_damping=below,
                advice=advice,
            )
        weights = self._weights(scores)
        table = functools.partial(score_job.intensity_table, self.features["forget"], scores, weights)
        return self._take(Weighted(scores.influence, weights, table, scores.label_counts))

    def _with_given(self, influence: Column) -> score_job.Scores:
        """Scores with the influence of another engine, and a digest of the ids in the order it was joined by."""
        ids = hashlib.sha256()
        for sample_id in self._forget_ids():
            ids.update(f"{sample_id}\n".encode())
        scores = score_job.with_influence(self.features["forget"], self.part, self.config, influence)
        told = {"given": self.config.influence.scores, "ids": ids.hexdigest()}
        return dataclasses.replace(scores, figures=told)

    def _weights(self, scores: score_job.Scores) -> Column:
        """Intensities ``[N]``, or of all tokens ``[N, T]``."""
        scheme, settings, seed = SCHEMES[self.config.intensity.scheme], self.config.intensity, self.config.seed
        if scores.tokens is None:
            return scheme(scores.influence, scores.losses, settings, seed)
        influence, losses = scores.tokens
        known, weights = ~np.isnan(influence), np.full_like(influence, np.nan)
        weights[known] = scheme(influence[known], losses[known], settings, seed)
        return weights

    def take_intensities(self, table: pa.Table) -> Weighted:
        """A table that was given, checked to be that of the forget set."""
        forget = self.features["forget"]
        tokens = {"token_influence", "token_intensity"} if self.config.influence.unit == "token" else set()
        missing = {"sample_id", "label", "influence", "intensity", *tokens} - set(table.column_names)
        if missing or not forget.holds(table["sample_id"]):
            raise ForgetSetError(
                f"the intensities ({len(table)} rows, columns {', '.join(table.column_names)}) are not those of the "
                f"{forget.rows} samples of {self.inputs.described['forget'].name}; expected the table that score() "
                "gave for this forget set, in its order"
            )
        wanted = ("label",) * (self.task.of_classes and not self.task.positions) + ("influence", "intensity")
        empty = [name for name in wanted if table[name].null_count]
        influence, weights = (table[name].to_numpy().astype(np.float64) for name in ("influence", "intensity"))
        if empty or not np.isfinite(influence).all():
            raise ForgetSetError(
                f"the intensities have rows without a number in {', '.join(empty or ['influence'])}; expected the "
                "table that score() gave for this forget set, with at most its column 'intensity' changed"
            )
        if tokens:
            weights = self._token_weights(*(table[name].to_pylist() for name in sorted(tokens)))
        labels, counts = np.unique(table["label"].drop_null().to_numpy(), return_counts=True)
        label_counts = dict(zip(labels.tolist(), counts.tolist(), strict=True))
        return self._take(Weighted(influence, weights, lambda: iter([table]), label_counts))

    def _token_weights(self, influence: list[Any], intensity: list[Any]) -> Column:
        """Intensities of tokens ``[N, T]`` from lists, checked to be of the tokens that were scored."""
        positions = self.task.positions
        if all(row and len(row) <= positions for row in (*influence, *intensity)):
            scored, weights = (score_job.by_position(lists, positions) for lists in (influence, intensity))
            if np.array_equal(np.isnan(scored), np.isnan(weights)):
                return weights
        raise ForgetSetError(
            "token_intensity has other tokens than token_influence, or than the samples; expected the table that "
            "score() gave for this forget set, with at most its numbers changed"
        )

    def _take(self, samples: Weighted) -> Weighted:
        """Check that there is something to ascend with, record it, and write the table."""
        weights = samples.weights if samples.weights.ndim == 1 else samples.weights[~np.isnan(samples.weights)]
        wrong = np.count_nonzero(~(np.isfinite(weights) & (weights >= 0)))
        if wrong:
            raise NonFiniteError(
                f"{wrong} intensities are negative, infinite or NaN; expected finite weights of 0 or more"
            )
        if not weights.any():
            raise EmptySelectionError(
                f"all {len(weights)} intensities are 0; expected at least one above; see intensity.scheme"
            )
        self.record.inputs["set of intensities"] = hashlib.sha256(samples.weights.data).hexdigest()
        if self.begun is not None:
            self.run.check_inputs(self.begun, self.record.inputs)
        if self.record.forget_set is not None:
            self.record.forget_set.label_counts = samples.label_counts
        self.recorder.begin()
        if self.write:
            with self.stage("table"):
                self.run.write_tables(INTENSITIES, samples.table())
        return samples

    def ascend(self, samples: Weighted) -> UpdateOutcome:
        """The update, from where an unfinished run stopped."""
        counts, settings, influence = samples.label_counts, self.config.ascent, self.config.influence
        recipe, why = choose_recipe(self.config.recipe, counts, self.task.num_classes)
        event("recipe chosen", recipe=recipe, reason=why)
        original = audit_job.figures(self.features, self.part)
        warnings = warnings_of(recipe, counts, self.task.num_classes, self.task.metrics, original)
        for warning in warnings:
            event("doubt", level=logging.WARNING, reason=warning)
        targets = self.targets = self._targets(counts, original) if self.targets is None else self.targets
        with self.stage("preconditioner"):
            preconditioners = self._fit_preconditioners()
        problem = UpdateProblem(
            samples.weights,
            settings,
            self.config.seed,
            targets,
            preconditioners,
            None if influence.refresh == "once" else Rescoring(influence, self.config.intensity),
            None if influence.curvature_set == "forget" else influence.curvature_set,
        )
        with self.stage("ascent"):
            resources = self.inputs.ascent_resources(self.config.resources)
            outcome = train_job.update(problem, self.part, self.features, resources, self.run, self.trial)
        level = logging.INFO if outcome.status in ("reached", "epochs_done") else logging.WARNING
        event("ascent ended", level=level, status=outcome.status, step=outcome.record["step"], reason=outcome.reason)
        self.record.ascent = AscentRecord(
            update=settings.update,
            recipe=recipe,
            recipe_reason=why,
            status=outcome.status,
            reason=outcome.reason,
            steps=math.ceil(outcome.record["step"]),
            kept_samples=int((of_rows(samples.weights) > 0).sum()),
            targets=[TargetRecord(**_fields(target)) for target in targets],
            parameter_drift=outcome.record["parameter_drift"],
            output_change=audit_job.mean_output_change(
                self.features["forget"], self.part, self.part.changed(outcome.parameters)
            )
            if self.task.of_classes
            else None,
            warnings=[*self.record.overlaps, *warnings],
        )
        return outcome

    def _targets(self, counts: dict[int, int], original: Mapping[str, Any]) -> list[StopTarget]:
        unseen = None
        if "test" in original:
            unseen = Unseen(original["test"], counts, original.get(TEST_VIEWS, original["test"]))
        kept = {
            int(label)
            for name, figures in original.items()
            if name not in ("forget", "test", *VIEWS)
            for label in figures["per_class"]
        }
        rows = self.features["forget"].rows
        return resolve_targets(self.config, self.task.metrics, counts, self.task.num_classes, unseen, kept, rows)

    def _open_reference(self) -> Inputs | None:
        location = self.config.audit.reference
        if location is None:
            return None
        if not self.inputs.sources:
            raise ConfigError(
                "audit.reference is set in a sweep, whose trials do not read the rows again; expected none; compare "
                "the run that you keep"
            )
        return self.inputs.of_reference(location, self.config)

    def _open_bundle(self) -> Bundle | None:
        settings = self.config.ascent
        if settings.bundle is None:
            return None
        bundle = Bundle.open(settings.bundle)
        bundle_job.check_bundle(bundle, self.part, settings, self.record.model.hash_before)
        bundle.require_loss(self.config.forget_set)
        return bundle

    def _fit_preconditioners(self) -> dict[str, FittedCurvature]:
        """The curvature that steers the update, by layer.

        None where a one-step update has its direction from before.
        """
        settings = self.config.ascent
        if settings.curvature == "none":
            return {}
        if self.bundle is not None:
            taken = self.bundle.record
            found = {"rows": {"bundle": taken.rows}, "bundle": self.bundle.digest, "source": taken.source}
        else:
            names = [
                FORGET_VIEWS if name == "forget" and FORGET_VIEWS in self.features else name
                for name in settings.preconditioner_sets
            ]
            sets = {name: self.features[name] for name in names if name in self.features}
            if not sets:
                raise ConfigError(
                    f"ascent.preconditioner_sets is {settings.preconditioner_sets}, of which none was given; expected "
                    "forget, or the name of an evaluation set"
                )
            if self.part.deep:
                sets = {name: made.spaced(settings.preconditioner_rows) for name, made in sets.items()}
            found = {"rows": {name: made.rows for name, made in sets.items()}}
        self.record.curvature = CurvatureRecord(kind=settings.curvature, **found)
        if settings.update == "one_step" and self.part.deep and self.run.load_state() is not None:
            return {}
        if self.bundle is not None:
            return bundle_job.fit_bundle(self.bundle, self.part, settings, self.features["forget"].runner)
        return factor_job.fit(list(sets.values()), self.part, settings)

    def measure(self, parameters: Parameters | None = None) -> dict[str, Any]:
        """Every audit's figures of the original parameters, or of others. Only the part differs."""
        part = self.part if parameters is None else self.part.changed(parameters)
        inputs, config = self.inputs, self.config
        return audit_job.measure(inputs.features, part, config.audit, config.seed, inputs.sources)

    def measure_reference(self) -> dict[str, Any]:
        """Every audit's figures of the reference model, as ``retrained``; nothing where there is none."""
        if self.reference is None:
            return {}
        beside, config, sources = self.reference, self.config, self.inputs.sources
        return {"retrained": audit_job.measure(beside.features, beside.part, config.audit, config.seed, sources)}

    def recover(self, parts: Mapping[str, Part], *, reference: bool = True) -> dict[str, Any]:
        """What brings forgotten answers back under each part's parameters, and of the reference model."""
        if not self.config.audit.recovery:
            return {}
        beside = self.reference if reference else None
        of_parts = {name: (self.inputs, part) for name, part in parts.items()}
        of_parts |= {} if beside is None else {"reference": (beside, beside.part)}
        sides = {name: Side(inputs.of_rows, part, inputs.model) for name, (inputs, part) in of_parts.items()}
        with self.stage("recovery"):
            return recovery_job.recover(sides, self.inputs.sources, self.config)

    def compare(self, parts: Mapping[str, Part]) -> dict[str, Any]:
        """How far each part is from the reference model on every sample set; nothing where there is none."""
        if self.reference is None:
            return {}
        beside, features = self.reference, self.inputs.audited
        found = {name: audit_job.compare(features, part, beside.features, beside.part) for name, part in parts.items()}
        return {"model": model_hash(beside.model), **found}

    def control(self, outcome: UpdateOutcome, written: Part) -> dict[str, Any]:
        """What the update cost, beside the same on rows that were never trained on; nothing where it is not asked for.

        Its state lies in the run directory, from where it goes on.
        """
        if not self.config.audit.control or self.record.ascent is None:
            return {}

        def unlearn(inputs: Inputs, config: UnlearnConfig, targets: list[StopTarget]) -> UpdateOutcome:
            self.controlled = True
            run = RunDirectory(below(self.run.location, STATE))
            job = Pipeline("ascend", inputs, config, run, write=False, targets=targets)
            job.take_inputs()
            return job.ascend(job.score())

        recipe, targets = self.record.ascent.recipe, self.targets or []
        with self.stage("control"):
            return measure_control(self.inputs, self.config, recipe, outcome, targets, written, unlearn)

    def measure_checks(self, outcome: UpdateOutcome, before: dict[str, Any]) -> dict[str, Any]:
        """The same of what every check has kept, by its row in the trajectory; row 0 is the original model."""
        checks = range(1, len(outcome.trajectory))
        return {"0": before, **{str(check): self.measure(self.run.load_parameters(check)) for check in checks}}

    def unlearn(self, original: nn.Module) -> UnlearnResult:
        """Every stage after the features; ``original`` is the model as the caller holds it."""
        if self.finished:
            return self.read_result(original)
        samples = self.score()
        outcome = self.ascend(samples)
        changed = self.part.changed(outcome.parameters).apply(original)
        with self.stage("audit"):  # of the model as it is written: rounded to its type
            written = self.part.of_model(changed)
            figures = {"before": self.measure(), "after": self.measure(written.parameters)}
            figures |= self.measure_reference()
            if beside := self.compare({"before": self.part, "after": written}):
                figures["reference"] = beside
                figures["gaps"] = gaps_of(figures)
            if self.config.audit.checks:
                figures["checks"] = self.measure_checks(outcome, figures["before"])
        if recovery := self.recover({"before": self.part, "after": written}):
            figures["recovery"] = recovery
        if control := self.control(outcome, written):
            figures["control"] = control
            self.run.storage.remove(STATE)
        return self.finish(changed, figures, samples, outcome)

    def finish(
        self, changed: nn.Module, figures: dict[str, Any], samples: Weighted, outcome: UpdateOutcome
    ) -> UnlearnResult:
        """Write what is left to write and close the record."""
        trajectory = pa.Table.from_pylist(outcome.trajectory)
        self.record.model.hash_after = model_hash(changed)
        self.run.write_table("trajectory.parquet", trajectory)
        self.run.write_events(outcome.trajectory)
        if figures:
            test = self.record.evaluation.get("test")
            overlap = test.in_forget_set / test.rows_used if test else 0.0
            self.record.verdict = VerdictRecord(**vars(verdict(outcome.status, outcome.reason, figures, overlap)))
        self.write_audit(figures, samples, trajectory, changed)
        self.run.write_model(MODEL, changed)
        merge = self.record.model.merge_adapter
        self.run.write_folder(MODEL_FOLDER, lambda folder: save_as_it_came(changed, folder, merge))
        self.run.clear_state(but_last=outcome.status in ("not_reached", "epochs_done"))
        if self.config.tracking is not None and self.record.ascent is not None:
            name = str(self.run.location).rpartition("/")[2]
            if warning := track_run(self.config.tracking, name, self.config, outcome.trajectory, figures):
                self.record.ascent.warnings.append(warning)
        self.complete()
        return UnlearnResult(changed, self.run.location, figures, trajectory, self.record)

    def complete(self) -> None:
        """Record what was read for what and whose rows they were, and close the record."""
        self.record.data_access = self._data_access()
        if self.key is not None and self.write:
            table = fingerprint_table(self.key, self._forget_ids())
            self.record.forget_ids = fingerprint(self.key, table)
            self.run.write_table(IDS, table)
        self.recorder.complete()

    def _forget_ids(self) -> Iterator[str]:
        for part in self.features["forget"].stream("ids", feature_job.ids_of):
            yield from part.to_pylist()

    def _data_access(self) -> dict[str, list[str]]:
        """What each set that was read was read for; of a curvature bundle and a reference model that they were."""
        settings, targets = self.config, self.record.ascent.targets if self.record.ascent else []
        curvature = self.record.curvature
        fitted_on = {} if curvature is None else curvature.rows
        found = {}
        for name in (*self.inputs.described, "bundle"):
            uses = {
                "gradient": name == "forget" and self.record.influence is not None,
                "curvature": name in fitted_on or settings.influence.curvature_set == name,
                "target": name == "test" and any(_looks_at_unseen(each) for each in targets),
                "guard": name in {metric.rpartition(".")[0] for metric in settings.ascent.guard.limits},
                "control": name == "test" and self.controlled,
                "measured": name != "bundle" and self.record.stage != "score",
            }
            found[name] = [use for use, holds in uses.items() if holds]
        if self.reference is not None:
            found["reference model"] = ["measured"]
        return {name: uses for name, uses in found.items() if uses}

    def read_result(self, original: nn.Module) -> UnlearnResult:
        """What a finished run left in its directory."""
        changed = plain_copy(original)
        load_checkpoint(changed, below(self.run.location, MODEL))
        trajectory = self.run.read_table("trajectory.parquet")
        return UnlearnResult(
            changed,
            self.run.location,
            read_metrics(self.run),
            trajectory,
            RunRecord.model_validate(self.begun),
        )

    def write_audit(
        self,
        figures: dict[str, Any],
        samples: Weighted | None,
        trajectory: pa.Table | None,
        changed: nn.Module | None = None,
    ) -> None:
        """``metrics.json`` and the report; with ``audit.samples`` another one, which shows some."""
        if self.write:
            write_metrics(self.run, figures)
            if self.config.audit.report:
                drawn = None if samples is None else (samples.influence, of_rows(samples.weights))
                shown = self._samples(samples, changed) if self.config.audit.samples else {}
                self.record.samples_shown = sum(map(len, shown.values()))
                pages = {"report.html": None} | ({WITH_SAMPLES: shown} if shown else {})
                for name, each in pages.items():
                    page = render_report(self.record.to_json(), figures, drawn, trajectory, each)
                    self.run.write_text(name, page)

    def _samples(self, samples: Weighted | None, changed: nn.Module | None) -> dict[str, list[Shown]]:
        """Samples to show under the model as it was written; of an audit, the model that is audited."""
        event("samples are shown", level=logging.WARNING, page=below(self.run.location, WITH_SAMPLES))
        part = self.part if changed is None else self.part.of_model(changed)
        influence = None if samples is None else samples.influence
        forget, source = self.features["forget"], self.inputs.sources["forget"]
        return audit_job.samples(forget, source, part, influence, self.config.audit.samples)


def gaps_of(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Gaps of the figures after, and before, to those of the reference model."""
    retrained, divergences = [figures["retrained"]], [figures["reference"]["after"]]
    return reference_gaps(figures["after"], retrained, divergences, figures.get("before"))


def _looks_at_unseen(target: TargetRecord) -> bool:
    """Whether unseen rows say where a target is met."""
    return target.reason.startswith("auto") or target.metric.startswith("membership")


def _fields(target: StopTarget) -> dict[str, Any]:
    return {name: getattr(target, name) for name in TargetRecord.model_fields}
