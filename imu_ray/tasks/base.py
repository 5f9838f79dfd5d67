"""What a task supplies: how rows become a batch, and what the model's head and loss are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from imu_ray.data import Rows


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why; never its content."""

    sample_id: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Model inputs ``[B, ...]``, labels ``[B]`` int64, ids, and the rows that were left out."""

    inputs: Tensor
    labels_B: Tensor
    ids: list[str]
    bad_rows: Sequence[BadRow] = ()


@dataclass(frozen=True)
class Outputs:
    """Logits ``[B, C]``, labels ``[B]`` and features: the head's input ``[B, D]``, without the bias input."""

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
    """

    rises: bool
    counted: bool = False
    chance: float | None = None


class Task(Protocol):
    """A kind of sample, model output and loss. Picklable: it travels to every worker.

    Outputs are what the target layer gives, ``[B, C]``, or ``[B, T, C]`` for T positions of each sample; labels are ``[B]`` or ``[B, T]``.
    """

    @property
    def head(self) -> str:
        """Name of the layer whose input is cached."""
        ...

    @property
    def num_classes(self) -> int:
        """Outputs of the head."""
        ...

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The figures that ``sample_metrics`` gives; ``loss`` is one of them."""
        ...

    def target_layers(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The layers that are scored and changed, by name."""
        ...

    def collate(self, rows: Rows) -> Batch:
        """Decode rows into one batch; bad rows are refused or left out and listed."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """One forward pass in the mode the model is in."""
        ...

    def sample_metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Every metric of each sample, ``[B]`` float64, by name."""
        ...

    def output_gradient(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Gradient of each sample's loss with respect to the outputs, in their shape; float64."""
        ...
