"""Features on Ray tasks: made from shards, mapped over, and reduced in a tree.

Every remote function is one line around a pure one. Features stay on the node that made them; what is made of them
travels.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
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
from imu_ray.models.layers import compile_around
from imu_ray.scopes.base import Part
from imu_ray.scopes.extraction import extract_features
from imu_ray.scopes.features import FeatureShard, Positions, ShardReport, labels_and_places, take_rows
from imu_ray.tasks.base import rows_at_once

R = TypeVar("R")
ARRIVAL_SECONDS = 120.0  # within which some of the features that a process waits for must come
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


@dataclass(frozen=True)
class Extraction:
    """What the features of a sample set are made with."""

    source: Source
    part: Part
    model: "ray.ObjectRef[nn.Module]"
    device: str
    settings: InfluenceConfig

    def run(self, shard: Shard) -> tuple[FeatureShard, ShardReport]:
        """The forward pass of a shard."""
        model = _model(self.model, self.part.task.head, self.device, self.settings)
        return extract_features(self.source, shard, self.part, model, torch.device(self.device), self.settings)


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


def _made(given: Any) -> Any:
    """Features that are made now; what was kept, or is no features, as it is."""
    return given.make()[0] if isinstance(given, FeatureSpec) else given


def fetch(refs: "list[ray.ObjectRef[FeatureShard]] | list[FeatureSpec]") -> list[FeatureShard]:
    """The features of a whole set, in this process, which may be the caller's own.

    Raises:
        TimeoutError: some do not come; they were lost with their node, and there is no room to make them again.
    """
    if not isinstance(refs[0], FeatureSpec):
        waiting = refs
        while waiting:
            came, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=ARRIVAL_SECONDS)
            if not came:
                raise TimeoutError(f"{len(waiting)} of {len(refs)} shards of features did not come")
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
def _map(stage: StageRef, *given: FeatureShard | FeatureSpec | npt.NDArray[Any]) -> Any:
    return stage.begin()(*map(_made, given))


@ray.remote
def _select(stage: StageRef, shard: FeatureShard, report: ShardReport) -> tuple[FeatureShard, ShardReport]:
    return take_rows(shard, report, stage.begin()(shard))


@ray.remote
def _merge(*parts: Any) -> Any:
    return merge_tree(parts)


def ids_of(shard: FeatureShard) -> pa.StringArray:
    """Ids of the samples of a shard."""
    return shard.ids


class FeatureSet:
    """Handle on the features of one sample set: references to arrays in the object store, or how to make them anew."""

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

    def also_in(self, other: "FeatureSet") -> int:
        """Samples whose input is that of a sample of another set, by 64 bits of its digest."""
        marks = np.unique(np.concatenate([report.marks_n for report in other.reports]))
        after = [np.searchsorted(marks, report.marks_n, "right") for report in self.reports]
        # The mark before a place, or the last one before the first place, which is larger and so another.
        return sum(
            int((marks[place - 1] == report.marks_n).sum()) for place, report in zip(after, self.reports, strict=True)
        )

    def holds(self, ids: pa.ChunkedArray) -> bool:
        """Whether these are the sample ids, in order."""
        if len(ids) != self.rows:
            return False
        start = 0
        for part in self.stream("ids", ids_of):
            if ids.slice(start, len(part)).to_pylist() != part.to_pylist():
                return False
            start += len(part)
        return True

    def labels_and_places(self, name: str) -> tuple[npt.NDArray[Any], Positions]:
        """Of every sample of the set its label ``[N]`` or ``[N, ...]``, and its place in what the caller gave."""
        labels, places = zip(*self.map(f"labels of {name}", labels_and_places), strict=True)
        return np.concatenate(labels), np.concatenate(places)

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

    def spaced(self, rows: int) -> "FeatureSet":
        """Evenly spaced shards, as many as hold so many rows; all where there are fewer."""
        count = min(len(self.refs), -(-rows * len(self.refs) // self.rows))
        return self.part([place * len(self.refs) // count for place in range(count)])

    def part(self, shards: Iterable[int]) -> "FeatureSet":
        """Some of the shards, by their places."""
        chosen = list(shards)
        return FeatureSet(self.runner, [self.refs[i] for i in chosen], [self.reports[i] for i in chosen])

    def map(self, stage: str, function: Callable[..., R]) -> list[R]:
        """``function`` of every shard, in shard order."""
        return list(self.stream(stage, function))

    def stream(
        self,
        stage: str,
        function: Callable[..., R],
        *,
        fetch: bool = True,
        column: npt.NDArray[Any] | None = None,
        beside: "FeatureSet | None" = None,
    ) -> Iterator[R]:
        """``function`` of every shard as the results come, in shard order.

        Args:
            stage: name of the tasks.
            function: of a shard, of the rows of ``column`` that belong to it, and of the same shard ``beside``.
            fetch: whether results are fetched; otherwise they stay where they were made and references are yielded.
            column: a value for each sample of the set, in its order.
            beside: features of the same samples under another model.
        """
        tasks = self.runner.tasks(_map, stage, len(self.refs), gpu=self.runner.recompute or self.runner.deep)
        shared = self.runner.share(stage, function)
        ends = np.cumsum([report.rows for report in self.reports])

        def submit(index: int) -> "ray.ObjectRef[R]":
            more: list[Any] = [] if column is None else [column[ends[index] - self.reports[index].rows : ends[index]]]
            more += [] if beside is None else [beside.refs[index]]
            return tasks(index).remote(shared, self.refs[index], *more)

        return self.runner.run(stage, submit, len(self.refs), lambda index, _: self.reports[index].rows, fetch=fetch)

    def reduce(self, stage: str, function: Callable[..., S], column: npt.NDArray[Any] | None = None) -> S:
        """``function`` of every shard, merged in one binary tree over block index; arguments as of ``stream``."""
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

        for part in self.stream(stage, function, fetch=False, column=column):
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
    source: Source, part: Part, model: "ray.ObjectRef[nn.Module]", config: UnlearnConfig, stage: str
) -> FeatureSet:
    """One forward pass over ``source``.

    The features stay in the object store, or are dropped and made again by what needs them.

    ``model`` is what ``share`` returned.
    """
    runner = TaskRunner(config)
    block_rows = rows_at_once(config.influence.block_rows, part.task)
    shards = source.shards(block_rows, config.influence.blocks_per_shard)
    made_with = Stage(stage, runner.threads, Extraction(source, part, model, runner.device, config.influence))
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
