"""Samples in Parquet files, which are read by row range, or by row group where rows are named."""

import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

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
    is_text,
    rows_of,
    type_of,
)
from imu_ray.data.ids import IdList
from imu_ray.data.location import JSON_LINES, TAR, Location
from imu_ray.data.query import Query
from imu_ray.data.source import Fields, Files, Rows, Shard, Source, reading
from imu_ray.errors import ForgetSetError


class ParquetSource(Source):
    """Rows of one or more Parquet files, in the order of their names; files are read by row range."""

    def __init__(self, given: Location, config: ForgetSetConfig, fields: Fields | None = None) -> None:
        self.name, self.config, self.filesystem = given.name, config, given.filesystem
        self.paths = given.ending_in(".parquet" if given.is_folder else "")
        self.starts, self.num_rows = [], 0
        types: dict[str, pa.DataType] = {}
        for path in self.paths:
            with reading(path, self.filesystem):
                file = self._open(path)
            self.columns = columns_of(file.schema_arrow, config, fields or image_fields(config), path)
            found = {column: type_of(file.schema_arrow, column) for column in self.columns.values()}
            types = types or found
            if found != types:
                raise ForgetSetError(
                    f"{path} has columns {_describe(found)}, {self.paths[0]} has {_describe(types)}; expected the same "
                    "columns in all files; write it anew, or give it as a set of its own"
                )
            self.starts.append(self.num_rows)
            self.num_rows += file.metadata.num_rows
        self.is_numbered = ID not in self.columns
        self.files = Files(self.paths, self.starts)

    @classmethod
    def takes(cls, given: Any) -> bool:
        """A file, or a folder that holds Parquet files."""
        if not isinstance(given, Location):
            return False
        return bool(given.ending_in(".parquet")) or not (given.is_folder or given.ending_in(*JSON_LINES, *TAR))

    def _open(self, path: str) -> pq.ParquetFile:
        return pq.ParquetFile(path, filesystem=self.filesystem)

    def _slices(self, start: int, stop: int, columns: list[str]) -> Iterator[pa.Table]:
        for path, first in zip(self.paths, self.starts, strict=True):
            if first >= stop:
                return
            with reading(path, self.filesystem):
                yield from self._slices_of(path, first, start, stop, columns)

    def _slices_of(self, path: str, first: int, start: int, stop: int, columns: list[str]) -> Iterator[pa.Table]:
        """The part of one file, whose first row has number ``first``."""
        file = self._open(path)
        if first + file.metadata.num_rows <= start:
            return
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if first < stop and first + size > start:
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
                    if first >= stop:
                        return
                    low, high = max(start - first, 0), min(stop - first, len(batch))
                    if low < high:
                        yield pa.Table.from_batches([batch.slice(low, high - low)])
                    first += len(batch)
            else:
                first += size

    def file_of(self, row: int) -> str:
        """The file of a row."""
        return self.files.of(row)

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""
        return next(self._blocks([(start, stop)]))

    def read_blocks(self, shard: Shard) -> Iterator[Rows]:
        """The blocks of a shard; a row group is decoded once for all of them."""
        return self._blocks(list(shard.blocks()))

    def _blocks(self, ranges: Sequence[tuple[int, int]]) -> Iterator[Rows]:
        """Rows of ranges that follow each other."""
        waiting: list[pa.Table] = []
        slices = self._slices(ranges[0][0], ranges[-1][1], list(self.columns.values()))
        for start, stop in ranges:
            while sum(len(table) for table in waiting) < stop - start:
                table = next(slices, None)
                if table is None:
                    raise self._fewer()
                waiting.append(table)
            table = pa.concat_tables(waiting)
            waiting = [table.slice(stop - start)]
            with reading(self._between(start, stop)):
                yield rows_of(table.slice(0, stop - start), self.columns, self.config, range(start, stop), self.file_of)

    def take(self, rows: npt.NDArray[np.int64]) -> Rows:
        """Some rows, ascending; other row groups than theirs are not read."""
        table = self._taken(rows, list(self.columns.values()))
        with reading(self._between(int(rows[0]), int(rows[-1]) + 1)):
            return rows_of(table, self.columns, self.config, rows, self.file_of)

    def _between(self, start: int, stop: int) -> str:
        """The file, or the first and the last, of rows ``start`` to ``stop``."""
        return " to ".join(dict.fromkeys((self.file_of(start), self.file_of(stop - 1))))

    def _taken(self, rows: npt.NDArray[np.int64], columns: list[str]) -> pa.Table:
        parts: list[pa.Table] = []
        for path, first, last in zip(self.paths, self.starts, [*self.starts[1:], self.num_rows], strict=True):
            here = rows[np.searchsorted(rows, first) : np.searchsorted(rows, last)] - first
            if len(here):
                with reading(path, self.filesystem), self._open(path) as file:
                    parts += _rows_of_file(file, here, columns)
        if sum(map(len, parts)) < len(rows):
            raise self._fewer()
        return pa.concat_tables(parts)

    def find(self, asked: IdList) -> Iterator[tuple[str, int]]:
        """Rows with these ids; row groups whose statistics rule out all of them are not read."""
        if self.is_numbered:
            yield from find_numbers(asked, self.num_rows)
            return
        column = self.columns[ID]
        for path, first in zip(self.paths, self.starts, strict=True):
            with reading(path, self.filesystem), self._open(path) as file:
                for start, group in _groups(file):
                    if _may_hold(file, group, column, asked):
                        cells = column_of(file.read_row_group(group, columns=[column]), column)
                        yield from ((one, first + start + place) for one, place in find_cells(cells, asked))

    def matching(self, where: str) -> npt.NDArray[np.int64]:
        """Rows that meet a condition; row groups whose statistics rule that out are not read."""
        found = [np.empty(0, np.int64)]
        for path, first in zip(self.paths, self.starts, strict=True):
            with reading(path, self.filesystem), self._open(path) as file:
                query = Query(where, file.schema_arrow)
                chosen = _may_meet(path, self.filesystem, file, query)
                for start, group in _groups(file):
                    if group in chosen:
                        rows = query.rows(file.read_row_group(group, columns=query.columns))
                        found.append(first + start + rows.to_numpy())
        return np.concatenate(found)

    def check(self, num_classes: int) -> None:
        """Refuse duplicate ids, and labels outside the model's classes; reads the id and label columns only."""
        with reading(self.name):
            keys = pa.concat_tables(self._slices(0, self.num_rows, self._keys))
            check_keys(keys, self.columns, self.config, num_classes, range(self.num_rows), self.file_of)

    def check_rows(self, rows: npt.NDArray[np.int64], num_classes: int) -> None:
        """The same of some rows; reads their row groups only."""
        if self._keys:
            with reading(self.name):
                keys = self._taken(rows, self._keys)
                check_keys(keys, self.columns, self.config, num_classes, rows, self.file_of)

    @property
    def _keys(self) -> list[str]:
        return [column for key, column in self.columns.items() if key in (ID, LABEL)]

    def _fewer(self) -> ForgetSetError:
        return ForgetSetError(
            f"{self.name} has fewer rows than when the run began; expected {self.num_rows}; leave the files as they are"
        )


