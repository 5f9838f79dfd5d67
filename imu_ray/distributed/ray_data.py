"""Samples in a ``ray.data.Dataset``: its blocks stay in the object store, and a task fetches those that it reads."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import RayError, RayTaskError

from imu_ray.config import ForgetSetConfig
from imu_ray.data import SOURCES, Fields, Source
from imu_ray.data.columns import ID, LABEL, column_of, columns_of, image_fields
from imu_ray.data.source import UnreadableError, reading
from imu_ray.data.table import ArrowSource
from imu_ray.errors import ForgetSetError

Places = slice | npt.NDArray[np.int64]


@ray.remote
def _describe(block: Any) -> tuple[int, pa.Schema]:
    return len(block), _table(block).schema


@ray.remote
def _columns(block: Any, rows: Places, columns: list[str]) -> pa.Table:
    return _cut(block, rows, columns)


@contextlib.contextmanager
def _executing(name: str) -> Iterator[None]:
    """Errors of the Dataset's own steps, without the trace that Ray has for their text."""
    with reading(name):
        try:
            yield
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None


def _table(block: Any) -> pa.Table:
    """A block as Arrow; one of pandas may stand among others."""
    return block if isinstance(block, pa.Table) else pa.Table.from_pandas(block, preserve_index=False)


def _cut(block: Any, rows: Places, columns: list[str]) -> pa.Table:
    table = _table(block)
    table = table.select([name for name in columns if name in table.column_names])
    return table.slice(rows.start, rows.stop - rows.start) if isinstance(rows, slice) else table.take(rows)


class RayDataSource(ArrowSource):
    """Rows of a Dataset, executed once.

    The order of its rows counts (``Source``). A materialized Dataset has one; the rows of any other are sorted by id.

    Attributes:
        blocks: references to Arrow tables, none of them empty.
        starts: number of the first row of each, and at the end that of all rows.
    """

    name = "the ray.data Dataset"

    def __init__(self, given: Any, config: ForgetSetConfig, fields: Fields | None = None) -> None:
        with _executing(self.name):
            made = given.materialize()
            self._hold(made)
        fields = fields or image_fields(config)
        self.columns = columns_of(self.schema, config, fields, self.name) if self.blocks else {}
        self.begin(config, self.schema, self.starts[-1])
        if self.blocks and not isinstance(given, _kinds().MaterializedDataset) and not self._is_sorted():
            with _executing(self.name):
                self._hold(made.sort(self.columns[ID]).materialize())

    @classmethod
    def takes(cls, given: Any) -> bool:
        """A Dataset; whoever has one has imported its module, and with it pandas, which others do without."""
        return _kinds() is not None and isinstance(given, _kinds().Dataset)

    def _hold(self, made: Any) -> None:
        """Keep the blocks, and what they are."""
        refs = made.to_arrow_refs()
        described = ray.get([_describe.remote(ref) for ref in refs])
        held = [(ref, rows, schema) for ref, (rows, schema) in zip(refs, described, strict=True) if rows]
        self.blocks = [ref for ref, *_ in held]
        self.starts = np.cumsum([0, *(rows for _, rows, _ in held)]).tolist()
        schemas = [pa.schema([]), *(schema for *_, schema in held)]
        self.schema = pa.unify_schemas(schemas, promote_options="permissive")

    def _is_sorted(self) -> bool:
        """Whether the ids rise; refused where they cannot say what the order is."""
        if self.columns.get(ID) not in self.schema.names:
            raise ForgetSetError(
                f"{self.name} is not materialized and has no column of ids, so that the order of its rows may be "
                "another next time; expected either; name a column of unique ids in forget_set.id_column, or give "
                "dataset.materialize()"
            )
        ids = column_of(self._all(ID), self.columns[ID])
        if ids.null_count:  # refused later, as double ids are (``check``)
            return True
        return pc.all(pc.less_equal(ids[:-1], ids[1:])).as_py() is not False

    def part(self, rows: Places, columns: Iterable[str]) -> pa.Table:
        """Some rows of some columns; where no input is among these, blocks are not moved, but asked for them."""
        wanted = list(columns)
        pieces = [(self.blocks[number], places) for number, places in self._by_block(rows)]
        try:
            if set(wanted).isdisjoint(self._outer(*(key for key in self.columns if key not in (ID, LABEL)))):
                tables = ray.get([_columns.remote(block, places, wanted) for block, places in pieces])
            else:
                tables = [_cut(ray.get(block), places, wanted) for block, places in pieces]
        except RayError as error:
            raise UnreadableError(
                f"a block of {self.name} cannot be fetched ({type(error).__name__}); expected all of them in the "
                "object store; make the Dataset again from what it was read from"
            ) from None
        schema = pa.schema([self.schema.field(name) for name in wanted])
        return pa.concat_tables([schema.empty_table(), *tables], promote_options="permissive")

    def _by_block(self, rows: Places) -> Iterator[tuple[int, Places]]:
        """The numbers of the blocks that rows, ascending, lie in, and their places there."""
        for number, (first, last) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            if isinstance(rows, slice):
                here = slice(max(rows.start - first, 0), min(rows.stop, last) - first)
                if here.start < here.stop:
                    yield number, here
            elif len(places := rows[np.searchsorted(rows, first) : np.searchsorted(rows, last)] - first):
                yield number, places

    def narrow(self, rows: npt.NDArray[np.int64]) -> tuple[Source, npt.NDArray[np.int64]]:
        """The same: references alone travel."""
        return self, rows


def _kinds() -> Any:
    """The module of ``ray.data`` with its classes, or None where nobody has imported it."""
    return sys.modules.get("ray.data.dataset")


SOURCES.append(RayDataSource)
