"""What a source of samples is: rows, and shards of blocks of them.

A source is a small picklable description (a table or Dataset held in memory travels to the workers once), and a shard is a
range of its rows, read inside the task that needs it; any task can therefore run again anywhere.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Consecutive samples as they are stored: ids, labels ``[B]`` int64 and raw inputs (encoded images, arrays or tensors)."""

    ids: list[str]
    labels: npt.NDArray[np.int64]
    inputs: list[Any]

    def part(self, start: int, stop: int) -> "Rows":
        """Some of them."""
        return Rows(self.ids[start:stop], self.labels[start:stop], self.inputs[start:stop])

    def pick(self, places: npt.NDArray[np.int64]) -> "Rows":
        """Those at some places."""
        return Rows([self.ids[i] for i in places], self.labels[places], [self.inputs[i] for i in places])

    @classmethod
    def concatenate(cls, parts: "Sequence[Rows]") -> "Rows":
        """One after the other."""
        ids = [sample_id for part in parts for sample_id in part.ids]
        return cls(ids, np.concatenate([part.labels for part in parts]), [value for part in parts for value in part.inputs])

    def digest(self) -> bytes:
        """SHA-256 of ids, labels and inputs: the same content gives the same digest whatever file it lies in."""
        parts: list[bytes | memoryview] = []
        for sample_id, label, value in zip(self.ids, self.labels.tolist(), self.inputs, strict=True):
            content = _content(value)
            parts += [f"{len(sample_id)}:{sample_id}{label}:{len(content)}:".encode(), content]
        return hashlib.sha256(b"".join(parts)).digest()  # in one call, so that other threads can work meanwhile


def _content(value: Any) -> bytes | memoryview:
    """The bytes of an input; of one that is no bytes and no numbers, which is a bad row, its type."""
    if isinstance(value, bytes):
        return value
    if value is None:
        return b"none"
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    return str(type(value)).encode() if array.dtype == object else np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


@dataclass(frozen=True, slots=True)  # the driver holds all of them
class Shard:
    """An aligned run of blocks: rows ``start`` to ``stop`` of the source."""

    index: int
    start: int
    stop: int
    block_rows: int

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Row range of each block."""
        for start in range(self.start, self.stop, self.block_rows):
            yield start, min(start + self.block_rows, self.stop)


class Source(ABC):
    """Samples to forget, or an evaluation set; ``num_rows`` and ``read`` are all that a new source needs."""

    name: str
    num_rows: int

    @property
    def rows_given(self) -> int:
        """Rows of what the caller gave, of which this may be a part."""
        return self.num_rows

    @abstractmethod
    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""

    def read_blocks(self, shard: Shard) -> Iterator[Rows]:
        """The blocks of a shard, one after the other."""
        return (self.read(start, stop) for start, stop in shard.blocks())

    def positions(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Places of rows ``start`` to ``stop`` in what the caller gave."""
        return np.arange(start, stop)

    def check(self, num_classes: int) -> None:
        """Refuse duplicate ids and labels outside ``0 .. num_classes - 1`` as far as that needs no input to be read."""

    def shards(self, block_rows: int, blocks_per_shard: int) -> list[Shard]:
        """Cut into aligned shards of ``blocks_per_shard`` blocks; the last may be shorter."""
        step = block_rows * blocks_per_shard
        starts = range(0, self.num_rows, step)
        return [Shard(i, start, min(start + step, self.num_rows), block_rows) for i, start in enumerate(starts)]
