"""The curvature that steers an update, on Ray: sums over shards, and of several layers a task for each that solves."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from imu_ray.config import AscentConfig
from imu_ray.distributed.feature_job import FeatureSet, FeatureSpec
from imu_ray.distributed.score_job import shard_statistics
from imu_ray.distributed.tasks import StageRef, TaskRunner, explain_failure
from imu_ray.errors import ConfigError
from imu_ray.influence.curvature import LAYER_CURVATURES, PRECONDITIONERS
from imu_ray.influence.curvature.base import FittedCurvature, merge_tree
from imu_ray.influence.gradients import LayerIO
from imu_ray.scopes.base import ByLayer, Part
from imu_ray.scopes.features import FeatureShard

ROUNDS = 4  # runs of shards for each worker: every run leaves sums of all layers


def kinds_of(part: Part, settings: AscentConfig) -> dict[str, str]:
    """The kind of curvature of each layer.

    ``ConfigError`` when one takes more than ``ascent.preconditioner_memory``.
    """
    if part.deep:
        return {name: kind_of(name, part, settings) for name in part.parameters}
    kind = PRECONDITIONERS[settings.curvature]
    for matrix in part.parameters.values():
        check_memory(settings.curvature, kind.memory(*matrix.shape), settings)
    return dict.fromkeys(part.parameters, settings.curvature)


def fit(sets: Sequence[FeatureSet], part: Part, settings: AscentConfig) -> dict[str, FittedCurvature]:
    """The damped inverse curvature of each layer, summed over some sample sets.

    Raises:
        ConfigError: it takes more memory than ``ascent.preconditioner_memory``.
    """
    kinds = kinds_of(part, settings)
    if not part.deep:
        return _fit_head(sets, part, settings)
    function = functools.partial(_layer_sums, part=part, kinds=kinds)
    sums = [split_sums(made, "curvature", function, list(kinds)) for made in sets]
    refs = {name: [each[name] for each in sums] for name in kinds}
    return solve_all(refs, kinds, settings, sets[0].runner)


def split_sums(
    features: FeatureSet, stage: str, function: Callable[[FeatureShard], ByLayer[Any]], names: Sequence[str]
) -> "dict[str, list[ray.ObjectRef[Any]]]":
    """References to the sums of each layer over runs of shards, in order.

    No process but the one that made them holds all.

    A run is of 2^k shards, so that the tree of merged blocks does not depend on its length.
    """
    runner, count, length = features.runner, len(features.refs), 1
    while length * ROUNDS * runner.resources.tasks < count:
        length *= 2
    runs = [slice(start, start + length) for start in range(0, count, length)]
    tasks = runner.tasks(_sum, stage, len(runs), gpu=True, num_returns=len(names))
    shared, made = runner.share(stage, (function, tuple(names))), {}

    def submit(index: int) -> "ray.ObjectRef[Any]":
        found = tasks(index).remote(shared, features.refs[runs[index]])
        made[index] = [found] if len(names) == 1 else found
        return made[index][0]

    def rows_of(index: int, _: Any) -> int:
        return sum(report.rows for report in features.reports[runs[index]])

    list(runner.run(stage, submit, len(runs), rows_of, fetch=False))
    return {name: [made[index][place] for index in range(len(runs))] for place, name in enumerate(names)}


def _fit_head(sets: Sequence[FeatureSet], part: Part, settings: AscentConfig) -> dict[str, FittedCurvature]:
    kind = PRECONDITIONERS[settings.curvature]
    (name,) = part.parameters

    def reduce(statistics: Callable[[LayerIO], Any]) -> Any:
        function = functools.partial(shard_statistics, part=part, statistics={name: statistics})
        parts = (made.reduce("preconditioner", function).parts[name] for made in sets)
        return functools.reduce(lambda some, other: some.merge(other), parts)

    return {name: kind.fit(reduce, settings.preconditioner_damping)}


def kind_of(name: str, part: Part, settings: AscentConfig) -> str:
    """Kronecker factors; of the head the Gauss-Newton matrix without coupling between classes where there is room."""
    shape, budget = part.parameters[name].shape, settings.preconditioner_memory * 2**30
    if name == part.task.head and LAYER_CURVATURES["block_ggn"].memory(*shape) <= budget:
        return "block_ggn"
    check_memory(f"kfac of {name}", LAYER_CURVATURES["kfac"].memory(*shape), settings)
    return "kfac"


def check_memory(what: str, needed: int, settings: AscentConfig) -> None:
    """``ConfigError`` when a curvature takes more than ``ascent.preconditioner_memory``."""
    if needed > settings.preconditioner_memory * 2**30:
        raise ConfigError(
            f"ascent.preconditioner {what} takes {needed / 2**30:.1f} GiB in one process; expected at most "
            f"{settings.preconditioner_memory:g} GiB, ascent.preconditioner_memory; raise the budget, choose a smaller "
            "ascent.scope, or another curvature"
        )


def _layer_sums(shard: FeatureShard, part: Part, kinds: Mapping[str, str]) -> ByLayer[Any]:
    """Sums of one kind for each layer."""
    return part.statistics(shard, {name: LAYER_CURVATURES[kind].statistics for name, kind in kinds.items()})


def solve_all(
    refs: "Mapping[str, list[list[ray.ObjectRef[Any]]]]",
    kinds: Mapping[str, str],
    settings: AscentConfig,
    runner: TaskRunner,
) -> dict[str, FittedCurvature]:
    """The damped inverse of each layer, from the references to its sums over each set."""
    solved = {}
    for name, kind in kinds.items():
        solve = functools.partial(LAYER_CURVATURES[kind].solve, damping=settings.preconditioner_damping)
        task = _solve.options(**runner.options(f"curvature of {name}"))
        solved[name] = task.remote(runner.share("curvature", solve), refs[name])
    try:
        return dict(zip(solved, ray.get(list(solved.values())), strict=True))
    except RayError as error:
        raise explain_failure("curvature", error) from None


@ray.remote
def _sum(stage: StageRef, shards: "list[ray.ObjectRef[FeatureShard] | FeatureSpec]") -> Any:
    """Sums over a run of shards, one result for each name."""
    function, names = stage.begin()
    made = (each.make()[0] if isinstance(each, FeatureSpec) else ray.get(each) for each in shards)
    sums = merge_tree(function(shard) for shard in made).cpu().parts
    # Of shards without rows there are none.
    found = tuple(ByLayer({name: sums[name]} if name in sums else {}) for name in names)
    return found if len(found) > 1 else found[0]


@ray.remote
def _solve(stage: StageRef, sums: "list[list[ray.ObjectRef[Any]]]") -> FittedCurvature:
    solve = stage.begin()
    # A tree for each set, because how many runs a set has depends on the number of workers.
    sets = [merge_tree(ray.get(each) for each in runs) for runs in sums]
    (total,) = merge_tree(sets).parts.values()
    return solve(total)
