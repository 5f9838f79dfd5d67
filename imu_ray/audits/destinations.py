"""Where the forgotten samples went: which classes they are taken for."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from imu_ray.audits.base import NO_CLASS, Predictions
from imu_ray.config import AuditConfig


class Destinations:
    r"""From class to class: how many forgotten samples of each class the model takes for which.

    .. math:: n_{yc} = |\{i \in \text{forget} : y_i = y,\ \hat y_i = c\}|

    Counts of true class y and predicted class c, at least 0; a class is listed where there is a sample. A model that
    was retrained takes them for what they look like, so that they scatter as its errors on unseen samples of the class
    do; all of a class in one other class is the sign of a shifted output, which tells what was forgotten.
    """

    def run(self, measured: Mapping[str, Predictions], config: AuditConfig, seed: int) -> dict[str, Any]:
        """``destinations``: by true class the count of each predicted class; nothing of a model without classes.

        ``skipped`` with the reason where samples are of no one class.
        """
        forget = measured["forget"]
        if forget.of_no_class:
            return {"destinations": {"skipped": NO_CLASS}}
        if "predicted" not in forget.signals:
            return {}
        pairs, counts = np.unique(np.stack([forget.labels, forget.signals["predicted"]]), axis=1, return_counts=True)
        found: dict[str, dict[str, int]] = {}
        for label, predicted, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
            found.setdefault(str(label), {})[str(predicted)] = count
        return {"destinations": found}
