"""A second unlearning beside that of a run: of rows that were never trained on, to tell what the first one paid for."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from imu_ray.audits.control import as_far, draw_control, moved, paid
from imu_ray.config import UnlearnConfig
from imu_ray.data import PartSource, ViewSource
from imu_ray.distributed import audit_job, feature_job
from imu_ray.errors import EmptySelectionError, NonFiniteError
from imu_ray.events import event
from imu_ray.inputs import Inputs
from imu_ray.scopes.base import FORGET_VIEWS, TEST_VIEWS, Part
from imu_ray.scopes.features import FeatureShard, Positions, at_places
from imu_ray.updates.base import UpdateOutcome
from imu_ray.updates.stopping import StopTarget

STATE = "state/control"
# Of a run that leaves no more than what it cost; rows are chosen already.
SETTINGS: dict[str, Any] = {
    "forget_set.ids": None, "forget_set.where": None, "forget_set.size": None, "audit.retain_log": None,
    "audit.checks": False, "audit.generate": False, "audit.control": False, "audit.views": 0, "audit.samples": 0,
}  # fmt: skip
# What moves a part on other inputs to some targets.
Unlearn = Callable[[Inputs, UnlearnConfig, list[StopTarget]], UpdateOutcome]


def measure_control(
    inputs: Inputs,
    config: UnlearnConfig,
    recipe: str,
    outcome: UpdateOutcome,
    targets: list[StopTarget],
    written: Part,
    unlearn: Unlearn,
) -> dict[str, Any]:
    """What unlearning cost on other rows, beside the same push on rows of ``test`` that were never trained on.

    Args:
        inputs: of the run.
        config: of the run.
        recipe: that the run followed.
        outcome: of its update.
        targets: of its update.
        written: the part as it was written.
        unlearn: the same update of other rows.

    Returns:
        ``metric`` and ``target``; ``members`` and ``others``, each with ``rows``, the metric ``before`` and ``after``,
        and what was ``paid`` by set; or why it was ``skipped``.
    """
    known = moved(outcome, targets)
    if isinstance(known, str):
        return {"skipped": known}
    if (lacking := _lacking(inputs, config)) is not None:
        return {"skipped": lacking}
    labels, places = inputs.features["test"].labels_and_places("test")
    asked, _ = inputs.features["forget"].labels_and_places("forget")
    marks = draw_control(asked, labels, config.seed)
    if isinstance(marks, str):
        return {"skipped": marks}
    chosen = _inputs_of(inputs, config, marks, places)
    name, _, key = known.metric.rpartition(".")
    rows, kind, original = int(marks.sum()), inputs.task.metrics[key], inputs.part
    now = audit_job.figures({name: chosen.features[name]}, original)[name][key]
    target = as_far(known, now, kind, rows, config.ascent.stop.tolerance)
    if isinstance(target, str):
        return {"skipped": target}
    event("control begun", rows=rows, metric=known.metric, threshold=target.threshold)
    keep = "last" if config.ascent.keep == "all" else config.ascent.keep
    settings = config.with_overrides({**SETTINGS, "ascent.keep": keep}).model_copy(update={"recipe": recipe})
    try:
        found = unlearn(chosen, settings, [target])
    except (EmptySelectionError, NonFiniteError) as error:
        return {"skipped": f"rows never trained on cannot be unlearned: {error}"}
    if found.status != "reached":
        return {"skipped": f"the control ended {found.status}: {found.reason}"}
    kept = {name: made for name, made in chosen.of_rows.items() if name != "forget"}
    rounded = original.of_model(original.changed(found.parameters).apply(inputs.model))
    first, members, others = (audit_job.predict(kept, part) for part in (original, written, rounded))
    gone = np.unique(asked) if recipe == "classes" else None
    return {
        "metric": known.metric,
        "target": {"threshold": target.threshold, "reason": target.reason},
        "members": {
            "rows": len(asked),
            "before": known.before,
            "after": known.after,
            "paid": paid(first, members, len(asked), gone),
        },
        "others": {
            "rows": rows,
            "before": now,
            "after": found.record[known.metric],
            "paid": paid(first, others, rows, gone),
        },
    }


def _lacking(inputs: Inputs, config: UnlearnConfig) -> str | None:
    """Why there is no control, whatever the update did."""
    if "test" not in inputs.measured:
        return "no evaluation['test'] with unseen rows was given"
    if not inputs.sources:
        return "the trials of a sweep have no control; ask for it in the run that you keep"
    if config.influence.scores is not None:
        return "influence.scores are of the forget set alone"
    return None


def _elsewhere(shard: FeatureShard, places: Positions) -> npt.NDArray[np.bool_]:
    return ~at_places(shard, places)


def _inputs_of(inputs: Inputs, config: UnlearnConfig, marks: npt.NDArray[np.bool_], places: Positions) -> Inputs:
    """The marked rows of ``test`` in place of the forget set; the others stay as they are."""
    kept, drawn = inputs.measured, places[marks]
    features = {**kept, "forget": kept["test"].select(functools.partial(at_places, places=drawn))}
    for name in ("test", TEST_VIEWS):
        if name in kept:
            features[name] = kept[name].select(functools.partial(_elsewhere, places=drawn))
    if FORGET_VIEWS in kept:
        source = PartSource.at(inputs.sources["test"], drawn)
        views = ViewSource(source, config.ascent.views, config.ascent.view_transform, config.seed)
        model = feature_job.share(inputs.model)
        features[FORGET_VIEWS] = feature_job.extract(views, inputs.part, model, config, "features of the control")
    described: Mapping[str, Any] = {**inputs.described, "forget": inputs.described["test"]}
    return dataclasses.replace(inputs, sources={}, features=features, described=described)
