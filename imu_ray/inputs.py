"""What opens: the model, the part that may move, sample sets and features. Any number of runs may share it."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from imu_ray.audits import AUDITS
from imu_ray.config import ForgetSetConfig, ResourcesConfig, UnlearnConfig
from imu_ray.data import (
    Fields,
    PartSource,
    Source,
    ViewSource,
    draw_rows,
    open_forget_set,
    open_other_set,
    own_settings,
)
from imu_ray.data.columns import LABEL
from imu_ray.distributed import feature_job, metrics, ray_data  # noqa: F401 (the source of ray.data)
from imu_ray.distributed.feature_job import FeatureSet
from imu_ray.distributed.session import node_store_bytes, object_store_bytes
from imu_ray.errors import CheckpointError, ConfigError, ForgetSetError, NonFiniteError
from imu_ray.events import event
from imu_ray.models.checkpoint import load_checkpoint, model_hash
from imu_ray.models.choice import choose_layers
from imu_ray.models.copies import plain_copy, to_eval
from imu_ray.models.layers import logits_of
from imu_ray.models.pretrained import ADAPTER, CONFIG
from imu_ray.models.spec import ModelSpec, require_model
from imu_ray.recipes import HEAD, LAST, settle_scope
from imu_ray.run.record import ModelRecord, SamplesRecord
from imu_ray.scopes.base import (
    FORGET_FRESH_VIEWS,
    FORGET_VIEWS,
    FRESH_VIEWS,
    TEST_FRESH_VIEWS,
    TEST_VIEWS,
    VIEWS,
    Part,
)
from imu_ray.scopes.features import FeatureShard, ShardReport, at_places
from imu_ray.scopes.head import Head
from imu_ray.scopes.layers import Layers
from imu_ray.tasks import TASKS
from imu_ray.tasks.base import Batch, Task, read_batch, rows_at_once
from imu_ray.tasks.preprocessing import named_for
from imu_ray.updates.stopping import metric_of, target_metric

EXAMPLES = 8  # rows that a model is traced with
OF_FORGET = ("forget", FORGET_VIEWS, FORGET_FRESH_VIEWS)


@dataclass(frozen=True)
class Inputs:
    """A model on the CPU in eval mode, the part that may move, the sample sets, and (after ``extract``) their features.

    ``origin`` says where the model came from when a spec was given.
    """

    model: nn.Module
    part: Part
    task: Task
    sources: Mapping[str, Source]
    features: Mapping[str, FeatureSet] = field(default_factory=dict)
    described: Mapping[str, SamplesRecord] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        model: nn.Module | ModelSpec,
        forget_set: Any,
        task: str,
        evaluation: Mapping[str, Any] | None,
        config: UnlearnConfig,
        skeleton: nn.Module | None = None,
    ) -> "Inputs":
        """Check the model and all samples as far as that needs no forward pass.

        A ``skeleton``, of shapes without numbers, stands for the model where nothing is to be run.

        Raises:
            ImuError: something cannot be used; the message says what.
        """
        require_model(model)
        if not isinstance(evaluation, Mapping | None):
            raise ConfigError(
                f"evaluation is a {type(evaluation).__name__}; expected a mapping of names to sample sets"
            )
        kind = TASKS[task]
        whole = open_forget_set(forget_set, config.forget_set, kind.fields(config.forget_set))
        size = config.forget_set.chosen
        rows = draw_rows(whole.num_rows, size, config.forget_set.size_seed) if isinstance(size, int | float) else None
        # Classes are told from the labels, which are known after the features.
        sources = {"forget": whole if rows is None else PartSource(whole, rows)}
        for name, source in (evaluation or {}).items():
            if not isinstance(name, str) or name in ("", "forget", *VIEWS, *FRESH_VIEWS, *AUDITS):
                raise ConfigError(
                    f"an evaluation set is named {name!r}; expected another text; results of the forget set have those "
                    "names"
                )
            fields = without_label(kind.fields) if name in kind.retrieval_sets else kind.fields
            sources[name] = open_other_set(name, source, config.forget_set, fields)
        # What travels is on the CPU and in eval mode; the caller's model stays as it is.
        built = skeleton or to_eval(plain_copy(model.build() if isinstance(model, ModelSpec) else model))
        spec = model if isinstance(model, ModelSpec) else None
        for source in sources.values():
            source.row_settings = named_for(source.row_settings or config.forget_set, spec, built)
        named_head = model.head if isinstance(model, ModelSpec) else None
        rows_as = named_for(config.forget_set, spec, built)
        chosen = kind.for_model(built, sources, rows_as, named_head)
        for source in sources.values():
            source.check(chosen.num_classes)
        origin = model.describe() if isinstance(model, ModelSpec) else {}
        scope = settle_scope(config, chosen)
        if scope.ascent.scope not in (config.ascent.scope, HEAD):
            reason = "the last layer is a convolution with more after it, so that there is no head over kept features"
            event("scope chosen", scope=scope.ascent.scope, reason=reason)
        part = open_part(built, chosen, sources["forget"], scope)
        return cls(built, part, chosen, {**sources, **views_of(sources, config)}, origin=origin)

    @property
    def names(self) -> set[str]:
        """Names of the sample sets that an update may look at: metrics are measured on them at every check."""
        return {*self.sources, *self.features}.difference(self.task.retrieval_sets, FRESH_VIEWS)

    @property
    def measured(self) -> dict[str, FeatureSet]:
        """Features of those sets."""
        return {name: made for name, made in self.features.items() if name in self.names}

    @property
    def audited(self) -> dict[str, FeatureSet]:
        """Features of all sets that metrics are measured on, fresh views among them."""
        return {name: made for name, made in self.features.items() if name not in self.task.retrieval_sets}

    @property
    def of_rows(self) -> dict[str, FeatureSet]:
        """The same without views, which are no rows of their own."""
        return {name: made for name, made in self.measured.items() if name not in VIEWS}

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the model."""
        return next(self.model.parameters()).dtype

    def describe_model(self) -> ModelRecord:
        """What the record says of the model before the run."""
        return ModelRecord(
            kind=type(self.model).__name__,
            layers=list(self.part.parameters),
            hash_before=model_hash(self.model),
            **self.origin,
        )

    def require_sets(self, config: UnlearnConfig) -> None:
        """Refuse settings that name a sample set which was not given, or a metric that the task does not have."""
        ascent = config.ascent
        named = [("influence.curvature_set", config.influence.curvature_set)]
        named += [("ascent.preconditioner_sets", name) for name in ascent.preconditioner_sets if name != "test"]
        named += [("ascent.guard.limits", metric.rpartition(".")[0]) for metric in ascent.guard.limits]
        for name in ascent.max_change:
            metric_of(name, self.task.metrics, ["forget"], "ascent.max_change")
        for key, name in named:
            if name not in self.names:
                audit_alone = ", which is measured in the audit alone" * (name in FRESH_VIEWS)
                raise ConfigError(
                    f"{key} names the sample set {name!r}{audit_alone}; expected forget or an evaluation set that was "
                    f"given, one of {sorted(self.names)}; give it in evaluation, or name another"
                )
        for name, limit in ascent.guard.limits.items():
            metric = metric_of(name, self.task.metrics, sorted(self.names), "ascent.guard.limits")
            metric.check_number(limit, f"ascent.guard.limits.{name}")
        for name, value in ascent.stop.targets.items():
            if value is None:
                continue
            metric = target_metric(name, self.task.metrics)
            if value != "auto":
                metric.check_number(value, f"ascent.stop.targets.{name}")

    def ascent_resources(self, resources: ResourcesConfig) -> ResourcesConfig:
        """With a number of workers for the update: all where layers move, one for a head if the features fit a node."""
        if resources.ascent_workers != "auto":
            return resources
        if self.part.deep:
            return resources.model_copy(update={"ascent_workers": resources.workers})
        kept = sum(part.feature_bytes for part in self.described.values())
        return resources.model_copy(update={"ascent_workers": 1 if kept <= node_store_bytes() else resources.workers})

    def fitting(self, config: UnlearnConfig) -> UnlearnConfig:
        """With features of layers that are made again in every stage where they do not fit the object store."""
        if not self.part.deep or config.influence.features == "recompute":
            return config
        rows = sum(source.num_rows for source in self.sources.values())
        needed, room = rows * self.part.width * max(self.dtype.itemsize, 4), object_store_bytes()
        if needed <= room:
            return config
        event("features are made again in every stage", bytes=needed, object_store=room)
        return config.with_overrides({"influence.features": "recompute"})

    def extract(self, config: UnlearnConfig) -> "Inputs":
        """With features: one forward pass over every sample set."""
        features, described = {}, {}
        model = feature_job.share(self.model)
        for name, source in self.sources.items():
            made = feature_job.extract(source, self.part, model, config, f"features of {name}")
            if not made.rows:
                raise ForgetSetError(f"every row of {source.name} was left out; expected at least one usable sample")
            own = own_settings(source, config.forget_set)
            if name in OF_FORGET:
                own = {key: value for key, value in own.items() if key == "transform"}  # the model's own, by its name
            features[name] = made
            described[name] = describe_samples(source, made.reports).model_copy(update={"settings": own})
            size = described[name].feature_bytes
            metrics.gauge("feature_bytes", size, f"features of {name}")
            metrics.flush()
            if name == "test" and described[name].fingerprint == described["forget"].fingerprint:
                raise ConfigError(
                    "evaluation['test'] is the forget set itself: its rows, labels and ids are the same; expected "
                    "samples that the model has never seen; give those, or leave it out"
                )
            event("features made", set=name, rows=made.rows, left_out=len(described[name].bad_rows), bytes=size)
        for name, (base, views, _) in kinds_of_views(config).items():
            if name in features and (usable := features[name].rows) != views * features[base].rows:
                raise NonFiniteError(
                    f"ascent.view_transform {config.ascent.view_transform!r} gives {usable} usable views of "
                    f"{features[base].rows} samples of {base}; expected {views} of each, with finite numbers; name "
                    "another transform"
                )
        return dataclasses.replace(self, features=features, described=described)

    def of_reference(self, location: str, config: UnlearnConfig) -> "Inputs":
        """The same samples under another model of this kind, from its checkpoint or its folder.

        Raises:
            CheckpointError: it does not fit.
        """
        if any((Path(location) / name).is_file() for name in (CONFIG, ADAPTER)):
            model = to_eval(ModelSpec(f"hf:{location}").build())
            with torch.no_grad():
                width = logits_of(model(usable_batch(self.task, self.sources["forget"], 1).inputs)).shape[-1]
            if width != self.task.num_classes:
                raise CheckpointError(
                    f"audit.reference {location} tells {width} {'tokens' if self.task.positions else 'classes'} "
                    f"apart, the model {self.task.num_classes}; expected a model with the same "
                    f"{'tokenizer' if self.task.positions else 'classes'}"
                )
        else:
            model = plain_copy(self.model)
            load_checkpoint(model, location)
        part = open_part(model, self.task, self.sources["forget"], config)
        return dataclasses.replace(self, model=model, part=part)

    def without_sources(self) -> "Inputs":
        """The same without the samples, which nobody needs once there are features."""
        return dataclasses.replace(self, sources={})

    def select(self, config: UnlearnConfig) -> "Inputs":
        """With the part of the forget set that ``forget_set.size`` asks for, and the resources of ``config``.

        Raises:
            ConfigError: the forget set has no sample of a class.
        """
        features = {name: made.under(config) for name, made in self.features.items()}
        size, forget = config.forget_set.chosen, features["forget"]
        choice: Callable[[FeatureShard], npt.NDArray[np.bool_]] | None = None
        if isinstance(size, tuple):
            choice = functools.partial(_of_classes, classes=size)
            forget = forget.select(choice)
            found = set().union(*forget.map("labels", _classes))
            if set(size) - found:
                missing = sorted(set(size) - found)
                raise ConfigError(
                    f"forget_set.size names classes {missing}, of which the forget set has no sample; expected classes "
                    "it holds"
                )
        elif size is not None:
            rows = draw_rows(self.described["forget"].rows_given, size, config.forget_set.size_seed)
            if len(rows) < self.described["forget"].rows_read:
                choice = functools.partial(at_places, places=rows)
                forget = forget.select(choice)
        if not forget.rows:
            raise ForgetSetError(
                f"every row of the part of {self.described['forget'].name} was left out; expected at least one usable "
                "sample"
            )
        chosen = {"forget": forget}
        for name in OF_FORGET[1:]:
            if name in features:
                chosen[name] = features[name] if choice is None else features[name].select(choice)
        features |= chosen
        described = {
            name: known.model_copy(
                update={
                    "rows_used": features[name].rows,
                    "in_forget_set": 0 if name in OF_FORGET else features[name].also_in(forget),
                }
            )
            for name, known in self.described.items()
            if name in features
        }
        return dataclasses.replace(self, features=features, described={**self.described, **described})

    def digests(self) -> dict[str, str]:
        """Digests of the samples, by which a run that goes on knows that they are the same."""
        evaluation = {
            name: [part.fingerprint, part.settings] if part.settings else part.fingerprint
            for name, part in self.described.items()
            if name != "forget"
        }
        return {
            "forget set": self.described["forget"].fingerprint,
            "set of evaluation sets": hashlib.sha256(json.dumps(evaluation).encode()).hexdigest(),
        }


