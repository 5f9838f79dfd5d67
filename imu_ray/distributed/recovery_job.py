"""Recovery on Ray tasks: one for each model and test, all from the same draw of rows."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from torch import nn

from imu_ray.audits import recovery
from imu_ray.audits.recovery import Attack, Draw, Marked
from imu_ray.config import UnlearnConfig
from imu_ray.data import Source
from imu_ray.distributed import sharing
from imu_ray.distributed.feature_job import FeatureSet
from imu_ray.distributed.tasks import Stage, StageRef
from imu_ray.errors import UnsupportedModelError
from imu_ray.events import event
from imu_ray.scopes.base import Part
from imu_ray.scopes.features import Positions

PROBE, STAGE = "probe", "recovery"


@dataclass(frozen=True)
class Side:
    """A model that is attacked: its features of every sample set, the part that makes outputs of them, and itself."""

    features: Mapping[str, FeatureSet]
    part: Part
    model: nn.Module


@ray.remote
def _attack(stage: StageRef, test: str) -> dict[str, Any] | str:
    return attempt(stage.begin(), test)


@ray.remote
def _probe(stage: StageRef, *parts: Marked) -> dict[str, Any] | str:
    return attempt(stage.begin(), parts)


def attempt(attack: Callable[[Any], dict[str, Any] | str], given: Any) -> dict[str, Any] | str:
    """What an attack finds, or why it broke off: a model that has unlearned is written all the same."""
    try:
        return attack(given)
    except OSError:
        raise  # tried again
    except Exception as error:
        return f"it failed ({type(error).__name__}: {error})"


def recover(sides: Mapping[str, Side], sources: Mapping[str, Source], config: UnlearnConfig) -> dict[str, Any]:
    """What every test of ``audit.recovery`` finds of each model, by its name; in ``skipped`` why some are not there.

    ``sources`` are where the rows of the sets can be read again; features are no inputs.
    """
    first, tests = next(iter(sides.values())), config.audit.recovery
    if not sources:
        reason = "the trials of a sweep are not attacked; audit the run that you keep"
        return {name: {"skipped": dict.fromkeys(tests, reason)} for name in sides}
    labels, places = {}, {}
    for name, made in first.features.items():
        labels[name], places[name] = made.labels_and_places(name)
    drawn = recovery.draw(labels, config.audit.recovery_rows, config.seed)
    reasons = {test: recovery.unable(test, first.part.task, labels, drawn) for test in tests}
    results: dict[str, Any] = {name: {"skipped": {test: why for test, why in reasons.items() if why}} for name in sides}
    attacks = [(name, test) for name in sides for test in tests if not reasons[test]]
    for (name, test), found in zip(attacks, _run(attacks, sides, sources, drawn, places, config), strict=True):
        if isinstance(found, str):
            event("recovery not measured", model=name, test=test, reason=found)
            results[name]["skipped"][test] = found
        else:
            results[name][test] = found
    return results


def _run(
    attacks: Sequence[tuple[str, str]],
    sides: Mapping[str, Side],
    sources: Mapping[str, Source],
    drawn: Draw,
    places: Mapping[str, Positions],
    config: UnlearnConfig,
) -> list[dict[str, Any] | str]:
    """What each attack finds, by the names of its side and its test."""
    runner = next(iter(sides.values())).features["forget"].runner
    probe = runner.share(STAGE, recovery.probe)
    marked = {name: _marked(sides[name], drawn) for name, test in attacks if test == PROBE}

    def share(side: Side) -> StageRef:
        read = functools.partial(recovery.rows_of, places=places, sources=sources)
        work = Attack.of(side.part.apply(side.model), side.part.task, drawn, read, config, runner.device)
        stage = Stage(STAGE, runner.threads, work)
        return StageRef(sharing.share(stage, type(side.model).__name__, UnsupportedModelError))

    shared = {name: share(sides[name]) for name in sorted({name for name, test in attacks if test != PROBE})}
    probes, others = (runner.tasks(each, STAGE, len(attacks), gpu=each is _attack) for each in (_probe, _attack))

    def submit(index: int) -> "ray.ObjectRef[Any]":
        name, test = attacks[index]
        return probes(index).remote(probe, *marked[name]) if test == PROBE else others(index).remote(shared[name], test)

    return list(runner.run(STAGE, submit, len(attacks), lambda index, _: 0))


def _marked(side: Side, drawn: Draw) -> "list[ray.ObjectRef[Marked]]":
    """The samples of a probe, of the shards that hold any; they stay where they were made."""
    found: list[ray.ObjectRef[Marked]] = []
    for name in sorted({*drawn.shown, *drawn.held}):
        made = side.features[name]
        codes = np.split(
            recovery.codes_of(drawn, name, made.rows), np.cumsum([each.rows for each in made.reports])[:-1]
        )
        used = [shard for shard, each in enumerate(codes) if each.any()]
        if used:
            function = functools.partial(recovery.penultimate, part=side.part, name=name)
            column = np.concatenate([codes[shard] for shard in used])
            found += made.part(used).stream(f"probed rows of {name}", function, fetch=False, column=column)
    return found
