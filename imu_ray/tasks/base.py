"""What a task supplies: how rows become a batch, and what the model's head and loss are."""

from collections.abc import Sequence
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


class Task(Protocol):
    """A kind of sample, head and loss. Picklable: it travels to every worker."""

    @property
    def head(self) -> str:
        """Name of the layer whose input is cached."""
        ...

    @property
    def num_classes(self) -> int:
        """Outputs of the head."""
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
