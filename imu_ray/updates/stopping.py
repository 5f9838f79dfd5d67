"""When the ascent ends: targets worked out from the data, and what must not happen on the way."""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from imu_ray.config import GuardConfig, StopConfig
from imu_ray.errors import ConfigError

logger = logging.getLogger("imu_ray")
WHOLE_CLASS_ACCURACY = 0.01  # the paper's notion of a forgotten class
CHANCE = 1e-3


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


def looks_like_whole_classes(label_counts: Mapping[int, int], num_classes: int, kept_labels: Collection[int] = ()) -> bool:
    """Whether a forget set is whole classes rather than a random draw.

    False when samples of these classes are kept, as far as the evaluation sets show (``kept_labels``).
    True when a random draw of as many rows from equally frequent classes would leave out as many classes as this one does
    with a probability below 1e-3 (union bound). Equally frequent classes are an assumption; the manifest records the verdict.
    """
    rows, present = sum(label_counts.values()), len(label_counts)
    if present == num_classes or not label_counts.keys().isdisjoint(kept_labels):
        return False
    log_bound = math.log(math.comb(num_classes, present)) + rows * math.log(present / num_classes)
    return log_bound < math.log(CHANCE)


def stop_targets(
    config: StopConfig,
    label_counts: Mapping[int, int],
    num_classes: int,
    unseen_accuracy: float | None,
    unseen_labels: Collection[int] = (),
    kept_labels: Collection[int] = (),
) -> list[StopTarget]:
    """The targets of a run; the first that is met ends it.

    Args:
        config: the stop rules.
        label_counts: rows of the forget set per class.
        num_classes: classes of the model.
        unseen_accuracy: accuracy of the original model on ``evaluation["test"]``, if given.
        unseen_labels: labels that occur there.
        kept_labels: labels that occur in evaluation sets other than ``"test"``.

    Raises:
        ConfigError: a rule needs ``evaluation["test"]``, which was not given.
    """
    targets = []
    # An accuracy moves in steps of one sample, so no run can be asked to end nearer than that.
    nearest = max(config.tolerance, 1 / sum(label_counts.values()))
    if config.forget_accuracy == "auto":
        whole = looks_like_whole_classes(label_counts, num_classes, kept_labels)
        targets += _automatic_target(label_counts, whole, unseen_accuracy, nearest)
    elif config.forget_accuracy is not None:
        targets.append(StopTarget("forget_accuracy", config.forget_accuracy, "ascent.stop.forget_accuracy", nearest))
    if config.forget_loss is not None:
        automatic = config.forget_loss == "auto"
        threshold = math.log(num_classes) if config.forget_loss == "auto" else config.forget_loss
        reason = "auto: loss of a uniform guess" if automatic else "ascent.stop.forget_loss"
        targets.append(StopTarget("forget_loss", threshold, reason, config.tolerance, rising=True))
    if config.membership:
        if unseen_accuracy is None or label_counts.keys().isdisjoint(unseen_labels):
            raise ConfigError(
                "ascent.stop.membership is true without unseen samples of the forgotten classes; expected evaluation['test'] with some; give it"
            )
        targets.append(StopTarget("membership_auc", 0.5, "ascent.stop.membership", config.tolerance))
    return targets


def _automatic_target(label_counts: Mapping[int, int], whole: bool, unseen_accuracy: float | None, tolerance: float) -> list[StopTarget]:
    if whole:
        logger.warning(
            "ascent.stop.forget_accuracy is auto: the %d forget samples look like all of class %s, which will be forgotten whole; if "
            "other samples of it are kept, set ascent.stop.forget_accuracy to a number",
            sum(label_counts.values()),
            ", ".join(str(label) for label in label_counts),
        )
        return [StopTarget("forget_accuracy", WHOLE_CLASS_ACCURACY, "auto: the forget set is whole classes", tolerance)]
    if unseen_accuracy is not None:
        reason = "auto: accuracy of the original model on evaluation['test']"
        return [StopTarget("forget_accuracy", unseen_accuracy, reason, tolerance)]
    logger.warning(
        "ascent.stop.forget_accuracy is auto, but the forget set is not whole classes and there is no evaluation['test'], so all "
        "epochs are run; give an evaluation set or a number, because ascent without a stop rule ruins the model"
    )
    return []


def recipe_warning(recipe: str, label_counts: Mapping[int, int], num_classes: int) -> str | None:
    """What to tell a user whose forget set contradicts the recipe, or None."""
    whole = looks_like_whole_classes(label_counts, num_classes) or (len(label_counts) == 1 and recipe == "samples")
    found = f"a forget set with samples of {len(label_counts)} of {num_classes} classes, which looks like"
    if recipe == "samples" and whole:
        return f"recipe 'samples' on {found} whole classes; recipe 'classes' is made for those"
    if recipe == "classes" and not whole:
        return f"recipe 'classes' on {found} a random draw; recipe 'samples' is made for those"
    return None


def guard_violation(record: Mapping[str, float], config: GuardConfig) -> str | None:
    """Why a check must not stand, or None."""
    loss, drift = record["forget_loss"], record["parameter_drift"]
    if not math.isfinite(loss + drift):
        return "the loss or the head is not finite"
    if loss > config.max_forget_loss:
        return f"forget loss {loss:.1f} is above ascent.guard.max_forget_loss {config.max_forget_loss:g}"
    if config.max_parameter_drift is not None and drift > config.max_parameter_drift:
        return f"parameter drift {drift:.4f} is above ascent.guard.max_parameter_drift {config.max_parameter_drift:g}"
    guarded = f"{config.evaluation_set}_accuracy"
    if config.min_accuracy is not None and record[guarded] < config.min_accuracy:
        return f"{guarded} {record[guarded]:.4f} is below ascent.guard.min_accuracy {config.min_accuracy:g}"
    return None
