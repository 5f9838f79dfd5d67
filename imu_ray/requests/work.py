"""What a queue asks of the library."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol


class Work(Protocol):
    """What a queue asks of the library. ``checkpoint`` None is the model of the job file."""

    ignore_missing: bool
    identity: str
    """digest of what may not change between the begin of a batch and its end"""

    def model_hash(self, checkpoint: str | None) -> str:
        """Hash of a model's tensors."""

    def find(self, ids: Sequence[str]) -> Collection[str]:
        """Those ids that the data has a row of."""

    def plan(self, checkpoint: str | None, ids: Sequence[str]) -> dict[str, Any]:
        """What it takes to forget them."""

    def unlearn(self, checkpoint: str | None, ids_at: str, run_dir: str) -> None:
        """Forget the rows whose ids a file lists; whatever becomes of it is in ``run_dir``."""
