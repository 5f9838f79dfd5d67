"""Samples in an Arrow table."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imu_ray.config import ForgetSetConfig
from imu_ray.data.columns import ID, check_keys, columns_of, find_cells, find_numbers, image_fields, rows_of
from imu_ray.data.ids import IdList
from imu_ray.data.query import Query
from imu_ray.data.source import Fields, Rows, Source, reading


class TableSource(Source):
    """Rows of an Arrow table in memory."""

    name = "the table"

    def __init__(self, given: pa.Table, config: ForgetSetConfig, fields: Fields | None = None) -> None:
        self.config, self.num_rows = config, given.num_rows
        self.columns = columns_of(given.schema, config, fields or image_fields(config), self.name)
        self.is_numbered = ID not in self.columns
        self.numbers = np.arange(self.num_rows)
        asked = [] if config.where is None else Query(config.where, given.schema).columns
        self.table = given.select(list(dict.fromkeys([*self.columns.values(), *asked])))

    @classmethod
    def takes(cls, given: Any) -> bool:
        """A table in memory."""
        return isinstance(given, pa.Table)

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""
        return self._rows(self.table.slice(start, stop - start), self.numbers[start:stop])

    def take(self, rows: npt.NDArray[np.int64]) -> Rows:
        """Some rows."""
        return self._rows(self.table.take(rows), self.numbers[rows])

    def _rows(self, table: pa.Table, numbers: npt.NDArray[np.int64]) -> Rows:
        with reading(self.name):
            return rows_of(table, self.columns, self.config, numbers, self.name)

    def narrow(self, rows: npt.NDArray[np.int64]) -> tuple[Source, npt.NDArray[np.int64]]:
        """A table of these rows alone, with what is read of them."""
        part = copy.copy(self)
        part.table = self.table.select(list(dict.fromkeys(self.columns.values()))).take(rows)
        part.numbers, part.num_rows = self.numbers[rows], len(rows)
        return part, np.arange(len(rows))

    def find(self, asked: IdList) -> Iterator[tuple[str, int]]:
        """Rows with these ids."""
        with reading(self.name):
            cells = None if self.is_numbered else self.table[self.columns[ID]]
            yield from find_numbers(asked, self.num_rows) if cells is None else find_cells(cells, asked)

    def matching(self, where: str) -> npt.NDArray[np.int64]:
        """Rows that meet a condition."""
        found: npt.NDArray[np.int64] = Query(where, self.table.schema).rows(self.table).to_numpy()
        return found

    def check(self, num_classes: int) -> None:
        """Refuse duplicate ids, and labels outside the model's classes."""
        with reading(self.name):
            check_keys(self.table, self.columns, self.config, num_classes, self.name)

    def check_rows(self, rows: npt.NDArray[np.int64], num_classes: int) -> None:
        """The same of some rows."""
        with reading(self.name):
            check_keys(self.table.take(rows), self.columns, self.config, num_classes, self.name)
