"""Scoring on Ray tasks: shards -> features -> statistics -> tree reduce -> scores.

Every remote function is one line around a pure one. Features stay on the node that made them; statistics and scores travel.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError
from torch import nn

from imu_ray.config import InfluenceConfig, UnlearnConfig
from imu_ray.data import Shard, Source
from imu_ray.distributed import sharing
from imu_ray.distributed.tasks import Stage, StageRef, TaskRunner, explain_failure, fetch_stage
from imu_ray.errors import ForgetSetError, UnsupportedModelError
from imu_ray.influence.curvature.base import S, merge_tree
from imu_ray.influence.direction import fit_direction
from imu_ray.influence.gradients import LayerIO
from imu_ray.influence.intensity import Column
from imu_ray.models.layers import compile_around
from imu_ray.scopes.extraction import extract_features
from imu_ray.scopes.features import FeatureShard, ShardReport, take_rows
from imu_ray.scopes.head import SCORE_SCHEMA, Head, labels_column, norms_of, score_shard, shard_statistics
from imu_ray.tasks.base import Task

R = TypeVar("R")
REDUCE_FAN_IN = 8  # a power of two, so that the tree over block index is kept
ROW_GROUP = 65_536  # rows of the table that are written at once
JOINED = 64  # parts of the table that are copied into one, because each holds the whole message that it came in
INTENSITY_SCHEMA = SCORE_SCHEMA.append(pa.field("outlier", pa.float64())).append(pa.field("intensity", pa.float64()))


@functools.lru_cache(maxsize=2)
def _model(ref: "ray.ObjectRef[nn.Module]", head: str, device: str, settings: InfluenceConfig) -> nn.Module:
    """The model, fetched, moved and compiled once per worker process."""
    model = ray.get(ref).to(device)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if settings.compile:
        compile_around(model, head)
    return model


@dataclass(frozen=True)
class Extraction:
    """What the features of a sample set are made with."""

    source: Source
    task: Task
    model: "ray.ObjectRef[nn.Module]"
    device: str
    settings: InfluenceConfig

    def run(self, shard: Shard) -> tuple[FeatureShard, ShardReport]:
        """The forward pass of a shard."""
        model = _model(self.model, self.task.head, self.device, self.settings)
        return extract_features(self.source, shard, self.task, model, torch.device(self.device), self.settings)


@dataclass(frozen=True)
class FeatureSpec:
    """How the features of a shard are made; where they are not kept, it travels in their place to every task."""

    extraction: StageRef
    shard: Shard
    choices: tuple[StageRef, ...] = ()

    def make(self) -> tuple[FeatureShard, ShardReport]:
        """The forward pass, and what is chosen of it."""
        made, report = self.extraction.work().run(self.shard)
        for choice in self.choices:
            made, report = take_rows(made, report, choice.work()(made))
        return made, report


def _made(features: FeatureShard | FeatureSpec) -> FeatureShard:
    """Features that were kept, or that are made now."""
    return features.make()[0] if isinstance(features, FeatureSpec) else features


def fetch(refs: "list[ray.ObjectRef[FeatureShard]] | list[FeatureSpec]") -> list[FeatureShard]:
    """The features of a whole set, in this process, which may be the caller's own."""
    if not isinstance(refs[0], FeatureSpec):
        return list(ray.get(refs))
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return [_made(spec) for spec in refs]
    finally:
        torch.backends.cudnn.allow_tf32 = before
        # This process may outlive the session, and the next one counts its references from the start again.
        fetch_stage.cache_clear()
        _model.cache_clear()


@ray.remote
def _extract(spec: FeatureSpec) -> tuple[FeatureShard, ShardReport]:
    spec.extraction.begin()
    return spec.make()


@ray.remote
def _report(spec: FeatureSpec) -> ShardReport:
    spec.extraction.begin()
    return replace(spec.make()[1], feature_bytes=0)


@ray.remote
def _map(stage: StageRef, features: FeatureShard | FeatureSpec) -> Any:
    return stage.begin()(_made(features))


@ray.remote
def _select(stage: StageRef, shard: FeatureShard, report: ShardReport) -> tuple[FeatureShard, ShardReport]:
    return take_rows(shard, report, stage.begin()(shard))


@ray.remote
def _merge(*parts: Any) -> Any:
    return merge_tree(parts)


