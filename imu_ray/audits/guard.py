"""The utility guard: an audit of a model that answers nothing any more says so."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

NEAR_CHANCE = 0.15  # of the way from a guess to no mistake
MIN_ROWS = 20  # of fewer a share near chance says nothing
FAR_BELOW = 0.5  # of what another model has above a guess


def figures_warning(figures: Mapping[str, Any], others: Mapping[str, Mapping[str, Any] | None]) -> dict[str, str]:
    """``warning``, where a model has lost half or more of what another knows of unseen samples; else nothing.

    Args:
        figures: of the model, as ``metrics.json`` has them; ``test.accuracy`` is read, and the chance level is taken
            as one over the number of classes in ``test.per_class``, or as 0 where there are none.
        others: figures of other models by what they are called; None where they were not measured.
    """
    accuracy, classes = _accuracy(figures), len(figures.get("test", {}).get("per_class", ()))
    chance = 1 / classes if classes else 0.0
    if accuracy is None:
        return {}
    for name, each in others.items():
        reference = _accuracy(each or {})
        if reference is not None and accuracy - chance < FAR_BELOW * (reference - chance):
            return {
                "warning": f"test accuracy is {accuracy:.1%}, that of {name} {reference:.1%}: a broken model may pass"
            }
    return {}


def prediction_warning(labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], classes: int) -> dict[str, str]:
    """``warning``, where predictions of unseen samples are one class, or hardly better than a guess; else nothing.

    Args:
        labels: true classes of the samples, ``[N]``.
        predicted: what the model says, ``[N]``.
        classes: how many classes it knows.
    """
    if len(labels) < MIN_ROWS or classes < 2:
        return {}
    if len(np.unique(predicted)) == 1 and len(np.unique(labels)) > 1:
        return {
            "warning": f"every one of {len(labels)} unseen samples is called class {predicted[0]}: the model is broken"
        }
    accuracy, chance = float((labels == predicted).mean()), 1 / classes
    if accuracy < chance + NEAR_CHANCE * (1 - chance):
        guess = f"a guess has {chance:.1%}"
        return {"warning": f"accuracy on unseen samples is {accuracy:.1%}, {guess}: a broken model may pass this audit"}
    return {}


def _accuracy(figures: Mapping[str, Any]) -> float | None:
    found = figures.get("test", {}).get("accuracy")
    return None if found is None else float(found)
