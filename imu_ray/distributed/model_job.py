"""Many models on Ray: a task for each, tried again when it fails, and reported when it fails for good."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from imu_ray.config import ResourcesConfig
from imu_ray.distributed import sharing
from imu_ray.distributed.tasks import Stage, StageRef, explain_failure
from imu_ray.errors import ConfigError
from imu_ray.progress import LINE_SECONDS, Progress


@ray.remote
def _make(stage: StageRef, model: Any) -> None:
    stage.begin()(model)


def make_models(
    stage: str, work: Callable[[Any], None], models: Sequence[Any], resources: ResourcesConfig
) -> Mapping[Any, str]:
    """Run ``work`` for every model, as many at a time as there are workers.

    A task may use Ray itself: while it waits its CPU is free.

    Args:
        stage: name of the stage, for the progress bar.
        work: makes a model and leaves it on storage. It is run again from the start after a failure.
        models: what tells them apart; hashable.
        resources: ``resources.*``; a model is tried ``max_retries`` times more.

    Returns:
        Of the models that failed each time, the reason.
    """
    made = Stage(stage, resources.cpus_per_worker, work)
    shared = StageRef(sharing.share(made, "ensemble.train_fn", ConfigError))
    waiting, pending = list(models), dict[Any, Any]()
    task = _make.options(
        name=stage,
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        max_retries=resources.max_retries,
        retry_exceptions=True,
        scheduling_strategy="SPREAD",
    )
    failed: dict[Any, str] = {}
    with Progress(stage, len(models), "models") as progress:
        while waiting or pending:
            while waiting and len(pending) < resources.tasks:
                model = waiting.pop(0)
                pending[task.remote(shared, model)] = model
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=LINE_SECONDS)
            if not ready:
                progress.advance(0, note="waiting for the models in training")
            for ref in ready:
                model = pending.pop(ref)
                try:
                    ray.get(ref)
                except RayError as error:
                    failed[model] = str(explain_failure(f"{stage} {model}", error))
                progress.advance(note=f"{len(failed)} failed" if failed else "")
    return failed
