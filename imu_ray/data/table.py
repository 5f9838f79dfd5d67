"""Samples in an Arrow table, or in Parquet files that are read by row range."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imu_ray.config import ForgetSetConfig
from imu_ray.data.columns import ID, LABEL, check_keys, columns_of, image_fields, rows_of
from imu_ray.data.location import Location
from imu_ray.data.source import Fields, Rows, Shard, Source, reading
from imu_ray.errors import ForgetSetError

JSON_LINES = (".jsonl", ".ndjson", ".json")  # files that are read otherwise, by name


class TableSource(Source):
    """Rows of an Arrow table in memory."""

    name = "the table"

    def __init__(self, given: pa.Table, config: ForgetSetConfig, fields: Fields | None = None) -> None:
        self.config, self.num_rows = config, given.num_rows
        self.columns = columns_of(given.schema, config, fields or image_fields(config), self.name)
        self.table = given.select(list(dict.fromkeys(self.columns.values())))

    @classmethod
    def takes(cls, given: Any) -> bool:
        """A table in memory."""
        return isinstance(given, pa.Table)

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""
        with reading(self.name):
            return rows_of(self.table.slice(start, stop - start), self.columns, self.config, start, self.name)

    def check(self, num_classes: int) -> None:
        """Refuse duplicate ids, and labels outside the model's classes."""
        with reading(self.name):
            check_keys(self.table, self.columns, self.config, num_classes, self.name)


class ParquetSource(Source):
    """Rows of one or more Parquet files, in the order of their names; files are read by row range."""

    def __init__(self, given: Location, config: ForgetSetConfig, fields: Fields | None = None) -> None:
        self.name, self.config, self.filesystem = given.name, config, given.filesystem
        self.paths = given.ending_in(".parquet" if given.is_folder else "")
        self.starts, self.num_rows = [], 0
        types: dict[str, pa.DataType] = {}
        for path in self.paths:
            with reading(path):
                file = self._open(path)
            self.columns = columns_of(file.schema_arrow, config, fields or image_fields(config), path)
            found = {column: file.schema_arrow.field(column).type for column in self.columns.values()}
            types = types or found
            if found != types:
                raise ForgetSetError(
                    f"{path} has columns {_describe(found)}, {self.paths[0]} has {_describe(types)}; expected the same "
                    "columns in all files"
                )
            self.starts.append(self.num_rows)
            self.num_rows += file.metadata.num_rows

    @classmethod
    def takes(cls, given: Any) -> bool:
        """A file, or a folder that holds Parquet files."""
        if not isinstance(given, Location):
            return False
        return bool(given.ending_in(".parquet")) or not (given.is_folder or given.ending_in(*JSON_LINES))

    def _open(self, path: str) -> pq.ParquetFile:
        return pq.ParquetFile(path, filesystem=self.filesystem)

    def _slices(self, start: int, stop: int, columns: list[str]) -> Iterator[pa.Table]:
        for path, first in zip(self.paths, self.starts, strict=True):
            if first >= stop:
                return
            with reading(path):
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
                    raise ForgetSetError(
                        f"{self.name} has fewer rows than when the run began; expected {self.num_rows}; leave the "
                        "files as they are"
                    )
                waiting.append(table)
            table = pa.concat_tables(waiting)
            waiting = [table.slice(stop - start)]
            with reading(self.name):
                yield rows_of(table.slice(0, stop - start), self.columns, self.config, start, self.name)

    def check(self, num_classes: int) -> None:
        """Refuse duplicate ids, and labels outside the model's classes; reads the id and label columns only."""
        wanted = [column for key, column in self.columns.items() if key in (ID, LABEL)]
        with reading(self.name):
            keys = pa.concat_tables(self._slices(0, self.num_rows, wanted))
            check_keys(keys, self.columns, self.config, num_classes, self.name)


def _describe(types: dict[str, pa.DataType]) -> str:
    return ", ".join(f"{name}: {kind}" for name, kind in types.items())
