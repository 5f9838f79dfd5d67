"""Scoring on Ray tasks: shards -> features -> statistics -> tree reduce -> scores.

Every remote function is one line around a pure one. Features stay on the node that made them; statistics and scores travel.
"""

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from torch import nn

from imu_ray.config import UnlearnConfig
from imu_ray.distributed import metrics
from imu_ray.errors import ImuError, StageFailedError
from imu_ray.forget_set import ForgetSet, Shard
from imu_ray.influence.curvature.base import S, merge_tree
from imu_ray.influence.direction import fit_direction
from imu_ray.influence.features import (
    FeatureShard,
    ShardReport,
    extract_features,
    norms_of,
    score_shard,
    shard_statistics,
    take_rows,
)
from imu_ray.influence.gradients import LayerIO
from imu_ray.models import Head
from imu_ray.progress import LINE_SECONDS, Progress
from imu_ray.tasks.base import Task

logger = logging.getLogger("imu_ray")
R = TypeVar("R")
METRIC_SECONDS = 1.0  # between records, each of which the process holds until it is exported
NAMES = 16  # different names of tasks in a stage, because Ray keeps figures for every name: 60 kB in the driver
JOINED = 64  # neighbouring results that the driver makes one
REDUCE_FAN_IN = 8  # a power of two, so that the tree over block index is kept


@functools.lru_cache(maxsize=2)
def _model(ref: "ray.ObjectRef[nn.Module]", device: str) -> nn.Module:
    """The model, fetched and moved once per worker process."""
    return ray.get(ref).to(device)


@functools.lru_cache(maxsize=4)
def _shared(ref: "ray.ObjectRef[Any]") -> Any:
    """What all tasks of a stage share, fetched once per worker process: in their arguments the driver would keep it for each."""
    return ray.get(ref)


def _begin(stage: str, threads: int) -> None:
    """Fix what the bits of a result depend on in this worker process, and count a second attempt."""
    if ray._private.worker.global_worker.core_worker.get_current_task_attempt_number() > 0:
        metrics.count("shards_retried", 1, stage)
        metrics.flush()
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 features are float32, on a GPU as on the CPU


@ray.remote
def _extract(refs: "Sequence[ray.ObjectRef[Any]]", shard: Shard) -> tuple[FeatureShard, ShardReport]:
    source, task, model, stage, threads, device = _shared(refs[0])
    _begin(stage, threads)
    return extract_features(source, shard, task, _model(model, device), torch.device(device))


@ray.remote
def _map(refs: "Sequence[ray.ObjectRef[Any]]", shard: FeatureShard) -> Any:
    function, stage, threads = _shared(refs[0])
    _begin(stage, threads)
    return function(shard)


@ray.remote
def _select(refs: "Sequence[ray.ObjectRef[Any]]", shard: FeatureShard, report: ShardReport) -> tuple[FeatureShard, ShardReport]:
    choose, stage, threads = _shared(refs[0])
    _begin(stage, threads)
    return take_rows(shard, report, choose(shard))


@ray.remote
def _merge(*parts: Any) -> Any:
    return merge_tree(parts)


