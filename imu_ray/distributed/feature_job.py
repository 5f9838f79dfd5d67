"""Scoring on Ray tasks: shards -> features -> statistics -> tree reduce -> scores.

Every remote function is one line around a pure one. Features stay on the node that made them; statistics and scores travel.
"""

import functools
from collections.abc import Callable, Sequence
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
from imu_ray.distributed.tasks import TRIM_SECONDS, TaskRunner, begin_task, explain_failure, trim
from imu_ray.influence.curvature.base import S, merge_tree
from imu_ray.influence.direction import fit_direction
from imu_ray.influence.gradients import LayerIO
from imu_ray.influence.order_statistics import quantile
from imu_ray.influence.score_table import ColumnFile, ScoreTable
from imu_ray.models.layers import compile_around
from imu_ray.scopes.extraction import extract_features
from imu_ray.scopes.features import FeatureShard, ShardReport, norms_of, score_shard, shard_statistics, take_rows
from imu_ray.scopes.head import Head
from imu_ray.tasks.base import Task

R = TypeVar("R")
REDUCE_FAN_IN = 8  # a power of two, so that the tree over block index is kept


@functools.lru_cache(maxsize=2)
def _model(ref: "ray.ObjectRef[nn.Module]", head: str, device: str, settings: InfluenceConfig) -> nn.Module:
    """The model, fetched, moved and compiled once per worker process."""
    model = ray.get(ref).to(device)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if settings.compile:
        compile_around(model, head)
    return model


@functools.lru_cache(maxsize=4)
def _shared(ref: "ray.ObjectRef[Any]") -> Any:
    """What all tasks of a stage share, fetched once per worker process: in their arguments the driver would keep it for each."""
    return ray.get(ref)


@dataclass(frozen=True)
class ForwardPass:
    """How a shard's features are made. In place of features that are not kept it travels to every task that works on them."""

    refs: "Sequence[ray.ObjectRef[Any]]"
    shard: Shard
    choices: "tuple[ray.ObjectRef[Any], ...]" = ()

    def make(self) -> tuple[FeatureShard, ShardReport]:
        """The forward pass, and what is chosen of it."""
        source, task, model, _, _, device, settings = _shared(self.refs[0])
        made, report = extract_features(
            source, self.shard, task, _model(model, task.head, device, settings), torch.device(device), settings
        )
        for choice in self.choices:
            made, report = take_rows(made, report, _shared(choice)[0](made))
        return made, report


def _made(features: FeatureShard | ForwardPass) -> FeatureShard:
    """Features that were kept, or that are made now."""
    return features.make()[0] if isinstance(features, ForwardPass) else features


def fetch(refs: "list[ray.ObjectRef[FeatureShard]] | list[ForwardPass]") -> list[FeatureShard]:
    """The features of a whole set, in this process, which may be the caller's own."""
    if not isinstance(refs[0], ForwardPass):
        return list(ray.get(refs))
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return [_made(recipe) for recipe in refs]
    finally:
        torch.backends.cudnn.allow_tf32 = before
        # This process may outlive the session, and the next one counts its references from the start again.
        _shared.cache_clear()
        _model.cache_clear()


@ray.remote
def _extract(refs: "Sequence[ray.ObjectRef[Any]]", shard: Shard) -> tuple[FeatureShard, ShardReport]:
    begin_task(*_shared(refs[0])[3:5])
    return ForwardPass(refs, shard).make()


@ray.remote
def _report(recipe: ForwardPass) -> ShardReport:
    begin_task(*_shared(recipe.refs[0])[3:5])
    return replace(recipe.make()[1], feature_bytes=0)


@ray.remote
def _map(refs: "Sequence[ray.ObjectRef[Any]]", features: FeatureShard | ForwardPass) -> Any:
    function, stage, threads = _shared(refs[0])
    begin_task(stage, threads)
    if not isinstance(features, ForwardPass):  # a forward pass would take 5 % longer: it touches most of that memory again
        trim(every=TRIM_SECONDS)
    return function(_made(features))


@ray.remote
def _select(refs: "Sequence[ray.ObjectRef[Any]]", shard: FeatureShard, report: ShardReport) -> tuple[FeatureShard, ShardReport]:
    choose, stage, threads = _shared(refs[0])
    begin_task(stage, threads)
    return take_rows(shard, report, choose(shard))


@ray.remote
def _merge(*parts: Any) -> Any:
    return merge_tree(parts)


def _ids(shard: FeatureShard) -> pa.StringArray:
    return shard.ids


