"""Rows by id: a list of ids from a file, and where the rows of these ids are in the data."""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from imu_ray.data import PartSource, Source
from imu_ray.data.columns import ID
from imu_ray.data.parquet import ParquetSource
from imu_ray.data.source import reading
from imu_ray.errors import ForgetSetError, RequestError
from imu_ray.run.storage import open_storage

COLUMN = "id"
ROWS_AT_ONCE = 4096


def read_ids(location: str | Path) -> list[str]:
    """Ids of a file, by path or URI: ``.parquet`` or ``.csv`` with a column ``id`` or one column alone, else by line.

    Raises:
        RequestError: it cannot be read, has no such column, or an empty cell.
    """
    try:
        with open_storage(location).fetch("") as path:
            if path is None:
                raise RequestError(f"{location} does not exist; expected a file of ids (.parquet, .csv, or one a line)")
            suffix = Path(str(location).partition("?")[0]).suffix
            if suffix == ".parquet":
                return _column(pq.read_table(path), location)
            if suffix == ".csv":
                return _column(_read_csv(path), location)
            return [line for line in map(str.strip, path.read_text().splitlines()) if line]
    except (OSError, ValueError) as error:  # pyarrow's own are of these kinds
        raise RequestError(
            f"{location} cannot be read ({' '.join(str(error).split())}); expected a file of ids (.parquet, .csv, or "
            "one a line)"
        ) from None


def _read_csv(path: Path) -> pa.Table:
    """All columns as text: 0010 is not the number 10."""
    names = pa.csv.open_csv(path).schema.names
    return pa.csv.read_csv(path, convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())))


def _column(table: pa.Table, location: str | Path) -> list[str]:
    names = table.column_names
    if COLUMN not in names and len(names) != 1:
        raise RequestError(f"{location} has columns {', '.join(names)}; expected {COLUMN!r}, or one column alone")
    ids = table[COLUMN if COLUMN in names else names[0]]
    if ids.null_count:
        raise RequestError(f"{location} has {ids.null_count} empty cells; expected an id in every row")
    return list(map(str, ids.to_pylist()))


def find_rows(source: Source, ids: Iterable[str]) -> dict[str, int]:
    """Numbers of the rows with these ids, as far as there are such; of Parquet the id column alone is read."""
    wanted, found = set(ids), dict[str, int]()
    for start, here in _ids_of(source) if wanted else ():
        found |= {sample_id: start + place for place, sample_id in enumerate(here) if sample_id in wanted}
    return found


def only_rows(source: Source, ids: Collection[str]) -> PartSource:
    """The rows with these ids.

    Raises:
        ForgetSetError: the data has no row of one of them.
    """
    found = find_rows(source, ids)
    if missing := len(set(ids)) - len(found):
        raise ForgetSetError(
            f"{source.name} has no row of {missing} of {len(set(ids))} ids; expected all, as when they were looked up; "
            "leave the data as it is until the requests are answered"
        )
    return PartSource(source, np.sort(np.array(list(found.values()), dtype=np.int64)))


def _ids_of(source: Source) -> Iterator[tuple[int, list[str]]]:
    """The number of a row, and the ids of the rows from there."""
    column = source.columns.get(ID) if isinstance(source, ParquetSource) else None
    if not isinstance(source, ParquetSource) or column is None:
        numbered = isinstance(source, ParquetSource)
        for start in range(0, source.num_rows, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, source.num_rows)
            yield start, list(map(str, range(start, stop))) if numbered else source.read(start, stop).ids
        return
    for path, first in zip(source.paths, source.starts, strict=True):
        with reading(path):
            for batch in pq.ParquetFile(path, filesystem=source.filesystem).iter_batches(columns=[column]):
                yield first, list(map(str, batch[0].to_pylist()))
                first += len(batch)
