"""What an audit is, and what it is made from: predictions on every sample set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from imu_ray.audits.language import extraction_strength
from imu_ray.config import AuditConfig
from imu_ray.scopes.base import Part
from imu_ray.scopes.features import FeatureShard
from imu_ray.tasks.causal_lm import CausalLMTask

# By name a list of figures of each row; a text says why there are none.
Answers = Mapping[str, Sequence[Sequence[float]] | str]


@dataclass(frozen=True)
class Predictions:
    """Labels of some samples, every metric of each ``[N]`` by name, and number of classes.

    Labels are classes ``[N]``, of sequences ``[N, T]``; of samples without one class ``[N, C]`` float64.

    Of a classifier there are ``signals`` beside the metrics, which are not averaged (``Task.signals``).

    With a task that has retrieval sets there are ids, and of those sets embeddings ``[N, D]`` in place of metrics. Of
    a language model's questions there may be what it makes of other ``answers``.
    """

    labels: npt.NDArray[Any]
    metrics: Mapping[str, npt.NDArray[np.float64]]
    classes: int
    ids: Sequence[str] = ()
    embeddings: npt.NDArray[np.float32] | None = None
    answers: Answers = field(default_factory=dict)
    signals: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    @property
    def of_sequences(self) -> bool:
        """Whether a sample has a class at each position."""
        return self.labels.ndim == 2 and not self.of_no_class

    @property
    def of_no_class(self) -> bool:
        """Whether a sample has no one class, but soft or several labels."""
        return self.labels.dtype.kind == "f"

    @classmethod
    def join(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """The predictions of all parts, in order."""
        metrics = {name: np.concatenate([part.metrics[name] for part in parts]) for name in parts[0].metrics}
        ids = [sample_id for part in parts for sample_id in part.ids]
        found = [part.embeddings for part in parts if part.embeddings is not None]
        labels = np.concatenate([part.labels for part in parts])
        named = dict.fromkeys(name for part in parts for name in part.signals)  # a shard without rows has none
        signals = {name: np.concatenate([x.signals[name] for x in parts if name in x.signals]) for name in named}
        embeddings = np.concatenate(found) if found else None
        return cls(labels, metrics, parts[0].classes, ids, embeddings, signals=signals)


def predict_shard(shard: FeatureShard, part: Part, signals: bool = False) -> Predictions:
    """Predictions for every sample of a shard; of sequences with the extraction strength of each.

    With ``signals`` what membership is inferred from, too.
    """
    task, names = part.task, [*part.task.metrics, *(["extraction_strength"] if part.task.positions else [])]
    found: dict[str, list[npt.NDArray[np.float64]]] = {name: [np.empty(0)] for name in names}
    told: dict[str, list[npt.NDArray[Any]]] = {}
    for rows in shard.block_rows():
        outputs, labels = part.outputs(shard, rows)
        measured = task.sample_metrics(outputs, labels)
        if task.positions:
            ends = isinstance(task, CausalLMTask) and task.tokenizer.eos_token_id is not None
            strength = extraction_strength(outputs, labels, end_token=ends)
            measured = {**measured, "extraction_strength": strength}
        for name, values in measured.items():
            found[name].append(values.cpu().numpy())
        for name, values in (task.signals(outputs, labels) if signals else {}).items():
            told.setdefault(name, []).append(values.cpu().numpy())
    metrics = {name: np.concatenate(values) for name, values in found.items()}
    ids = shard.ids.to_pylist() if part.task.retrieval_sets else ()
    of_signals = {name: np.concatenate(values) for name, values in told.items()}
    return Predictions(shard.labels_n, metrics, part.task.num_classes, ids, signals=of_signals)


# Why a figure that is told by class is not there, where ``of_no_class``.
NO_CLASS = "soft and several labels are of no one class"


class Audit(Protocol):
    """Figures of a model. An audit's docstring gives formula, range, and where a model that has forgotten stands."""

    def run(self, measured: Mapping[str, Predictions], config: AuditConfig, seed: int) -> dict[str, Any]:
        """What ``metrics.json`` is to hold, by name.

        Args:
            measured: predictions on every sample set, by its name; ``forget`` is always there.
            config: ``audit.*``.
            seed: seed of the run.
        """
        ...