class FeatureSet:
    """Handle on the features of one sample set: references in the driver, arrays in the object store; or how to make them anew."""

    def __init__(
        self, runner: TaskRunner, refs: "list[ray.ObjectRef[FeatureShard]] | list[ForwardPass]", reports: list[ShardReport]
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
        same, start = True, 0

        def compare(part: pa.StringArray) -> None:
            nonlocal same, start
            same = same and ids.slice(start, len(part)).to_pylist() == part.to_pylist()
            start += len(part)

        self.stream("ids", _ids, compare)
        return same

    def under(self, config: UnlearnConfig) -> "FeatureSet":
        """The same features, worked on with the resources of ``config``."""
        return FeatureSet(TaskRunner(config), self.refs, self.reports)

    def select(self, choose: Callable[[FeatureShard], npt.NDArray[np.bool_]]) -> "FeatureSet":
        """The features of the samples that ``choose`` marks in each shard."""
        refs: list[Any] = list(self.refs)
        reports: list[Any] = [None] * len(self.refs)
        shared = [ray.put((choose, "selection", self.runner.threads))]
        if self.runner.recompute:
            refs = [replace(recipe, choices=(*recipe.choices, *shared)) for recipe in refs]
        function, returns = (_report, 1) if self.runner.recompute else (_select, 2)
        tasks = self.runner.tasks(function, "selection", len(self.refs), gpu=self.runner.recompute, num_returns=returns)

        def submit(index: int) -> "ray.ObjectRef[ShardReport]":
            if self.runner.recompute:
                return tasks(index).remote(refs[index])
            refs[index], report = tasks(index).remote(shared, self.refs[index], self.reports[index])
            return report

        def done(index: int, report: ShardReport) -> int:
            reports[index] = report
            return report.rows

        self.runner.run("selection", submit, len(self.refs), done)
        kept = [index for index, report in enumerate(reports) if report.rows]
        return FeatureSet(self.runner, [refs[index] for index in kept], [reports[index] for index in kept])

    def map(self, stage: str, function: Callable[[FeatureShard], R]) -> list[R]:
        """``function`` of every shard, in shard order."""
        results: list[R] = []
        self.stream(stage, function, results.append)
        return results

    def stream(self, stage: str, function: Callable[[FeatureShard], R], take: Callable[[R], None]) -> None:
        """``function`` of every shard; ``take`` is given the results as they come, in shard order."""
        early: dict[int, R] = {}
        turn = 0

        def done(index: int, result: R) -> int:
            nonlocal turn
            early[index] = result
            while turn in early:
                take(early.pop(turn))
                turn += 1
            return self.reports[index].rows

        self.runner.run(stage, self._submitter(stage, function), len(self.refs), done)

    def _submitter(self, stage: str, function: Callable[[FeatureShard], R]) -> Callable[[int], "ray.ObjectRef[R]"]:
        """What submits the task of each shard."""
        tasks = self.runner.tasks(_map, stage, len(self.refs), gpu=self.runner.recompute)
        shared = [ray.put((function, stage, self.runner.threads))]
        return lambda index: tasks(index).remote(shared, self.refs[index])

    def reduce(self, stage: str, head: Head, statistics: Callable[[LayerIO], S]) -> S:
        """``statistics`` of every block, merged in one binary tree over block index."""
        submit_part = self._submitter(stage, functools.partial(shard_statistics, head=head, statistics=statistics))
        merge = _merge.options(**self.runner.options(f"{stage} merge"))
        # Of each level of the tree, the parts whose group is not whole yet; merged parts are let go as the stage runs.
        levels: list[list[Any]] = [[]]

        def push(part: "ray.ObjectRef[S]", level: int = 0) -> None:
            if level == len(levels):
                levels.append([])
            levels[level].append(part)
            if len(levels[level]) == REDUCE_FAN_IN:
                group, levels[level] = levels[level], []
                push(merge.remote(*group), level + 1)

        def submit(index: int) -> "ray.ObjectRef[S]":
            part = submit_part(index)
            push(part)
            return part

        self.runner.run(stage, submit, len(self.refs), lambda index, _: self.reports[index].rows, fetch=False)
        rest: list[Any] = []
        for level in levels:  # what is left of a level stands after the groups that were whole
            rest = [merge.remote(*level, *rest)] if level else rest
        try:
            return ray.get(rest[0])
        except RayError as error:
            raise explain_failure(stage, error) from None


def share(model: nn.Module) -> "ray.ObjectRef[nn.Module]":
    """The model in the object store, from where each worker process takes it once for all sample sets."""
    return ray.put(model)


def extract(source: Source, task: Task, model: "ray.ObjectRef[nn.Module]", config: UnlearnConfig, stage: str) -> FeatureSet:
    """One forward pass over ``source``; the features stay in the object store, or are dropped and made again by what needs them.

    ``model`` is what ``share`` returned.
    """
    runner = TaskRunner(config)
    shards = source.shards(config.influence.block_rows, config.influence.blocks_per_shard)
    shared = [ray.put((source, task, model, stage, runner.threads, runner.device, config.influence))]
    refs: list[Any] = [ForwardPass(shared, shard) for shard in shards] if runner.recompute else [None] * len(shards)
    reports: list[Any] = [None] * len(shards)
    function, returns = (_report, 1) if runner.recompute else (_extract, 2)
    tasks = runner.tasks(function, stage, len(shards), gpu=True, num_returns=returns)

    def submit(index: int) -> "ray.ObjectRef[ShardReport]":
        if runner.recompute:
            return tasks(index).remote(refs[index])
        refs[index], report = tasks(index).remote(shared, shards[index])
        return report

    def done(index: int, report: ShardReport) -> int:
        reports[index] = report
        return report.rows

    runner.run(stage, submit, len(shards), done)
    return FeatureSet(runner, refs, reports)


def score(features: FeatureSet, head: Head, config: UnlearnConfig, fitted_on: FeatureSet | None = None) -> ScoreTable:
    """Influence of every sample and what stands behind it.

    Args:
        features: of the forget set.
        head: the head that is scored.
        config: ``influence.*``.
        fitted_on: features that the curvature is fitted on; None: those of the forget set.

    Returns:
        The scores, in the order of the source.
    """

    def norm_quantile(level: float) -> float:
        with ColumnFile() as file:
            features.stream("gradient norms", functools.partial(norms_of, head=head), file.take)
            return quantile(file.parts, level)

    direction, figures = fit_direction(
        config.influence,
        functools.partial(features.reduce, "moments", head),
        None if fitted_on is None else functools.partial(fitted_on.reduce, "curvature", head),
        norm_quantile,
    )
    table = ScoreTable(figures)
    features.stream("scores", functools.partial(score_shard, head=head, direction_CD=direction), table.take)
    return table.close(config.influence.clip_quantile)
