"""An update on Ray Train: data-parallel over features; in this process when one worker is asked for."""

import contextlib
import itertools
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer

from imu_ray.config import ResourcesConfig
from imu_ray.distributed import metrics
from imu_ray.distributed.feature_job import FeatureSet, fetch
from imu_ray.distributed.task_scope import TaskScope
from imu_ray.errors import ImuError, StageFailedError
from imu_ray.events import event
from imu_ray.run.directory import RunDirectory
from imu_ray.scopes.base import Parameters, Part, Record, Scope
from imu_ray.scopes.features import FeatureShard, FeatureStore
from imu_ray.scopes.layers import Layers
from imu_ray.scopes.workers import Workers
from imu_ray.updates import UPDATES
from imu_ray.updates.base import UpdateOutcome, UpdateProblem


@dataclass(frozen=True)
class Trial:
    """How a trial's checks reach Ray Tune: ``report`` from this process, ``callbacks`` from a worker group."""

    report: Callable[[Record], None]
    callbacks: list[Any]


@dataclass(frozen=True)
class Job:
    """What travels to every worker; the features stay in the object store until a worker reads them."""

    problem: UpdateProblem
    part: Part
    sets: Mapping[str, list[Any]]
    run_dir: str
    threads: int
    report: Callable[[Record], None]


def _ignore(record: Record) -> None:
    """Nobody waits for the checks."""


def update(
    problem: UpdateProblem,
    part: Part,
    features: Mapping[str, FeatureSet],
    resources: ResourcesConfig,
    run: RunDirectory,
    trial: Trial | None = None,
) -> UpdateOutcome:
    """Run the update on ``resources.ascent_workers`` workers.

    State is saved in ``run`` after every check and taken up from there.

    Args:
        problem: what is to be done.
        part: the layers that move.
        features: of the forget set and of the sets that are measured.
        resources: workers and what each has.
        run: where state is kept; a shared path when workers run on several machines.
        trial: how the checks are told to Ray Tune when this is a trial of a sweep.

    Raises:
        StageFailedError: the worker group failed more often than ``resources.max_retries``.
    """
    workers = resources.ascent_workers
    layers = part if isinstance(part, Layers) and problem.config.update == "one_step" else None
    here = layers is not None or (workers == 1 and not resources.gpus_per_worker)
    report = _ignore if trial is None else trial.report if here else train.report
    sets = {name: made.refs for name, made in features.items()}
    job = Job(problem, part, sets, str(run.location), resources.cpus_per_worker, report)
    if here:
        return _run(job, Workers(), None if layers is None else TaskScope(layers, features))
    failures = 0
    while True:
        try:
            return _fit(job, resources, run, trial)
        except train.TrainingFailedError as error:
            cause, failures = _cause(error), failures + 1
            if isinstance(cause, ImuError) or failures > resources.max_retries:
                raise _explain(cause) from None
            event("ascent workers lost", level=logging.WARNING, reason=_first_line(cause))
        # A node that was lost may have held features. They are made again now, because workers that wait for them would
        # hold the CPUs that this takes.
        for made in features.values():
            if not made.runner.recompute:
                made.map("features", _rows)


def _rows(shard: FeatureShard) -> int:
    return len(shard.ids)


def _fit(job: Job, resources: ResourcesConfig, run: RunDirectory, trial: Trial | None) -> UpdateOutcome:
    """One group of workers, from where the saved state stops."""
    # A name of its own each time: under a known name, Train would go on with a stale run.
    name, storage = f"update-{uuid.uuid4().hex[:8]}", f"{run.storage.root}/state/train"
    per_worker = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    trainer = TorchTrainer(
        _run_as_worker,
        train_loop_config={"job": job},
        # nccl refuses two workers on one GPU.
        torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker >= 1 else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=resources.ascent_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker={key: value for key, value in per_worker.items() if value},
        ),
        run_config=train.RunConfig(
            name=name,
            storage_path=storage,
            storage_filesystem=run.storage.filesystem,
            callbacks=trial.callbacks if trial else [],
        ),
    )
    outcome: UpdateOutcome = trainer.fit().return_value
    return outcome


def _run_as_worker(arguments: Mapping[str, Any]) -> UpdateOutcome:
    context = train.get_context()
    device = torch.device("cuda") if torch.cuda.is_available() and ray.get_gpu_ids() else torch.device("cpu")
    return _run(arguments["job"], Workers(context.get_world_rank(), context.get_world_size(), device))


def _run(job: Job, workers: Workers, scope: Scope | None = None) -> UpdateOutcome:
    with _threads(job.threads):
        if scope is None:
            scope = job.part.scope({name: FeatureStore(fetch(refs)) for name, refs in job.sets.items()}, workers)
        run = RunDirectory(job.run_dir)
        resume = workers.agree(run.load_state() if workers.rank == 0 else None)
        run_update = UPDATES[job.problem.config.update]
        if workers.rank > 0:
            # Every worker reports, because Train waits for all of them.
            return run_update(scope, job.problem, resume=resume, checked=lambda record, _: job.report(record))

        numbers = itertools.count(1 if resume is None else len(resume.trajectory))

        def checked(record: Record, parameters: Parameters) -> None:
            for name in scope.metrics:
                metrics.gauge(f"forget_{name}", record[f"forget.{name}"], "ascent")
            metrics.flush(every=1.0)
            if job.problem.config.keep == "all":
                run.save_parameters(next(numbers), parameters)
            job.report(record)

        if resume is not None:
            event("ascent resumed", step=resume.step)
        return run_update(scope, job.problem, resume=resume, save=run.save_state, checked=checked)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cause(error: BaseException) -> BaseException:
    """The first failure of a group of workers."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [getattr(failure, "cause", failure) for failure in failures.values()] or [error]
    # When a worker ends, the sums of the others fail in gloo or nccl: that tells of the first failure, not of its
    # cause.
    return min(causes, key=lambda cause: (not isinstance(cause, ImuError), isinstance(cause, RuntimeError)))


def _first_line(cause: BaseException) -> str:
    return f"{type(cause).__name__}: {cause}".partition("\n")[0]


def _explain(cause: BaseException) -> ImuError:
    if isinstance(cause, ImuError):
        return cause
    return StageFailedError(
        f"ascent failed: {type(cause).__name__}: {cause}; the last good state is kept in the run directory; "
        "the same call takes it up from there"
    )
