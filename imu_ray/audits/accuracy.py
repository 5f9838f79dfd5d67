"""Accuracy and loss of a sample set under a head, overall and per class."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imu_ray.influence.scores import sample_losses
from imu_ray.scopes.features import FeatureShard
from imu_ray.scopes.head import Head


@dataclass(frozen=True)
class Predictions:
    """Labels, losses (nats) and correctness of some samples, ``[n]`` each."""

    labels: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]
    correct: npt.NDArray[np.bool_]


class Accuracy:
    """Accuracy and loss of a sample set, counted as its predictions come.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        self._samples, self._correct, self._losses = np.zeros(classes, np.int64), np.zeros(classes, np.int64), np.zeros(classes)

    def take(self, part: Predictions) -> None:
        """The next samples."""
        self._samples += np.bincount(part.labels, minlength=len(self._samples))
        self._correct += np.bincount(part.labels[part.correct], minlength=len(self._samples))
        np.add.at(self._losses, part.labels, part.losses)  # one after the other: the bits do not hang on how the samples are parted

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Labels that occur, ascending."""
        return np.flatnonzero(self._samples)

    def figures(self) -> dict[str, Any]:
        """``samples``, ``accuracy`` (share), ``loss`` (mean, nats) and ``per_class`` with the same, keyed by label."""
        per_class = {str(label): self._figures(label) for label in self.labels}
        return {**self._figures(slice(None)), "per_class": per_class}

    def _figures(self, classes: int | slice) -> dict[str, Any]:
        samples = int(self._samples[classes].sum())
        sums = {"accuracy": self._correct[classes].sum(), "loss": self._losses[classes].sum()}
        return {"samples": samples, **{name: float(total / samples) for name, total in sums.items()}}


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
