"""When an update ends: targets worked out from the data, and what must not happen on the way."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from imu_ray.config import GuardConfig, StopConfig
from imu_ray.errors import ConfigError, nearest
from imu_ray.scopes.base import FORGET_VIEWS, FRESH_VIEWS
from imu_ray.scopes.measure import MEMBERSHIP
from imu_ray.tasks.base import Metric

WHOLE_CLASS_ACCURACY = 0.01  # the paper's notion of a forgotten class


@dataclass(frozen=True)
class StopTarget:
    """Stop when ``metric`` of a check has come down to ``threshold``, or has risen to it.

    ``tolerance`` is how far past the threshold a run may end, in the metric's unit.
    """

    metric: str
    threshold: float
    reason: str
    tolerance: float = 0.005
    rising: bool = False

    def overshoot(self, record: Mapping[str, float]) -> float:
        """How far a record is past the threshold; negative before it."""
        past = self.threshold - record[self.metric]
        return -past if self.rising else past

    def reached(self, record: Mapping[str, float]) -> bool:
        """Whether a record is at or past the threshold."""
        return self.overshoot(record) >= 0

    def describe(self, record: Mapping[str, float]) -> str:
        """Where a record stands, in words."""
        return f"{self.metric} is {record[self.metric]:.4f}; target {self.threshold:.4f} ({self.reason})"


def verdict(targets: Sequence[StopTarget], record: Mapping[str, float]) -> tuple[str, str]:
    """Status and reason after a check, or two empty strings when the update must continue."""
    for target in targets:
        if target.reached(record):
            if record["step"] == 0:
                return (
                    "already_met",
                    f"the original model meets the target and is left as it is: {target.describe(record)}",
                )
            if target.overshoot(record) > target.tolerance:
                return (
                    "not_reached",
                    f"the target was jumped over by more than ascent.stop.tolerance: {target.describe(record)}",
                )
            return "reached", target.describe(record)
    return "", ""


def guard_violation(record: Mapping[str, float], config: GuardConfig, metrics: Mapping[str, Metric]) -> str | None:
    """Why a check must not stand, or None."""
    loss, drift = record["forget.loss"], record["parameter_drift"]
    if not math.isfinite(loss + drift):
        return "the loss or the parameters are not finite"
    if loss > config.max_forget_loss:
        return f"forget.loss {loss:.1f} is above ascent.guard.max_forget_loss {config.max_forget_loss:g}"
    if config.max_parameter_drift is not None and drift > config.max_parameter_drift:
        return f"parameter drift {drift:.4f} is above ascent.guard.max_parameter_drift {config.max_parameter_drift:g}"
    for name, limit in config.limits.items():
        above = metrics[name.rpartition(".")[2]].rises
        if (record[name] > limit) if above else (record[name] < limit):
            return f"{name} {record[name]:.4f} is {'above' if above else 'below'} ascent.guard.limits {limit:g}"
    return None


def metric_of(name: str, metrics: Mapping[str, Metric], sets: Sequence[str], setting: str) -> Metric:
    """The metric behind ``<set>.<metric>``; ``ConfigError`` when there is no such set or metric."""
    set_name, _, metric = name.rpartition(".")
    if set_name in sets and metric in metrics:
        return metrics[metric]
    if set_name in FRESH_VIEWS:
        raise ConfigError(
            f"{setting} names {name!r}, which is measured in the audit alone: to aim at an audit is to fool it; "
            f"expected a metric of {' or '.join(sets)}"
        )
    valid = [f"{each}.{metric}" for each in sets for metric in metrics]
    raise ConfigError(f"{setting} names {name!r}; {nearest(name, [*valid, MEMBERSHIP])}")


def target_metric(name: str, metrics: Mapping[str, Metric]) -> Metric:
    """The metric behind a key of ``ascent.stop.targets``; ``ConfigError`` when there is none."""
    if name == MEMBERSHIP:
        return Metric(rises=False, least=0, most=1)
    return metric_of(name, metrics, ["forget", FORGET_VIEWS], "ascent.stop.targets")


@dataclass(frozen=True)
class Unseen:
    """What ``evaluation["test"]`` shows, as figures of the original model by metric, in all and ``per_class``.

    Also of views of it.
    """

    figures: Mapping[str, Any]
    label_counts: Mapping[int, int]
    views: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shares_labels(self) -> bool:
        """Whether it has samples of a label of the forget set."""
        return not self.figures["per_class"].keys().isdisjoint(map(str, self.label_counts))

    def expected(self, name: str) -> float:
        """Mean of ``<set>.<metric>`` over unseen samples or views of the same labels; of all where one is missing."""
        set_name, _, metric = name.rpartition(".")
        figures = self.views if set_name == FORGET_VIEWS else self.figures
        per_class, rows = figures["per_class"], sum(self.label_counts.values())
        if not rows:
            return float(figures[metric])
        means = ((per_class.get(str(label), figures)[metric], count) for label, count in self.label_counts.items())
        return float(sum(mean * count for mean, count in means) / rows)


def stop_targets(
    config: StopConfig, metrics: Mapping[str, Metric], rows: int, unseen: Unseen | None
) -> list[StopTarget]:
    """The targets that are named in ``ascent.stop.targets``; the first that is met ends the update.

    Args:
        config: the stop rules; ``targets`` is a mapping.
        metrics: metrics of the task.
        rows: samples of the forget set.
        unseen: what unseen samples show; None when there are none.

    Raises:
        ConfigError: a metric is not known, or a rule needs ``evaluation["test"]``, which was not given.
    """
    targets = []
    for name, value in config.targets.items():
        if value is None:
            continue
        if name == MEMBERSHIP:
            targets.append(_membership_target(value, unseen, config.tolerance))
            continue
        metric = target_metric(name, metrics)
        threshold, reason = value, f"ascent.stop.targets.{name}"
        if value == "auto":
            if unseen is None:
                raise ConfigError(
                    f"ascent.stop.targets.{name} is 'auto' without unseen samples; expected evaluation['test'], whose "
                    "samples show what such samples are like when they were never learnt; give it, or a number"
                )
            threshold = unseen.expected(name)
            reason = "auto: the mean over unseen samples" + (" of the same labels" if unseen.label_counts else "")
            if name.endswith(".bounded_loss") and metric.chance is not None:
                # Where all unseen samples are at the bound, only rounding would tell whether a mean has come to it.
                threshold = min(threshold, metric.chance - config.tolerance)
        # The mean of a counted metric moves in steps of one sample, so no run can be asked to end nearer than that.
        tolerance = max(config.tolerance, 1 / rows) if metric.counted else config.tolerance
        targets.append(StopTarget(name, float(threshold), reason, tolerance, metric.rises))
    return targets


def _membership_target(value: float | str, unseen: Unseen | None, tolerance: float) -> StopTarget:
    if unseen is None or not unseen.shares_labels:
        raise ConfigError(
            f"ascent.stop.targets.{MEMBERSHIP} is set without unseen samples of the forgotten labels; expected "
            "evaluation['test'] with some; give it"
        )
    return StopTarget(
        MEMBERSHIP, 0.5 if value == "auto" else float(value), f"ascent.stop.targets.{MEMBERSHIP}", tolerance
    )