def without_label(fields: Callable[[ForgetSetConfig], Fields]) -> Callable[[ForgetSetConfig], Fields]:
    """The same fields of a set whose labels are not read."""
    return lambda config: {key: column for key, column in fields(config).items() if key != LABEL}


def open_part(model: nn.Module, task: Task, samples: Source, config: UnlearnConfig) -> Part:
    """The layers that ``ascent.scope`` means."""
    if not config.ascent.deep:
        if not task.head:
            raise ConfigError(
                f"ascent.scope is {config.ascent.scope!r}, but {type(model).__name__} ends in a convolution with more "
                f"after it, which no head over kept features is; expected {LAST}, which auto chooses; leave it out"
            )
        return Head.of(model, task)
    example = usable_batch(task, samples, rows_at_once(EXAMPLES, task))
    names = choose_layers(model, example.inputs, config.ascent.scope, task.head)
    if task.retrieval_sets and set(names) == {task.head}:
        raise ConfigError(
            f"ascent.scope {config.ascent.scope!r} is the classifier {task.head!r} alone, which serves in training "
            "only, so that all would be found as before; expected layers before it, such as usable or last:3"
        )
    return Layers.of_names(model, task, names, example.inputs, config)


def usable_batch(task: Task, samples: Source, rows: int) -> Batch:
    """Of the first so many rows those that can be used; of the next ones where none can."""
    starts = range(0, samples.num_rows, rows)
    batches = (read_batch(task, samples, start, min(start + rows, samples.num_rows)) for start in starts)
    return next(batch for batch in batches if batch.ids)