def _ids(shard: FeatureShard) -> pa.StringArray:
    return shard.ids


class FeatureSet:
    """Handle on the features of one sample set: references in the driver, arrays in the object store; or how to make them anew."""

    def __init__(
        self,
        runner: TaskRunner,
        refs: "list[ray.ObjectRef[FeatureShard]] | list[FeatureSpec]",
        reports: list[ShardReport],
    ) -> None:
        self.runner, self.refs, self.reports = runner, refs, reports

    @property
    def rows(self) -> int:
        """Samples with features."""
        return sum(report.rows for report in self.reports)

    def holds(self, ids: pa.ChunkedArray) -> bool:
        """Whether these are the sample ids, in order."""
        if len(ids) != self.rows:
            return False
        start = 0
        for part in self.stream("ids", _ids):
            if ids.slice(start, len(part)).to_pylist() != part.to_pylist():
                return False
            start += len(part)
        return True

    def under(self, config: UnlearnConfig) -> "FeatureSet":
        """The same features, worked on with the resources of ``config``."""
        return FeatureSet(TaskRunner(config), self.refs, self.reports)

    def select(self, choose: Callable[[FeatureShard], npt.NDArray[np.bool_]]) -> "FeatureSet":
        """The features of the samples that ``choose`` marks in each shard."""
        refs: list[Any] = list(self.refs)
        choice = self.runner.share("selection", choose)
        if self.runner.recompute:
            refs = [replace(spec, choices=(*spec.choices, choice)) for spec in refs]
        function, returns = (_report, 1) if self.runner.recompute else (_select, 2)
        tasks = self.runner.tasks(function, "selection", len(self.refs), gpu=self.runner.recompute, num_returns=returns)

        def submit(index: int) -> "ray.ObjectRef[ShardReport]":
            if self.runner.recompute:
                return tasks(index).remote(refs[index])
            refs[index], report = tasks(index).remote(choice, self.refs[index], self.reports[index])
            return report

        reports = list(self.runner.run("selection", submit, len(refs), _rows_reported))
        kept = [index for index, report in enumerate(reports) if report.rows]
        return FeatureSet(self.runner, [refs[index] for index in kept], [reports[index] for index in kept])

    def map(self, stage: str, function: Callable[[FeatureShard], R]) -> list[R]:
        """``function`` of every shard, in shard order."""
        return list(self.stream(stage, function))

    def stream(self, stage: str, function: Callable[[FeatureShard], R], *, fetch: bool = True) -> Iterator[R]:
        """``function`` of every shard as the results come, in shard order; references to them with ``fetch=False``."""
        tasks = self.runner.tasks(_map, stage, len(self.refs), gpu=self.runner.recompute)
        shared = self.runner.share(stage, function)

        def submit(index: int) -> "ray.ObjectRef[R]":
            return tasks(index).remote(shared, self.refs[index])

        return self.runner.run(stage, submit, len(self.refs), lambda index, _: self.reports[index].rows, fetch=fetch)

    def reduce(self, stage: str, head: Head, statistics: Callable[[LayerIO], S]) -> S:
        """``statistics`` of every block, merged in one binary tree over block index."""
        merge = _merge.options(**self.runner.options(f"{stage} merge"))
        # Of each level of the tree, the parts whose group is not whole yet; merged parts are let go as the stage runs.
        levels: list[list[Any]] = [[]]

        def push(part: Any, level: int = 0) -> None:
            if level == len(levels):
                levels.append([])
            levels[level].append(part)
            if len(levels[level]) == REDUCE_FAN_IN:
                group, levels[level] = levels[level], []
                push(merge.remote(*group), level + 1)

        function = functools.partial(shard_statistics, head=head, statistics=statistics)
        for part in self.stream(stage, function, fetch=False):
            push(part)
        rest: list[Any] = []
        for level in levels:  # what is left of a level stands after the groups that were whole
            rest = [merge.remote(*level, *rest)] if level else rest
        try:
            return ray.get(rest[0])
        except RayError as error:
            raise explain_failure(stage, error) from None


def share(model: nn.Module) -> "ray.ObjectRef[nn.Module]":
    """The model in the object store, from where each worker process takes it once for all sample sets."""
    return sharing.share(model, type(model).__name__, UnsupportedModelError)


