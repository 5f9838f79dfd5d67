"""What a source of samples is: rows, and shards of blocks of them.

A source is a small picklable description (a table or Dataset held in memory travels to the workers once), and a shard
is a range of its rows, read inside the task that needs it; any task can therefore run again anywhere.
"""

import bisect
import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pyarrow import fs
from torch import Tensor

from imu_ray.config import ForgetSetConfig
from imu_ray.data.ids import IdList
from imu_ray.errors import ForgetSetError, ImuError, raised_in
from imu_ray.run.record import SelectionRecord

# Rows read at a time where some of them are looked for: the memory that a sparse part costs.
SPAN = 4096


class UnreadableError(ForgetSetError, OSError):
    """Storage failed; as an OSError it lets Ray run the task again, because that may pass."""


@contextlib.contextmanager
def reading(what: str, filesystem: fs.FileSystem | None = None) -> Iterator[None]:
    """An error of ours in place of what storage, a decoder or a caller's Dataset raises; ``filesystem`` is where it is.

    The text of a Dataset's error may hold what a sample holds, so only its kind and place are shown.
    """
    try:
        yield
    except (ImuError, MemoryError):
        raise
    except Exception as error:
        shown = isinstance(error, OSError | pa.ArrowException)
        why = " ".join(str(error).split()) if shown else raised_in(error)
        kind = UnreadableError if isinstance(error, OSError) else ForgetSetError
        remedy = "mend or remove what is not"
        if not isinstance(filesystem, fs.LocalFileSystem | None):
            remedy += ", or check the address, the credentials and the network"
        raise kind(f"{what} cannot be read: {why}; expected samples that are whole and readable; {remedy}") from None


# What a task reads of a sample: the column by the name of the setting; ``label`` is a class, the others are the input.
Fields = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class View:
    """An augmented view of a raw input: the transform's name, and the draw (63 bits) that seeds it."""

    input: Any
    transform: str
    draw: int


@dataclass(frozen=True)
class Rows:
    """Consecutive samples as they are stored: ids, labels and raw inputs.

    Labels are classes ``[B]`` int64 (0 where a sample has none), or ``[B, C]`` float64 by ``forget_set.target``.

    An input is an encoded image, text, an array or a tensor; several of these by name; or a ``View``. ``file_of`` tells
    where a row lies by its place among these, for errors; parts do not have it (``Source.placed``).
    """

    ids: list[str]
    labels: npt.NDArray[Any]
    inputs: list[Any]
    file_of: Callable[[int], str] | None = None

    def name_of(self, place: int) -> str:
        """A row as errors call it."""
        return f"row {self.ids[place]!r}" + (f" of {self.file_of(place)}" if self.file_of else "")

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
        return cls(
            ids, np.concatenate([part.labels for part in parts]), [value for part in parts for value in part.inputs]
        )

    def digest(self) -> bytes:
        """SHA-256 of ids, labels and inputs: the same content gives the same digest whatever file it lies in."""
        digest = hashlib.sha256()
        for sample_id, label, own in zip(self.ids, self.labels.tolist(), self.contents, strict=True):
            digest.update(f"{len(sample_id)}:{sample_id}{label}:".encode() + own)
        return digest.digest()

    @cached_property
    def contents(self) -> list[bytes]:
        """SHA-256 of each input: equal ones are told by it, whatever their ids and labels."""
        return [_digest(value) for value in self.inputs]


def _digest(value: Any) -> bytes:
    digest = hashlib.sha256()
    if isinstance(value, View):
        digest.update(f"{value.transform}:{value.draw}:".encode())
        value = value.input
    digest.update(_content(value))
    return digest.digest()


def _content(value: Any) -> bytes | memoryview:
    """The bytes of an input; of one that is no bytes and no numbers, which is a bad row, its type."""
    if isinstance(value, bytes):
        return value
    if value is None:
        return b"none"
    if isinstance(value, Mapping | list):
        named = value.items() if isinstance(value, Mapping) else enumerate(value)
        parts = [(f"{name}".encode(), bytes(_content(part))) for name, part in named]
        return b"".join(b"%d:%b%d:%b" % (len(name), name, len(part), part) for name, part in parts)
    try:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        array = np.ascontiguousarray(value).reshape(-1)
        return str(type(value)).encode() if array.dtype == object else array.view(np.uint8).data
    except Exception:  # a sparse tensor, a broken image
        return str(type(value)).encode()


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


