"""Samples in an Arrow table, or in what gives parts of itself as one."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imu_ray.config import ForgetSetConfig
from imu_ray.data.columns import (
    ID,
    LABEL,
    check_keys,
    column_of,
    columns_of,
    find_cells,
    find_numbers,
    image_fields,
    outer_columns,
    rows_of,
)
from imu_ray.data.ids import IdList
from imu_ray.data.image_files import ImageFiles
from imu_ray.data.query import Query
from imu_ray.data.source import Fields, Files, Rows, Source, reading


class ArrowSource(Source):
    """Rows that come as Arrow tables, by row.

    Attributes:
        columns: those of the fields, and that of the ids.
        numbers: of the rows, ``[N]``: ids where there is no column of them.
        files: where images are, if the rows name files.
        parts: the files that the rows lie in themselves, by number, if there are several.
    """

    columns: Fields
    files: ImageFiles | None = None
    parts: Files | None = None

    def begin(self, config: ForgetSetConfig, schema: pa.Schema, num_rows: int) -> None:
        """Take down what the rows are; ``columns`` are known by now."""
        self.config, self.schema, self.num_rows = config, schema, num_rows
        self.is_numbered, self.numbers = ID not in self.columns, np.arange(num_rows)

    @abstractmethod
    def part(self, rows: slice | npt.NDArray[np.int64], columns: Iterable[str]) -> pa.Table:
        """Some rows of some columns."""

    def file_of(self, row: int) -> str:
        """The file of a row, or the name of the table."""
        return self._file(int(self.numbers[row]))

    def _file(self, number: int) -> str:
        return self.name if self.parts is None else self.parts.of(number)

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""
        return self._rows(slice(start, stop))

    def take(self, rows: npt.NDArray[np.int64]) -> Rows:
        """Some rows."""
        return self._rows(rows)

    def _rows(self, rows: slice | npt.NDArray[np.int64]) -> Rows:
        with reading(self.name):
            table = self.part(rows, self._outer())
            return rows_of(table, self.columns, self.config, self.numbers[rows], self._file, self.files)

    def _outer(self, *keys: str) -> list[str]:
        """The columns of some fields; of all, where none is named."""
        chosen = [column for key, column in self.columns.items() if not keys or key in keys]
        return outer_columns(self.schema, chosen)

    def narrow(self, rows: npt.NDArray[np.int64]) -> tuple[Source, npt.NDArray[np.int64]]:
        """A table of these rows alone, with what is read of them."""
        with reading(self.name):
            made = TableSource.of(self.part(rows, self._outer()), self)
        made.numbers = self.numbers[rows]
        return made, np.arange(len(rows))

    def find(self, asked: IdList) -> Iterator[tuple[str, int]]:
        """Rows with these ids."""
        with reading(self.name):
            if self.is_numbered:
                yield from find_numbers(asked, self.num_rows)
            else:
                yield from find_cells(column_of(self._all(ID), self.columns[ID]), asked)

    def matching(self, where: str) -> npt.NDArray[np.int64]:
        """Rows that meet a condition."""
        query = Query(where, self.schema)
        with reading(self.name):
            table = self.part(slice(0, self.num_rows), query.columns)
        found: npt.NDArray[np.int64] = query.rows(table).to_numpy()
        return found

    def _all(self, *keys: str) -> pa.Table:
        return self.part(slice(0, self.num_rows), self._outer(*keys))

    def check(self, num_classes: int) -> None:
        """Refuse duplicate ids, and labels outside the model's classes."""
        self.check_rows(slice(0, self.num_rows), num_classes)

    def check_rows(self, rows: slice | npt.NDArray[np.int64], num_classes: int) -> None:
        """The same of some rows."""
        if not {ID, LABEL}.isdisjoint(self.columns):
            with reading(self.name):
                keys = self.part(rows, self._outer(ID, LABEL))
                check_keys(keys, self.columns, self.config, num_classes, self.numbers[rows], self._file)


class TableSource(ArrowSource):
    """Rows of an Arrow table in memory."""

    name = "the table"

    def __init__(self, given: pa.Table, config: ForgetSetConfig, fields: Fields | None = None) -> None:
        self.columns = columns_of(given.schema, config, fields or image_fields(config), self.name)
        asked = [] if config.where is None else Query(config.where, given.schema).columns
        self.table = _owned(given.select(outer_columns(given.schema, [*self.columns.values(), *asked])))
        self.begin(config, self.table.schema, given.num_rows)

    @classmethod
    def of(cls, table: pa.Table, source: ArrowSource) -> "TableSource":
        """Rows of another source that are a table by now."""
        made = cls.__new__(cls)
        made.name, made.columns, made.files, made.table = source.name, source.columns, source.files, table
        made.row_settings, made.parts = source.row_settings, source.parts
        made.begin(source.config, table.schema, table.num_rows)
        return made

    @classmethod
    def takes(cls, given: Any) -> bool:
        """A table in memory."""
        return isinstance(given, pa.Table)

    def part(self, rows: slice | npt.NDArray[np.int64], columns: Iterable[str]) -> pa.Table:
        """Some rows of some columns."""
        table = self.table.select(list(columns))
        return table.slice(rows.start, rows.stop - rows.start) if isinstance(rows, slice) else table.take(rows)


def _owned(table: pa.Table) -> pa.Table:
    """The same without views of texts and bytes (polars), which Arrow does not take and send everywhere."""
    plain = {"string_view": pa.large_string(), "binary_view": pa.large_binary()}
    return table.cast(pa.schema([field.with_type(plain.get(str(field.type), field.type)) for field in table.schema]))
