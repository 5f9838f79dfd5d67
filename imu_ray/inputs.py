"""What a run works on: the model and its head, the sample sets, and their features. Made once; any number of runs may share it."""

import copy
import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from imu_ray.config import UnlearnConfig
from imu_ray.data import PartSource, Source, draw_rows, open_source
from imu_ray.distributed import feature_job, metrics
from imu_ray.distributed.feature_job import FeatureSet
from imu_ray.errors import ConfigError, ForgetSetError
from imu_ray.events import event
from imu_ray.models.spec import ModelSpec
from imu_ray.run.record import describe_samples, digest_of
from imu_ray.scopes.features import FeatureShard
from imu_ray.scopes.head import Head
from imu_ray.settings import nearest
from imu_ray.tasks.base import Task
from imu_ray.tasks.classification import TASKS


@dataclass(frozen=True)
class Inputs:
    """A model on the CPU in eval mode, its head, the open sample sets, and (after ``extract``) their features and description."""

    model: nn.Module
    head: Head
    task: Task
    sources: Mapping[str, Source]
    features: Mapping[str, FeatureSet] = field(default_factory=dict)
    described: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls, model: nn.Module | ModelSpec, forget_set: Any, task: str, evaluation: Mapping[str, Any] | None, config: UnlearnConfig
    ) -> "Inputs":
        """Check the model and all samples as far as that needs no forward pass.

        Raises:
            ImuError: something cannot be used; the message says what.
        """
        if not isinstance(model, nn.Module | ModelSpec):
            raise ConfigError(f"model is a {type(model).__name__}; expected a torch.nn.Module or an imu_ray.ModelSpec")
        if not isinstance(evaluation, Mapping | None):
            raise ConfigError(f"evaluation is a {type(evaluation).__name__}; expected a mapping of names to sample sets")
        if task not in TASKS:
            raise ConfigError(f"task is {task!r}; {nearest(task, TASKS)}")
        whole = open_source(forget_set, config.forget_set)
        size = config.forget_set.size
        rows = draw_rows(whole.num_rows, size, config.forget_set.size_seed) if isinstance(size, int | float) else None
        # Classes are told from the labels, which are known after the features.
        sources = {"forget": whole if rows is None else PartSource(whole, rows)}
        for name, source in (evaluation or {}).items():
            if name in ("forget", "membership"):
                raise ConfigError(
                    f"an evaluation set is named {name!r}; expected another name, because results under it are of the forget set"
                )
            sources[name] = open_source(source, config.forget_set, f"evaluation set {name!r}")
        # What travels is on the CPU and in eval mode; the caller's model stays as it is.
        built = model.build() if isinstance(model, ModelSpec) else copy.deepcopy(model).cpu().eval()
        named_head = model.head if isinstance(model, ModelSpec) else None
        chosen = TASKS[task].for_model(built, sources["forget"], config.forget_set, named_head)
        for source in sources.values():
            source.check(chosen.num_classes)
        return cls(built, Head.of(built, chosen.head), chosen, sources)

    @property
    def names(self) -> set[str]:
        """Names of the sample sets."""
        return {*self.sources, *self.features}

    def extract(self, config: UnlearnConfig) -> "Inputs":
        """With features: one forward pass over every sample set."""
        features, described = {}, {}
        model = feature_job.share(self.model)
        for name, source in self.sources.items():
            made = feature_job.extract(source, self.task, model, config, f"features of {name}")
            if not made.rows:
                raise ForgetSetError(f"every row of {source.name} was left out; expected at least one usable sample")
            features[name], described[name] = made, describe_samples(source, made.reports)
            size = described[name]["feature_bytes"]
            metrics.gauge("feature_bytes", size, f"features of {name}")
            metrics.flush()
            event("features made", set=name, rows=made.rows, left_out=len(described[name]["bad_rows"]), bytes=size)
        return dataclasses.replace(self, features=features, described=described)

    def without_sources(self) -> "Inputs":
        """The same without the samples, which nobody needs once there are features."""
        return dataclasses.replace(self, sources={})

    def select(self, config: UnlearnConfig) -> "Inputs":
        """With the part of the forget set that ``forget_set.size`` asks for, and the resources of ``config``.

        Raises:
            ConfigError: the forget set has no sample of a class.
        """
        features = {name: made.under(config) for name, made in self.features.items()}
        size, forget = config.forget_set.size, features["forget"]
        if isinstance(size, tuple):
            forget = forget.select(functools.partial(_of_classes, classes=size))
            found = set().union(*forget.map("labels", _classes))
            if set(size) - found:
                missing = sorted(set(size) - found)
                raise ConfigError(
                    f"forget_set.size names classes {missing}, of which the forget set has no sample; expected classes it holds"
                )
        elif size is not None:
            rows = draw_rows(self.described["forget"]["rows_given"], size, config.forget_set.size_seed)
            if len(rows) < self.described["forget"]["rows_read"]:
                forget = forget.select(functools.partial(_at_places, places=rows))
        if not forget.rows:
            raise ForgetSetError(
                f"every row of the part of {self.described['forget']['name']} was left out; expected at least one usable sample"
            )
        described = {**self.described, "forget": {**self.described["forget"], "rows_used": forget.rows}}
        return dataclasses.replace(self, features={**features, "forget": forget}, described=described)

    def digests(self) -> dict[str, str]:
        """Digests of the samples, by which a run that goes on knows that they are the same."""
        evaluation = {name: part["fingerprint"] for name, part in self.described.items() if name != "forget"}
        return {
            "forget set": self.described["forget"]["fingerprint"],
            "set of evaluation sets": digest_of(json.dumps(evaluation)),
        }


def _of_classes(shard: FeatureShard, classes: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    return np.isin(shard.labels_n, classes)


def _at_places(shard: FeatureShard, places: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    return np.isin(shard.places_n, places, assume_unique=True)


def _classes(shard: FeatureShard) -> set[int]:
    return set(shard.labels_n.tolist())
