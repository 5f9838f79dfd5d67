"""Accuracy and loss of a sample set under a head, overall and per class."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imu_ray.influence.features import FeatureShard
from imu_ray.influence.scores import sample_losses
from imu_ray.models import Head


@dataclass(frozen=True)
class Predictions:
    """Labels, losses (nats) and correctness of some samples, ``[n]`` each."""

    labels: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]
    correct: npt.NDArray[np.bool_]

    @classmethod
    def concatenate(cls, parts: "list[Predictions]") -> "Predictions":
        """All of them, in order."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("labels", "losses", "correct")))

    def of_labels(self, labels: npt.NDArray[np.int64]) -> "Predictions":
        """The samples with one of some labels."""
        mask = np.isin(self.labels, labels)
        return Predictions(self.labels[mask], self.losses[mask], self.correct[mask])


def predict_shard(shard: FeatureShard, head: Head) -> Predictions:
    """Predictions for every sample of a shard."""
    losses, correct = [np.empty(0)], [np.empty(0, bool)]
    for features, labels in shard.blocks():
        logits = head.logits(features)
        losses.append(sample_losses(logits, labels).numpy())
        correct.append((logits.argmax(1) == labels).numpy())
    return Predictions(shard.labels_n, np.concatenate(losses), np.concatenate(correct))


def output_change(shard: FeatureShard, before: Head, after: Head) -> npt.NDArray[np.float64]:
    r"""How far each sample's prediction among the classes that are not its own has moved, in nats, ``[n]``.

    .. math:: D_{KL}(q_0 \,\|\, q), \qquad q = \mathrm{softmax}(z) \text{ without the true class}

    Only the forget set is needed: a head that forgets a label and nothing else leaves the other classes' proportions alone.
    """
    changes = [np.empty(0)]
    for features, labels in shard.blocks():
        others = ~torch.nn.functional.one_hot(labels, len(before.matrix_CD)).bool()
        old, new = (
            torch.log_softmax(head.logits(features)[others].reshape(len(labels), len(before.matrix_CD) - 1), dim=1)
            for head in (before, after)
        )
        changes.append((old.exp() * (old - new)).sum(1).numpy())
    return np.concatenate(changes)


def summarise(predictions: Predictions) -> dict[str, Any]:
    """``samples``, ``accuracy`` (share), ``loss`` (mean, nats) and ``per_class`` with the same, keyed by label."""

    def figures(part: Predictions) -> dict[str, Any]:
        return {"samples": len(part.labels), "accuracy": float(part.correct.mean()), "loss": float(part.losses.mean())}

    classes = np.unique(predictions.labels)
    per_class = {str(label): figures(predictions.of_labels(np.array([label]))) for label in classes}
    return {**figures(predictions), "per_class": per_class}
