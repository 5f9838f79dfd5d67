"""Recovery: what brings forgotten answers back. Measured of a finished model; no update reads it.

Shapes: N samples of a set, n of them drawn, D penultimate features, C classes.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from imu_ray.audits.base import NO_CLASS
from imu_ray.audits.quantisation import quantisation
from imu_ray.audits.relearning import LORA_RATE, Sample, missing_adapters, moving, relearn, with_adapters
from imu_ray.audits.retrieval import head_inputs
from imu_ray.config import AuditConfig, UnlearnConfig
from imu_ray.data import PartSource, Source
from imu_ray.models.copies import plain_copy
from imu_ray.scopes.base import Part
from imu_ray.scopes.features import FeatureShard, Positions
from imu_ray.scopes.layers import Layers
from imu_ray.tasks.base import Task

LIMIT = 1000  # rows that a figure is measured on; more would not move one that is read to two digits
LEAST = 10  # fewest such rows of the forget set
SHOWN, HELD = 1, 2
Marks = npt.NDArray[np.bool_]
Labelled = tuple[npt.NDArray[np.floating[Any]], Positions]  # penultimate features ``[n, D]`` and labels ``[n]``


@dataclass(frozen=True)
class Draw:
    """Which rows an attacker is given with their labels, and on which others an attack is measured; marks ``[N]``.

    Attributes:
        shown: by set: ``forget``, and the other set where rows of it are given too.
        held: by set: the other rows of ``forget``; of ``test`` those of the forgotten classes.
        whole: rows of ``forget``, shown or not, for what shows none.
        kept: of the set that stands for what was to be kept, rows that are not shown; nothing without such a set.
    """

    shown: Mapping[str, Marks]
    held: Mapping[str, Marks]
    whole: Marks
    kept: Mapping[str, Marks]


def other_set(names: Iterable[str]) -> str | None:
    """The set that stands for what was to be kept: ``retain``, or the first that is given, ``test`` last."""
    given = [name for name in names if name != "forget"]
    return next(
        (name for name in ("retain", *(name for name in given if name != "test"), "test") if name in given), None
    )


def draw(labels: Mapping[str, Positions], rows: int, seed: int) -> Draw:
    """Draw the rows of an attack; the same for every model, number of workers and retry.

    Of each class the attacker gets ``rows``: of the forget set as many, but no more than half of those it has; what is
    missing, from the other set. At most ``LIMIT`` of the others are measured. Samples without one class (sequences,
    soft or several labels) are drawn as if they were of one, and only those to forget are given.

    Args:
        labels: of every sample set ``[N]``, or ``[N, ...]`` of samples without one class.
        rows: labelled rows of each class.
        seed: seed of the run.
    """
    random = np.random.default_rng(seed)
    classes = {name: each if each.ndim == 1 else np.zeros(len(each), np.int64) for name, each in labels.items()}
    order = {name: random.permutation(len(each)) for name, each in sorted(classes.items())}
    forget, other = classes["forget"], other_set(classes)
    shown = {"forget": np.zeros(len(forget), bool)}
    taken = dict[int, int]()
    for label in np.unique(forget).tolist():
        of_class = order["forget"][forget[order["forget"]] == label]
        taken[label] = min(rows, len(of_class) // 2)
        shown["forget"][of_class[: taken[label]]] = True
    if other is not None and labels["forget"].ndim == 1:
        shown[other] = np.zeros(len(classes[other]), bool)
        for label in np.unique(classes[other]).tolist():
            of_class = order[other][classes[other][order[other]] == label]
            shown[other][of_class[: rows - taken.get(label, 0)]] = True
    free = {name: ~shown.get(name, np.zeros(len(each), bool)) for name, each in classes.items()}
    held = {"forget": free["forget"]}
    if "test" in classes:
        held["test"] = free["test"] & np.isin(classes["test"], forget)
    held = {name: _first(marks, order[name]) for name, marks in held.items() if marks.any()}
    kept = {} if other is None or not free[other].any() else {other: _first(free[other], order[other])}
    return Draw(shown, held, _first(np.full(len(forget), True), order["forget"]), kept)


def _first(marks: Marks, order: Positions) -> Marks:
    """The first ``LIMIT`` of the marked rows in an order."""
    kept = np.zeros_like(marks)
    kept[order[marks[order]][:LIMIT]] = True
    return kept


def rows_of(name: str, marks: Marks, places: Mapping[str, Positions], sources: Mapping[str, Source]) -> PartSource:
    """The marked samples of a set as a source: their rows, by their places in what the caller gave."""
    return PartSource.at(sources[name], places[name][marks])


@dataclass(frozen=True)
class Marked:
    """Marked samples of a shard of a set: ``SHOWN`` or ``HELD``, penultimate features ``[n, D]``, labels; ``[n]``."""

    name: str
    codes: npt.NDArray[np.int8]
    features: npt.NDArray[np.floating[Any]]
    labels: Positions


def codes_of(drawn: Draw, name: str, count: int) -> npt.NDArray[np.int8]:
    """Of each sample of a set ``SHOWN``, ``HELD`` or 0, as a probe has them, ``[N]``."""
    codes = np.zeros(count, np.int8)
    for code, marks in ((HELD, drawn.held), (SHOWN, drawn.shown)):
        codes[marks.get(name, np.zeros(count, bool))] = code
    return codes


def penultimate(shard: FeatureShard, codes: npt.NDArray[np.int8], part: Part, name: str) -> Marked:
    """The marked samples of a shard, under a part's parameters."""
    taken = shard.take(codes > 0)
    found = head_inputs(taken, part) if isinstance(part, Layers) else taken.features(slice(None))
    return Marked(name, codes[codes > 0], found, taken.labels_n)