class TaskRunner:
    """Runs one stage's tasks, ``workers`` at a time, with retries, progress and clear errors."""

    def __init__(self, config: UnlearnConfig) -> None:
        self.resources = config.resources
        self.threads = config.resources.cpus_per_worker
        self.device = "cuda" if config.resources.gpus_per_worker else "cpu"

    def options(self, name: str, *, gpu: bool = False, **more: Any) -> dict[str, Any]:
        """Ray options of a task of this run."""
        return {
            "name": name,
            "num_cpus": self.threads,
            "num_gpus": self.resources.gpus_per_worker if gpu else 0,
            "max_retries": self.resources.max_retries,
            "retry_exceptions": [OSError],
            # A plain task would inherit a Tune trial's placement group and could not be scheduled in it.
            "scheduling_strategy": "SPREAD",
            **more,
        }

    def tasks(self, function: Any, stage: str, count: int, **more: Any) -> Callable[[int], Any]:
        """The remote function for each of ``count`` tasks, named by stage and place: ``moments [1201-1300/10000]``."""
        step = max(1, -(-count // NAMES))
        places = [(first + 1, min(first + step, count)) for first in range(0, count, step)]
        names = [f"{stage} [{first if first == last else f'{first}-{last}'}/{count}]" for first, last in places]
        made = [function.options(**self.options(name, **more)) for name in names]
        return lambda index: made[index // step]

    def run(
        self,
        stage: str,
        submit: Callable[[int], "ray.ObjectRef[Any]"],
        count: int,
        on_done: Callable[[int, Any], int],
        *,
        fetch: bool = True,
    ) -> None:
        """Submit tasks ``0 .. count - 1``, at most ``workers`` in flight.

        ``on_done`` takes each result in order of completion and returns its samples. With ``fetch=False`` results stay where
        they were made and ``on_done`` gets None; a failure then shows in whoever fetches what depends on them.

        Raises:
            ImuError: what a task raised on purpose, as it was raised.
            StageFailedError: anything else that stopped a task.
        """
        pending: dict[ray.ObjectRef[Any], int] = {}
        submitted = 0
        with Progress(stage, count, "shards") as progress:
            try:
                while pending or submitted < count:
                    while submitted < count and len(pending) < self.resources.workers:
                        pending[submit(submitted)] = submitted
                        submitted += 1
                    ready, _ = ray.wait(list(pending), num_returns=1, fetch_local=fetch, timeout=LINE_SECONDS)
                    if not ready:
                        progress.advance(0, note="waiting for the tasks in flight, or for room to start them")
                    for ref in ready:
                        index = pending.pop(ref)
                        samples = on_done(index, ray.get(ref) if fetch else None)
                        progress.advance(samples=samples)
                        metrics.count("shards_done", 1, stage)
                        metrics.count("samples", samples, stage)
                        metrics.gauge("samples_per_second", progress.rate, stage)
                    metrics.flush(every=METRIC_SECONDS)
            except (RayError, torch.OutOfMemoryError) as error:
                raise _explain(stage, error) from None
            finally:
                metrics.flush()
                for ref in pending:
                    ray.cancel(ref, force=True)
                _trim()


def _trim() -> None:
    """Give freed memory back: Ray's threads leave some in every arena of glibc, so that a driver of many shards would seem to grow."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _explain(stage: str, error: BaseException) -> ImuError:
    """The error to show for a failed task."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ImuError):
        return cause
    if isinstance(cause, OutOfMemoryError | torch.OutOfMemoryError | MemoryError):
        return StageFailedError(f"{stage} ran out of memory: {cause}; use a smaller influence.block_rows or fewer workers per node")
    return StageFailedError(f"{stage} failed: {type(cause).__name__}: {cause}; see the worker's log above for the trace")


def _ids(shard: FeatureShard) -> list[str]:
    return shard.ids


class FeatureSet:
    """Handle on the features of one sample set: references in the driver, arrays in the object store."""

    def __init__(self, runner: TaskRunner, refs: "list[ray.ObjectRef[FeatureShard]]", reports: list[ShardReport]) -> None:
        self.runner, self.refs, self.reports = runner, refs, reports

    @property
    def rows(self) -> int:
        """Samples with features."""
        return sum(report.rows for report in self.reports)

    def ids(self) -> list[str]:
        """Sample ids, in order."""
        return [sample_id for ids in self.map("ids", _ids) for sample_id in ids]

    def under(self, config: UnlearnConfig) -> "FeatureSet":
        """The same features, worked on with the resources of ``config``."""
        return FeatureSet(TaskRunner(config), self.refs, self.reports)

    def select(self, choose: Callable[[FeatureShard], npt.NDArray[np.bool_]]) -> "FeatureSet":
        """The features of the samples that ``choose`` marks in each shard."""
        refs: list[Any] = [None] * len(self.refs)
        reports: list[Any] = [None] * len(self.refs)
        tasks = self.runner.tasks(_select, "selection", len(self.refs), num_returns=2)
        shared = [ray.put((choose, "selection", self.runner.threads))]

        def submit(index: int) -> "ray.ObjectRef[ShardReport]":
            refs[index], report = tasks(index).remote(shared, self.refs[index], self.reports[index])
            return report

        def done(index: int, report: ShardReport) -> int:
            reports[index] = report
            return report.rows

        self.runner.run("selection", submit, len(self.refs), done)
        kept = [index for index, report in enumerate(reports) if report.rows]
        return FeatureSet(self.runner, [refs[index] for index in kept], [reports[index] for index in kept])

    def map(self, stage: str, function: Callable[[FeatureShard], R], join: Callable[[list[R]], R] | None = None) -> list[R]:
        """``function`` of every shard, in shard order; with ``join``, a result for every ``JOINED`` neighbours."""
        runs: list[list[Any]] = [[None] * min(JOINED, len(self.refs) - i) for i in range(0, len(self.refs), JOINED)]
        missing = [len(run) for run in runs]

        def done(index: int, result: R) -> int:
            run, place = divmod(index, JOINED)
            runs[run][place] = result
            missing[run] -= 1
            if join is not None and not missing[run]:
                runs[run] = [join(runs[run])]
            return self.reports[index].rows

        self.runner.run(stage, self._submitter(stage, function), len(self.refs), done)
        return [result for run in runs for result in run]

    def _submitter(self, stage: str, function: Callable[[FeatureShard], R]) -> Callable[[int], "ray.ObjectRef[R]"]:
        """What submits the task of each shard."""
        tasks = self.runner.tasks(_map, stage, len(self.refs))
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
            raise _explain(stage, error) from None


def extract(source: ForgetSet, task: Task, model: nn.Module, config: UnlearnConfig, stage: str) -> FeatureSet:
    """One forward pass over ``source``; the features stay in the object store."""
    runner = TaskRunner(config)
    shards = source.shards(config.influence.block_rows, config.influence.blocks_per_shard)
    tasks = runner.tasks(_extract, stage, len(shards), gpu=True, num_returns=2)
    shared = [ray.put((source, task, ray.put(model), stage, runner.threads, runner.device))]
    refs: list[Any] = [None] * len(shards)
    reports: list[Any] = [None] * len(shards)

    def submit(index: int) -> "ray.ObjectRef[ShardReport]":
        refs[index], report = tasks(index).remote(shared, shards[index])
        return report

    def done(index: int, report: ShardReport) -> int:
        reports[index] = report
        return report.rows

    runner.run(stage, submit, len(shards), done)
    return FeatureSet(runner, refs, reports)


def score(features: FeatureSet, head: Head, config: UnlearnConfig, fitted_on: FeatureSet | None = None) -> tuple[pa.Table, dict[str, Any]]:
    """Influence of every sample and what stands behind it.

    Args:
        features: of the forget set.
        head: the head that is scored.
        config: ``influence.*``.
        fitted_on: features that the curvature is fitted on; None: those of the forget set.

    Returns:
        ``SCORE_SCHEMA`` and ``outlier`` (gradient norm as a multiple of its ``influence.clip_quantile``), in the order of the
        source; and ``describe_direction`` with what the curvature tells.
    """
    settings = config.influence
    direction, figures = fit_direction(
        settings,
        functools.partial(features.reduce, "moments", head),
        None if fitted_on is None else functools.partial(fitted_on.reduce, "curvature", head),
        lambda: np.concatenate(features.map("gradient norms", functools.partial(norms_of, head=head))),
    )
    table = pa.concat_tables(features.map("scores", functools.partial(score_shard, head=head, direction_CD=direction), _join_tables))
    norm = table["gradient_norm"].to_numpy()
    limit = float(np.quantile(norm, settings.clip_quantile))
    outlier = norm / limit if limit else np.zeros_like(norm)
    return table.append_column("outlier", pa.array(outlier)), figures


def _join_tables(tables: list[pa.Table]) -> pa.Table:
    """One table with memory of its own, for many that each hold the message they came in."""
    # A table of one chunk would be handed back as it is.
    return pa.concat_tables([*tables, tables[0].slice(0, 0)]).combine_chunks()
