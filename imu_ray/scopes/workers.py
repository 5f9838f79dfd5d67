"""The workers of an update: who takes which pieces, and how their sums come together."""

from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

T = TypeVar("T")


class Workers:
    """One worker of a process group of ``torch.distributed``, or the only one.

    Every worker calls ``sum`` and ``agree`` in the same order.

    Args:
        rank: which worker this is, from 0.
        world: number of workers.
        device: where it computes; the CPU when not given.
    """

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.world = rank, world
        self.device = device or torch.device("cpu")

    def take(self, pieces: list[T]) -> list[T]:
        """This worker's run of the pieces. Runs differ by one piece at most, and neighbours are read by one worker."""
        return pieces[self.rank * len(pieces) // self.world : (self.rank + 1) * len(pieces) // self.world]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all workers, in place; the same bits on each."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def agree(self, value: T) -> T:
        """The first worker's value, on every worker."""
        box = [value]
        if self.world > 1:
            torch.distributed.broadcast_object_list(box)
        return box[0]
