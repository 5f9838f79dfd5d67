"""When the ascent ends: targets worked out from the data, and what a check of the trajectory means."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from imu_ray.config import StopConfig

logger = logging.getLogger("imu_ray")
WHOLE_CLASS_ACCURACY = 0.01  # the paper's notion of a forgotten class
CHANCE = 1e-3


@dataclass(frozen=True)
class StopTarget:
    """Stop when ``metric`` of a check is at or below ``threshold``."""

    metric: str
    threshold: float
    reason: str

    def reached(self, record: Mapping[str, float]) -> bool:
        """Whether a trajectory record is at the target."""
        return record[self.metric] <= self.threshold


def looks_like_whole_classes(label_counts: Mapping[int, int], num_classes: int) -> bool:
    """Whether a forget set is whole classes rather than a random draw.

    True when a random draw of as many rows from equally frequent classes would leave out as many classes as this one does
    with a probability below 1e-3 (union bound). Equally frequent classes are an assumption; the manifest records the verdict.
    """
    rows, present = sum(label_counts.values()), len(label_counts)
    if present == num_classes:
        return False
    log_bound = math.log(math.comb(num_classes, present)) + rows * math.log(present / num_classes)
    return log_bound < math.log(CHANCE)


def forget_accuracy_target(
    config: StopConfig, label_counts: Mapping[int, int], num_classes: int, unseen_accuracy: float | None
) -> StopTarget | None:
    """The target on the forget set's accuracy, or None when there is none.

    Args:
        config: ``forget_accuracy`` as a number, ``auto`` or null.
        label_counts: rows of the forget set per class.
        num_classes: classes of the model.
        unseen_accuracy: accuracy of the original model on ``evaluation["test"]``, if given.
    """
    wanted = config.forget_accuracy
    if wanted is None:
        return None
    if wanted != "auto":
        return StopTarget("forget_accuracy", float(wanted), "ascent.stop.forget_accuracy")
    if looks_like_whole_classes(label_counts, num_classes):
        return StopTarget("forget_accuracy", WHOLE_CLASS_ACCURACY, "auto: the forget set is whole classes")
    if unseen_accuracy is not None:
        return StopTarget("forget_accuracy", unseen_accuracy, "auto: accuracy of the original model on evaluation['test']")
    logger.warning(
        "ascent.stop.forget_accuracy is auto, but the forget set is not whole classes and there is no evaluation['test'], so all "
        "epochs are run; give an evaluation set or a number, because ascent without a stop rule ruins the model"
    )
    return None