def _groups(file: pq.ParquetFile) -> Iterator[tuple[int, int]]:
    """The number in the file of the first row of each row group, and the group's own."""
    start = 0
    for group in range(file.num_row_groups):
        yield start, group
        start += file.metadata.row_group(group).num_rows


def _rows_of_file(file: pq.ParquetFile, rows: npt.NDArray[np.int64], columns: list[str]) -> Iterator[pa.Table]:
    """Rows by their number in the file, ascending; other row groups than theirs are not read."""
    for start, group in _groups(file):
        stop = start + file.metadata.row_group(group).num_rows
        here = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
        if not len(here):
            continue
        for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
            within = here[(here >= start) & (here < start + len(batch))] - start
            if len(within):
                yield pa.Table.from_batches([batch]).take(within)
            start += len(batch)


def _may_hold(file: pq.ParquetFile, group: int, column: str, asked: IdList) -> bool:
    """Whether a row group may have a row with one of the ids, by the least and the greatest of its column."""
    kind = type_of(file.schema_arrow, column)
    if pa.types.is_integer(kind):
        values: Sequence[Any] = asked.numbers
    elif is_text(kind):
        values = asked.ids  # texts are ordered as in Python: by code point
    else:
        return True
    described = file.metadata.row_group(group)
    leaves = (described.column(place) for place in range(described.num_columns))
    found = next((leaf.statistics for leaf in leaves if leaf.path_in_schema == column), None)
    if found is None or not found.has_min_max:
        return True
    place = bisect.bisect_left(values, found.min)
    return place < len(values) and values[place] <= found.max


def _may_meet(path: str, filesystem: fs.FileSystem, file: pq.ParquetFile, query: Query) -> set[int]:
    """Row groups in which a row may meet a condition."""
    import pyarrow.dataset as ds  # here, because it imports pandas, which every worker would load

    fragment = ds.ParquetFileFormat().make_fragment(path, filesystem=filesystem)
    try:
        chosen = fragment.subset(query.expression, schema=file.schema_arrow)
    except pa.ArrowException:  # a type that statistics are not compared for
        return set(range(file.num_row_groups))
    return {group.id for group in chosen.row_groups}


def _describe(types: dict[str, pa.DataType]) -> str:
    return ", ".join(f"{name}: {kind}" for name, kind in types.items())
