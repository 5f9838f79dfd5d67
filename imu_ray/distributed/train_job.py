"""The ascent on Ray Train: data-parallel over cached features; in-process when one CPU worker is asked for."""

import contextlib
import dataclasses
import math
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
from imu_ray.errors import ImuError, StageFailedError
from imu_ray.events import event
from imu_ray.run.directory import RunDirectory
from imu_ray.scopes.head import Head
from imu_ray.scopes.measure import Record
from imu_ray.updates.batches import FeatureStore
from imu_ray.updates.iterative import AscentOutcome, AscentProblem, run_ascent
from imu_ray.updates.workers import Workers


@dataclass(frozen=True)
class Trial:
    """How a trial's checks reach Ray Tune: ``report`` from this process, ``callbacks`` from a worker group."""

    report: Callable[[Record], None]
    callbacks: list[Any]


def _nothing(record: Record) -> None:
    """Nobody waits for the checks."""


def ascend(
    problem: AscentProblem,
    forget: FeatureSet,
    evaluation: Mapping[str, FeatureSet],
    resources: ResourcesConfig,
    run: RunDirectory,
    trial: Trial | None = None,
) -> AscentOutcome:
    """Ascend on ``resources.workers`` workers; state is saved in ``run`` after every check and taken up from there.

    Args:
        problem: with empty feature stores; each worker fills them from the object store.
        forget: features of the forget set.
        evaluation: features of the sets that are measured.
        resources: workers and what each has.
        run: where state is kept; a shared path when workers run on several machines.
        trial: how the checks are told to Ray Tune when this is a trial of a sweep.

    Raises:
        StageFailedError: the worker group failed more often than ``resources.max_retries``.
    """
    arguments: dict[str, Any] = {
        "problem": problem,
        "forget": forget.refs,
        "evaluation": {name: features.refs for name, features in evaluation.items()},
        "run_dir": str(run.location),
        "threads": resources.cpus_per_worker,
        "report": _nothing,
    }
    if resources.workers == 1 and not resources.gpus_per_worker:
        return _ascend_here({**arguments, "report": trial.report if trial else _nothing})
    # A name of its own each time: under a known name, Train would go on with a stale run.
    name, storage = f"ascent-{uuid.uuid4().hex[:8]}", f"{run.storage.root}/state/train"
    per_worker = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    trainer = TorchTrainer(
        _ascend_as_worker,
        train_loop_config={**arguments, "report": train.report if trial else _nothing},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker={key: value for key, value in per_worker.items() if value},
        ),
        run_config=train.RunConfig(
            name=name,
            storage_path=storage,
            storage_filesystem=run.storage.filesystem,
            callbacks=trial.callbacks if trial else [],
            failure_config=train.FailureConfig(max_failures=resources.max_retries),
        ),
    )
    try:
        outcome = trainer.fit().return_value
    except train.TrainingFailedError as error:
        raise _explain(error) from None
    return outcome


def _ascend_here(arguments: Mapping[str, Any]) -> AscentOutcome:
    with _threads(arguments["threads"]):
        return _run(arguments, Workers())


def _ascend_as_worker(arguments: Mapping[str, Any]) -> AscentOutcome:
    context = train.get_context()
    device = torch.device("cuda") if torch.cuda.is_available() and ray.get_gpu_ids() else torch.device("cpu")
    with _threads(arguments["threads"]):
        return _run(arguments, Workers(context.get_world_rank(), context.get_world_size(), device, ray.util.get_node_ip_address()))


def _run(arguments: Mapping[str, Any], workers: Workers) -> AscentOutcome:
    def store(refs: "list[ray.ObjectRef[Any]]") -> FeatureStore:
        return FeatureStore(fetch(refs))

    problem = dataclasses.replace(
        arguments["problem"],
        forget=store(arguments["forget"]),
        evaluation={name: store(refs) for name, refs in arguments["evaluation"].items()},
    )
    run = RunDirectory(arguments["run_dir"])
    resume = workers.agree(run.load_state() if workers.rank == 0 else None)
    report = arguments["report"]
    if workers.rank > 0:
        # Every worker reports, because Train waits for all of them.
        return run_ascent(problem, workers, resume=resume, checked=lambda record, _: report(record))

    def checked(record: Record, head: Head) -> None:
        metrics.gauge("forget_loss", record["forget_loss"], "ascent")
        metrics.gauge("forget_accuracy", record["forget_accuracy"], "ascent")
        metrics.flush(every=1.0)
        if problem.config.keep == "all":
            run.save_parameters(math.ceil(record["step"]), {head.name: head.matrix_CD})
        report(record)

    if resume is not None:
        event("ascent resumed", step=resume.step)
    return run_ascent(problem, workers, resume=resume, save=run.save_state, checked=checked)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _explain(error: BaseException) -> ImuError:
    failures = getattr(error, "worker_failures", None) or {}
    causes = [getattr(failure, "cause", failure) for failure in failures.values()] or [error]
    causes.sort(key=lambda cause: isinstance(cause, ConnectionError))  # which most often tells of another worker's failure
    for cause in causes:
        if isinstance(cause, ImuError):
            return cause
    return StageFailedError(
        f"ascent failed: {type(causes[0]).__name__}: {causes[0]}; the last good state is kept in the run directory; the same call "
        "goes on from there"
    )