@dataclass(frozen=True)
class Files:
    """Files whose rows follow each other: their paths, and the number of the first row of each."""

    paths: Sequence[str]
    starts: Sequence[int]

    def of(self, number: int) -> str:
        """The file that a row lies in."""
        return self.paths[bisect.bisect_right(self.starts, number) - 1]


class Source(ABC):
    """Samples to forget, or an evaluation set.

    A new source sets ``name`` and ``num_rows`` when it is made, says what it ``takes``, has ``read`` and stands in
    ``imu_ray.data.SOURCES``.
    """

    name: str
    num_rows: int
    selection: SelectionRecord | None = None  # what was asked for and found, where rows were named
    row_settings: ForgetSetConfig | None = None  # by which rows are decoded; set where a source is opened
    is_numbered: bool = False  # whether a row's id is its number

    @abstractmethod
    def __init__(self, given: Any, config: ForgetSetConfig, fields: Fields | None = None) -> None:
        """Open what the caller gave, as far as that needs no input to be read; ``fields`` are those of the task."""

    @classmethod
    def takes(cls, given: Any) -> bool:
        """Whether this is how to read an object, or a ``Location`` where a path or URI was given."""
        return False

    @property
    def rows_given(self) -> int:
        """Rows of what the caller gave, of which this may be a part."""
        return self.num_rows

    @abstractmethod
    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""

    def file_of(self, row: int) -> str:
        """Where a row lies, for errors: its file where there are several, else the name of the source."""
        return self.name

    def placed(self, rows: Rows, start: int) -> Rows:
        """Rows that were read from ``start`` on, which know where they lie."""
        return replace(rows, file_of=lambda place: self.file_of(start + place))

    def read_blocks(self, shard: Shard) -> Iterator[Rows]:
        """The blocks of a shard, one after the other."""
        return (self.read(start, stop) for start, stop in shard.blocks())

    def take(self, rows: npt.NDArray[np.int64]) -> Rows:
        """Some rows, ascending. Those between them are read as well, unless a source knows better."""
        parts = []
        while len(rows):
            first = int(rows[0])
            here = rows[rows < first + SPAN]
            parts.append(self.read(first, int(here[-1]) + 1).pick(here - first))
            rows = rows[len(here) :]
        return Rows.concatenate(parts)

    def narrow(self, rows: npt.NDArray[np.int64]) -> tuple["Source", npt.NDArray[np.int64]]:
        """What travels where only some rows are wanted, ascending, and their places in that: less where it can be."""
        return self, rows

    def find(self, asked: IdList) -> Iterator[tuple[str, int]]:
        """Those of some ids that there are, with the number of the row. All rows are read, unless a source knows."""
        wanted = frozenset(asked.ids)
        for start in range(0, self.num_rows, SPAN):
            ids = self.read(start, min(start + SPAN, self.num_rows)).ids
            yield from ((one, start + place) for place, one in enumerate(ids) if one in wanted)

    def matching(self, where: str) -> npt.NDArray[np.int64]:
        """Numbers of the rows that meet ``forget_set.where``, ascending."""
        raise ForgetSetError(
            f"forget_set.where is set, but {self.name} has no columns that can be asked; expected Parquet, JSON lines "
            "or a table; name the rows in forget_set.ids"
        )

    def positions(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Places of rows ``start`` to ``stop`` in what the caller gave."""
        return np.arange(start, stop)

    def check(self, num_classes: int) -> None:
        """Refuse duplicate ids and labels outside ``0 .. num_classes - 1`` as far as that needs no input to be read."""

    def check_rows(self, rows: npt.NDArray[np.int64], num_classes: int) -> None:
        """The same of some rows; what is not refused here is where they are decoded."""

    def shards(self, block_rows: int, blocks_per_shard: int) -> list[Shard]:
        """Cut into aligned shards of ``blocks_per_shard`` blocks; the last may be shorter."""
        step = block_rows * blocks_per_shard
        starts = range(0, self.num_rows, step)
        return [Shard(i, start, min(start + step, self.num_rows), block_rows) for i, start in enumerate(starts)]
