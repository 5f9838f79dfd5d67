"""Samples in an Arrow table, or in Parquet files that are read by row range."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from imu_ray.config import ForgetSetConfig
from imu_ray.data.columns import check_keys, columns_of, rows_of
from imu_ray.data.source import Rows, Shard, Source
from imu_ray.errors import ForgetSetError


class TableSource(Source):
    """Rows of an Arrow table in memory."""

    def __init__(self, table: pa.Table, config: ForgetSetConfig, name: str = "the table") -> None:
        self.name, self.config, self.num_rows = name, config, table.num_rows
        self.columns = columns_of(table.schema, config, name)
        self.table = table.select([column for column in self.columns if column])

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""
        return rows_of(self.table.slice(start, stop - start), self.columns, self.config, start, self.name)

    def check(self, num_classes: int) -> None:
        """Refuse duplicate ids, and labels outside the model's classes."""
        check_keys(self.table, self.columns, self.config, num_classes, self.name)


class ParquetSource(Source):
    """Rows of one or more Parquet files, in the order of their names; files are read by row range."""

    def __init__(self, filesystem: fs.FileSystem, paths: Sequence[str], config: ForgetSetConfig, name: str) -> None:
        self.name, self.config, self.filesystem, self.paths = name, config, filesystem, list(paths)
        self.starts, self.num_rows = [], 0
        types: dict[str, pa.DataType] = {}
        for path in self.paths:
            file = self._open(path)
            self.columns = columns_of(file.schema_arrow, config, path)
            found = {column: file.schema_arrow.field(column).type for column in self.columns if column}
            types = types or found
            if found != types:
                raise ForgetSetError(
                    f"{path} has columns {_describe(found)}, {self.paths[0]} has {_describe(types)}; expected the same columns in all files"
                )
            self.starts.append(self.num_rows)
            self.num_rows += file.metadata.num_rows

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(path, filesystem=self.filesystem)
        except (OSError, pa.ArrowException) as error:
            raise ForgetSetError(f"{path} cannot be read as Parquet ({error}); expected a Parquet file; check the path") from None

    def _slices(self, start: int, stop: int, columns: list[str]) -> Iterator[pa.Table]:
        for path, first in zip(self.paths, self.starts, strict=True):
            if first >= stop:
                return
            file = self._open(path)
            if first + file.metadata.num_rows <= start:
                continue
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
        slices = self._slices(ranges[0][0], ranges[-1][1], [column for column in self.columns if column])
        for start, stop in ranges:
            while sum(len(table) for table in waiting) < stop - start:
                table = next(slices, None)
                if table is None:
                    raise ForgetSetError(
                        f"{self.name} has fewer rows than when the run began; expected {self.num_rows}; leave the files as they are"
                    )
                waiting.append(table)
            table = pa.concat_tables(waiting)
            waiting = [table.slice(stop - start)]
            yield rows_of(table.slice(0, stop - start), self.columns, self.config, start, self.name)

    def check(self, num_classes: int) -> None:
        """Refuse duplicate ids, and labels outside the model's classes; reads the id and label columns only."""
        wanted = [column for column in self.columns[1:] if column]
        check_keys(pa.concat_tables(self._slices(0, self.num_rows, wanted)), self.columns, self.config, num_classes, self.name)


def _describe(types: dict[str, pa.DataType]) -> str:
    return ", ".join(f"{name}: {kind}" for name, kind in types.items())
