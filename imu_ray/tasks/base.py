"""What a task supplies: how rows become a batch, and what the model's head and loss are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

from torch import Tensor, nn
from typing_extensions import Self

from imu_ray.config import ForgetSetConfig
from imu_ray.data import Fields, Rows, Source
from imu_ray.errors import ConfigError, ForgetSetError, ImuError
from imu_ray.influence.projection import OUTPUTS


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why; never its content."""

    sample_id: str
    reason: str


class UnusableError(Exception):
    """Why one row cannot be used."""


def leave_out(
    config: ForgetSetConfig, rows: Rows, place: int, reason: str, kind: type[ImuError] = ForgetSetError
) -> BadRow:
    """A row that cannot be used: listed, or refused by its file and id with an error of ``kind``."""
    if config.on_bad_row == "skip":
        return BadRow(rows.ids[place], reason)
    raise kind(
        f"{rows.name_of(place)}: {reason}; expected a usable sample; mend it, or set forget_set.on_bad_row=skip to "
        "leave it out and list it in the manifest"
    ) from None


@dataclass(frozen=True)
class Batch:
    """Model inputs ``[B, ...]``, labels, ids, and the rows that were left out.

    Labels are ``[B]`` or ``[B, T]`` int64, or ``[B, C]`` float64 where ``forget_set.target`` says so.
    """

    inputs: Tensor
    labels_B: Tensor
    ids: list[str]
    bad_rows: Sequence[BadRow] = ()


@dataclass(frozen=True)
class Outputs:
    """Logits ``[B, C]``, labels, and features: the head's input ``[B, D]``, without the bias input."""

    logits_BC: Tensor
    labels_B: Tensor
    features_BD: Tensor


@dataclass(frozen=True)
class Metric:
    """A figure of each sample.

    Attributes:
        rises: whether it rises as samples are forgotten; otherwise it falls.
        counted: whether it is 0 or 1 of each sample, so that its mean moves in steps.
        chance: its mean under a uniform guess, where that is known.
        least: the lowest that its mean can be.
        most: the highest.
    """

    rises: bool
    counted: bool = False
    chance: float | None = None
    least: float = -math.inf
    most: float = math.inf

    def check_number(self, value: float, setting: str) -> None:
        """``ConfigError`` where the mean can never be what a setting asks for."""
        if not self.least <= value <= self.most:
            share = ", a share and not per cent" if (self.least, self.most) == (0, 1) else ""
            raise ConfigError(
                f"{setting} is {value:g}, which the metric cannot be; expected a number from {self.least:g} to "
                f"{self.most:g}{share}"
            )


class Task(Protocol):
    """A kind of sample, model output and loss. Picklable: it travels to every worker.

    Outputs are what the model gives, ``[B, C]``, or ``[B, T, C]`` for T positions of each sample; labels are ``[B]`` or
    ``[B, T]``, ``IGNORE`` at positions without one. Outputs at a position may depend on the positions before it, not on
    those after it.
    """

    scope: ClassVar[str]  # what ``ascent.scope = auto`` stands for
    augmented: ClassVar[bool]  # whether views of a sample can be drawn
    retrieval_sets: ClassVar[tuple[str, ...]]  # evaluation sets that are embedded and looked up, and have no labels

    @classmethod
    def fields(cls, config: ForgetSetConfig) -> Fields:
        """What is read of a sample."""
        ...

    @classmethod
    def for_model(
        cls, model: nn.Module, sources: Mapping[str, Source], config: ForgetSetConfig, head: str | None = None
    ) -> "Task":
        """The task of a model, from a trial with the first usable row of ``forget``; refused where they do not fit."""
        ...

    def reading(self, config: ForgetSetConfig) -> Self:
        """The same task, which decodes the rows of a set by its settings."""
        ...

    @property
    def head(self) -> str:
        """Name of the layer whose input is cached where the head moves alone; empty where there is none."""
        ...

    @property
    def positions(self) -> int:
        """T, the positions of a sample; 0 where it has one output only, without a dimension for it."""
        ...

    @property
    def num_classes(self) -> int:
        """Outputs of the head."""
        ...

    @property
    def of_classes(self) -> bool:
        """Whether a sample, or each of its positions, has one class."""
        ...

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The figures that ``sample_metrics`` gives; ``loss`` is one of them."""
        ...

    def collate(self, rows: Rows) -> Batch:
        """Decode rows into one batch; bad rows are refused or left out and listed."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """One forward pass in the mode the model is in."""
        ...

    def target(self, labels: Tensor) -> Tensor:
        """What the loss, and an objective, is of: labels as they are, or another form of ``influence.targets``."""
        ...

    def sample_metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Every metric of each sample, ``[B]`` float64, by name."""
        ...

    def signals(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What membership is inferred from, and the predicted class, ``[B]`` each by name; of some tasks none."""
        ...

    def output_gradient(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Gradient of each sample's loss with respect to the outputs, in their shape.

        Float64; of outputs at many positions in their type, float32 at least.
        """
        ...


T = TypeVar("T", bound=Task)


def reader_of(task: T, source: Source) -> T:
    """The task as it reads a source."""
    return task if source.row_settings is None else task.reading(source.row_settings)


def read_batch(task: Task, source: Source, start: int, stop: int) -> Batch:
    """Rows ``start`` to ``stop`` of a source, decoded."""
    return task.collate(source.placed(source.read(start, stop), start))


def rows_at_once(rows: int, task: Task) -> int:
    """So many rows, or fewer where their outputs would be more than ``OUTPUTS`` numbers."""
    return min(rows, max(1, OUTPUTS // (task.positions * task.num_classes))) if task.positions else rows
