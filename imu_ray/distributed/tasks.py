"""Running the tasks of one stage: so many at a time, with retries, progress, figures and clear errors."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from imu_ray.config import UnlearnConfig
from imu_ray.distributed import metrics
from imu_ray.errors import ImuError, StageFailedError
from imu_ray.progress import LINE_SECONDS, Progress

METRIC_SECONDS = 1.0  # between records, each of which the process holds until it is exported
NAMES = 16  # different names of tasks in a stage, because Ray keeps figures for every name: 60 kB in the driver


@dataclass(frozen=True)
class Stage:
    """What all tasks of a stage share: its name, their threads, and what they work with."""

    name: str
    threads: int
    work: Any


@functools.lru_cache(maxsize=4)
def fetch_stage(ref: "ray.ObjectRef[Stage]") -> Stage:
    """A stage, fetched once per worker process."""
    return ray.get(ref)


@dataclass(frozen=True)
class StageRef:
    """A stage in the object store. As an argument of its own the bare reference would be fetched for every task."""

    ref: "ray.ObjectRef[Stage]"

    def work(self) -> Any:
        """What the tasks of the stage work with."""
        return fetch_stage(self.ref).work

    def begin(self) -> Any:
        """Begin a task: fix what its bits depend on, count a second attempt, and give what it works with."""
        stage = fetch_stage(self.ref)
        # Ray has no public name for the number of the attempt.
        if ray._private.worker.global_worker.core_worker.get_current_task_attempt_number() > 0:
            metrics.count("shards_retried", 1, stage.name)
            metrics.flush()
        torch.set_num_threads(stage.threads)
        torch.backends.cudnn.allow_tf32 = False  # float32 features are float32, on a GPU as on the CPU
        return stage.work


class TaskRunner:
    """Runs one stage's tasks, ``workers`` at a time, with retries, progress and clear errors."""

    def __init__(self, config: UnlearnConfig) -> None:
        self.resources = config.resources
        self.threads = config.resources.cpus_per_worker
        self.device = "cuda" if config.resources.gpus_per_worker else "cpu"
        self.recompute = config.influence.features == "recompute"
        self.deep = config.ascent.deep  # what is made of features takes a forward pass

    def options(self, name: str, *, gpu: bool = False, **more: Any) -> dict[str, Any]:
        """Ray options of a task of this run."""
        return {
            "name": name,
            "num_cpus": self.threads,
            "num_gpus": self.resources.gpus_per_worker if gpu else 0,
            "max_retries": self.resources.max_retries,
            "retry_exceptions": [OSError],
            # A forward pass runs wherever there is room, all else where its features lie. Without a strategy a task
            # would inherit a Tune trial's placement group and could not be scheduled in it.
            "scheduling_strategy": "SPREAD" if gpu else "DEFAULT",
            **more,
        }

    def tasks(self, function: Any, stage: str, count: int, **more: Any) -> Callable[[int], Any]:
        """The remote function for each of ``count`` tasks, named by stage and place: ``moments [1251-1875/10000]``."""
        step = max(1, -(-count // NAMES))
        places = [(first + 1, min(first + step, count)) for first in range(0, count, step)]
        names = [f"{stage} [{first if first == last else f'{first}-{last}'}/{count}]" for first, last in places]
        made = [function.options(**self.options(name, **more)) for name in names]
        return lambda index: made[index // step]

    def share(self, stage: str, work: Any) -> StageRef:
        """Put what all tasks of a stage share into the object store."""
        return StageRef(ray.put(Stage(stage, self.threads, work)))

    def run(
        self,
        stage: str,
        submit: Callable[[int], "ray.ObjectRef[Any]"],
        count: int,
        samples_of: Callable[[int, Any], int],
        *,
        fetch: bool = True,
    ) -> Iterator[Any]:
        """Submit tasks ``0 .. count - 1``, at most ``workers`` in flight, and yield their results in this order.

        ``samples_of`` tells the samples of a task from its place and result. With ``fetch=False`` results stay where
        they were made and references are yielded; a failure then shows in whoever fetches what depends on them.

        Raises:
            ImuError: what a task raised on purpose, as it was raised.
            StageFailedError: anything else that stopped a task.
        """
        pending: dict[ray.ObjectRef[Any], int] = {}
        early: dict[int, Any] = {}
        submitted = turn = 0
        with Progress(stage, count, "shards") as progress:
            try:
                while pending or submitted < count:
                    while submitted < count and len(pending) < self.resources.tasks:
                        pending[submit(submitted)] = submitted
                        submitted += 1
                    ready, _ = ray.wait(list(pending), num_returns=1, fetch_local=fetch, timeout=LINE_SECONDS)
                    if not ready:
                        progress.advance(0, note="waiting for the tasks in flight, or for room to start them")
                    for ref in ready:
                        index = pending.pop(ref)
                        early[index] = ray.get(ref) if fetch else ref
                        samples = samples_of(index, early[index])
                        progress.advance(samples=samples)
                        metrics.count("shards_done", 1, stage)
                        metrics.count("samples", samples, stage)
                        metrics.gauge("samples_per_second", progress.rate, stage)
                    metrics.flush(every=METRIC_SECONDS)
                    while turn in early:
                        yield early.pop(turn)
                        turn += 1
            except (RayError, torch.OutOfMemoryError) as error:
                raise explain_failure(stage, error) from None
            finally:
                # After a failure the tasks in flight end by themselves, a shard each: to cancel one while it is being
                # handed to its worker makes Ray abort this process ("Tried to complete task that was not pending").
                metrics.flush()


def explain_failure(stage: str, error: BaseException) -> ImuError:
    """The error to show for a failed task."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ImuError):
        return cause
    if isinstance(cause, OutOfMemoryError | torch.OutOfMemoryError | MemoryError):
        return StageFailedError(
            f"{stage} ran out of memory: {cause}; use a smaller influence.block_rows or fewer workers per node"
        )
    return StageFailedError(
        f"{stage} failed: {type(cause).__name__}: {cause}; see the worker's log above for the trace"
    )