def extract(
    source: Source, task: Task, model: "ray.ObjectRef[nn.Module]", config: UnlearnConfig, stage: str
) -> FeatureSet:
    """One forward pass over ``source``; the features stay in the object store, or are dropped and made again by what needs them.

    ``model`` is what ``share`` returned.
    """
    runner = TaskRunner(config)
    shards = source.shards(config.influence.block_rows, config.influence.blocks_per_shard)
    made_with = Stage(stage, runner.threads, Extraction(source, task, model, runner.device, config.influence))
    extraction = StageRef(sharing.share(made_with, source.name, ForgetSetError))
    refs: list[Any] = [FeatureSpec(extraction, shard) for shard in shards]
    function, returns = (_report, 1) if runner.recompute else (_extract, 2)
    tasks = runner.tasks(function, stage, len(shards), gpu=True, num_returns=returns)

    def submit(index: int) -> "ray.ObjectRef[ShardReport]":
        made = tasks(index).remote(refs[index])
        if runner.recompute:
            return made
        refs[index], report = made
        return report

    return FeatureSet(runner, refs, list(runner.run(stage, submit, len(shards), _rows_reported)))


def _rows_reported(_: int, report: ShardReport) -> int:
    return report.rows


@dataclass(frozen=True)
class Scores:
    """What is known of the samples of a forget set, ``[N]`` in their order.

    Attributes:
        losses: cross-entropy, nats.
        influence: negative where training on the sample lowered the forget-set loss.
        label_counts: samples of each label.
        outlier_norm: gradient norm of which ``outlier`` tells the multiple.
        figures: what stands behind the scores (``fit_direction``).
    """

    losses: Column
    influence: Column
    label_counts: dict[int, int]
    outlier_norm: float
    figures: dict[str, Any]


def score(features: FeatureSet, head: Head, config: UnlearnConfig, fitted_on: FeatureSet | None = None) -> Scores:
    """Influence of every sample and what stands behind it.

    Args:
        features: of the forget set.
        head: the head that is scored.
        config: ``influence.*``.
        fitted_on: features that the curvature is fitted on; None: those of the forget set.
    """

    def norm_quantile(level: float) -> float:
        norms = features.map("gradient norms", functools.partial(norms_of, head=head))
        return float(np.quantile(np.concatenate(norms), level))

    direction, figures = fit_direction(
        config.influence,
        functools.partial(features.reduce, "moments", head),
        None if fitted_on is None else functools.partial(fitted_on.reduce, "curvature", head),
        norm_quantile,
    )
    columns = {name: np.empty(features.rows) for name in ("loss", "influence", "gradient_norm")}
    counts, start = np.zeros(head.task.num_classes, np.int64), 0
    for part in features.stream("scores", functools.partial(score_shard, head=head, direction=direction)):
        for name, column in columns.items():
            column[start : start + len(part)] = part[name]
        counts += np.bincount(part["label"].drop_null(), minlength=len(counts))
        start += len(part)
    norm = float(np.quantile(columns["gradient_norm"], config.influence.clip_quantile, overwrite_input=True))
    label_counts = {label: count for label, count in enumerate(counts.tolist()) if count}
    return Scores(columns["loss"], columns["influence"], label_counts, norm, figures)


def _identify(shard: FeatureShard, head: Head) -> tuple[pa.StringArray, pa.Array, Column]:
    """Ids, labels and gradient norms: what of the table the driver does not hold."""
    return shard.ids, labels_column(shard), norms_of(shard, head)


def intensity_table(features: FeatureSet, head: Head, scores: Scores, weights: Column) -> Iterator[pa.Table]:
    """The table of all samples (``INTENSITY_SCHEMA``), a row group at a time."""
    start, waiting = 0, []
    for ids, labels, norms in features.stream("table", functools.partial(_identify, head=head)):
        rows = slice(start, start + len(ids))
        outlier = norms / scores.outlier_norm if scores.outlier_norm else np.zeros_like(norms)
        columns = [ids, labels, scores.losses[rows], scores.influence[rows], norms, outlier, weights[rows]]
        waiting.append(pa.table(columns, schema=INTENSITY_SCHEMA))
        if len(waiting) == JOINED:
            waiting = [pa.concat_tables(waiting).combine_chunks()]
        if sum(map(len, waiting)) >= ROW_GROUP:
            yield pa.concat_tables(waiting)
            waiting = []
        start = rows.stop
    if waiting:
        yield pa.concat_tables(waiting)