def kinds_of_views(config: UnlearnConfig) -> dict[str, tuple[str, int, str]]:
    """By name of a set of views: which set they are of, how many of each row, and the stream of their draws.

    One view of each unseen sample shows the update what such views are like. The audit draws its own.
    """
    ascent, audit = config.ascent.views, config.audit.views
    return {
        FORGET_VIEWS: ("forget", ascent, ""),
        TEST_VIEWS: ("test", min(ascent, 1), ""),
        FORGET_FRESH_VIEWS: ("forget", audit, "audit "),
        TEST_FRESH_VIEWS: ("test", audit, "audit "),
    }


def views_of(sources: Mapping[str, Source], config: UnlearnConfig) -> dict[str, Source]:
    """The sets of views that are asked for, of the sets that are there."""
    return {
        name: ViewSource(sources[base], views, config.ascent.view_transform, config.seed, stream)
        for name, (base, views, stream) in kinds_of_views(config).items()
        if views and base in sources
    }


def _of_classes(shard: FeatureShard, classes: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    return np.isin(shard.labels_n, classes)


def _classes(shard: FeatureShard) -> set[int]:
    return set(shard.labels_n.tolist())


def describe_samples(source: Source, reports: Sequence[ShardReport]) -> SamplesRecord:
    """Name, rows, fingerprint and rows left out of one sample set; no sample content."""
    return SamplesRecord(
        name=source.name,
        rows_given=source.rows_given,
        rows_read=source.num_rows,
        rows_used=sum(report.rows for report in reports),
        fingerprint=hashlib.sha256(b"".join(report.digests for report in reports)).hexdigest(),
        bad_rows=[vars(bad) for report in reports for bad in report.bad_rows],
        forward_calls=sum(1 for report in reports for size in report.block_sizes if size),
        forward_seconds=sum(report.forward_seconds for report in reports),
        feature_bytes=sum(report.feature_bytes for report in reports),
        selection=source.selection,
    )