def probe(parts: Sequence[Marked]) -> dict[str, Any]:
    """``linear_probe`` of the marked samples of all sets."""

    def labelled(chosen: Sequence[Marked], code: int) -> Labelled:
        features = np.concatenate([part.features[part.codes == code] for part in chosen])
        return features, np.concatenate([part.labels[part.codes == code] for part in chosen])

    sets = {part.name: [each for each in parts if each.name == part.name] for part in parts}
    held = {name: labelled(chosen, HELD) for name, chosen in sets.items()}
    return linear_probe(labelled(parts, SHOWN), {name: each for name, each in held.items() if len(each[1])})


def linear_probe(shown: Labelled, held: Mapping[str, Labelled]) -> dict[str, Any]:
    r"""How often a new head, fitted on a few labelled rows, is right on the others.

    .. math:: \min_{W, b} \; \tfrac12 \|W\|^2 + \sum_i \ell(W \hat h_i + b, y_i), \qquad \hat h = (h - \mu) / \sigma

    :math:`\mu` and :math:`\sigma` are those of the labelled rows (:math:`\sigma = 1` where a feature is constant).
    Accuracy is in [0, 1]. Where the features of a forgotten class are still there it is near that of the original
    model, however low the accuracy of the model's own head; a retrained model shows what is found without them.

    Args:
        shown: features ``[n, D]`` and labels ``[n]`` that the head is fitted on.
        held: the same of the rows that are measured, by set.

    Returns:
        ``accuracy`` on ``rows`` rows of ``forget``; ``labelled`` rows and their ``classes``; the same of ``test``.

    Source: Alain, Bengio, arXiv:1610.01644; scikit-learn's LogisticRegression.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = shown
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    with warnings.catch_warnings():  # a head that is not quite at its optimum is a head
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(features.astype(np.float64), labels)
    found = {
        name: {"accuracy": float((probe.predict(x.astype(np.float64)) == y).mean()), "rows": len(y)}
        for name, (x, y) in held.items()
    }
    of_test = {"test": found["test"]} if "test" in found else {}
    return {**found["forget"], "labelled": len(labels), "classes": len(np.unique(labels)), **of_test}


def unable(test: str, task: Task, labels: Mapping[str, Positions], drawn: Draw) -> str | None:
    """Why a test cannot be made of these sets; None where it can."""
    if task.retrieval_sets:
        return "persons are looked up by their embeddings, not told apart by a head"
    if "accuracy" not in task.metrics:
        return "what comes back is told by the accuracy, which samples with several labels do not have"
    measured = int((drawn.whole if test == "quantise" else drawn.held.get("forget", np.zeros(0))).sum())
    if measured < LEAST:
        return f"{measured} rows of the forget set are left to measure on; fewer than {LEAST}"
    if test == "lora":
        return None if task.positions else "LoRA relearning is of language models"
    if test == "probe" and not task.positions and not task.head:
        return "the model does not end in a linear head, whose inputs a new one could be fitted on"
    if test == "probe" and labels["forget"].dtype.kind == "f":
        return NO_CLASS
    if test == "probe" and task.positions:
        return "the samples are sequences, which are of no class"
    if test == "probe" and len(_shown_classes(labels, drawn)) < 2:
        return "the labelled rows are of one class only; an evaluation set with others is needed"
    if test == "relearn" and not drawn.shown["forget"].any():
        return "every class of the forget set has one row, which is measured; none is left to learn from"
    return None


def _shown_classes(labels: Mapping[str, Positions], drawn: Draw) -> Positions:
    return np.unique(np.concatenate([labels[name][marks] for name, marks in drawn.shown.items()]))


@dataclass(frozen=True)
class Attack:
    """A model, and the rows that are shown and measured; picklable, it travels to the tasks.

    Attributes:
        model: on the CPU, in eval mode; not changed.
        task: what a sample is.
        shown: the labelled rows to forget that the attacker is given.
        held: the other rows to forget.
        whole: rows to forget, those among them.
        kept: of the set that stands for what was to be kept, by its name.
        config: ``audit.*``.
        seed: seed of the run.
        device: where the model runs.
    """

    model: nn.Module
    task: Task
    shown: Source
    held: Source
    whole: Source
    kept: Mapping[str, Source]
    config: AuditConfig
    seed: int
    device: str = "cpu"

    @classmethod
    def of(
        cls,
        model: nn.Module,
        task: Task,
        drawn: Draw,
        read: Callable[[str, Marks], Source],
        config: UnlearnConfig,
        device: str,
    ) -> "Attack":
        """Of a draw; ``read`` gives the marked samples of a set."""
        of_forget = (drawn.shown["forget"], drawn.held.get("forget", drawn.shown["forget"] & False), drawn.whole)
        shown, held, whole = (read("forget", marks) for marks in of_forget)
        kept = {name: read(name, marks) for name, marks in drawn.kept.items()}
        return cls(model, task, shown, held, whole, kept, config.audit, config.seed, device)

    def __call__(self, test: str) -> dict[str, Any] | str:
        """The figures of ``quantise``, ``relearn`` or ``lora``; or why there are none."""
        kept = {name: Sample(source, self.task, self.device) for name, source in self.kept.items()}
        if test == "quantise":
            measured = {"forget": Sample(self.whole, self.task, self.device), **kept}
            found = quantisation(self.model.to(self.device), self.task, measured)
            return {**found, "rows": self.whole.num_rows}
        if test == "lora" and (reason := missing_adapters(self.model)):
            return reason
        model = with_adapters(self.model, self.seed) if test == "lora" else plain_copy(self.model)
        model = model.to(self.device)
        optimiser: torch.optim.Optimizer
        if test == "lora":
            adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimiser = torch.optim.AdamW(adapters, LORA_RATE, weight_decay=0.0)
        else:
            optimiser = torch.optim.SGD(moving(model), self.config.recovery_learning_rate)
        shown = Sample(self.shown, self.task, self.device)
        measured = {"forget": Sample(self.held, self.task, self.device), **kept}
        found = relearn(model, self.task, shown, measured, self.config.recovery_steps, optimiser)
        return {**found, "rows": self.held.num_rows, "labelled": self.shown.num_rows}
