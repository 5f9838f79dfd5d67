"""Lists of sample ids in files."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from imu_ray.data.ids import IdList
from imu_ray.data.location import Location
from imu_ray.data.source import reading
from imu_ray.errors import ForgetSetError

ID_COLUMN = "id"
REMEDY = "expected a .parquet or .csv file with a column of ids, or a .txt file with an id on each line"


def read_ids(place: str | Path, column: str | None = None) -> IdList:
    """Ids from a path or URI.

    A ``.parquet`` file has them in the column ``column``, in ``id``, or in its only one; a ``.csv`` file has a first
    line that names ``column`` or ``id``, and its cells are texts as they stand; any other has one on each line.

    Raises:
        ForgetSetError: it cannot be read, is empty, or a row has no id.
    """
    location = Location.open(str(place), "list of ids")
    if location.is_folder:
        raise ForgetSetError(f"the list of ids {place} is a folder; {REMEDY}")
    with reading(f"the list of ids {place}"), location.filesystem.open_input_file(location.path) as file:
        kind = location.path.lower()
        if kind.endswith(".parquet"):
            names = pq.read_schema(file).names
            chosen = names[0] if len(names) == 1 else _column(names, column, place)
            cells = pq.read_table(file, columns=[chosen])[chosen].to_pylist()
        elif kind.endswith(".csv"):
            cells = _of_csv(file.read(), column, place)
        else:
            cells = [line for line in map(str.strip, file.read().decode("utf-8-sig").splitlines()) if line]
    for row, cell in enumerate(cells):
        if cell is None or cell == "":
            raise ForgetSetError(
                f"row {row} of the list of ids {place} has no id; expected one in every row; mend the list"
            )
    if not cells:
        raise ForgetSetError(f"the list of ids {place} is empty; expected at least one id; mend the list")
    return IdList.of(cells)


def _of_csv(content: bytes, column: str | None, place: str | Path) -> list[str]:
    """All cells are texts: 0010 is not the number 10."""
    source = pa.BufferReader(content)
    with csv.open_csv(source) as lines:
        names = lines.schema.names
    chosen = _column(names, column, place)
    texts = csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        include_columns=[chosen],
        strings_can_be_null=True,
        null_values=[""],
    )
    found: list[str] = csv.read_csv(pa.BufferReader(content), convert_options=texts)[chosen].to_pylist()
    return found


def _column(names: list[str], column: str | None, place: str | Path) -> str:
    for name in (column, ID_COLUMN):
        if name is not None and names.count(name) == 1:
            return name
    raise ForgetSetError(
        f"the list of ids {place} has the columns {', '.join(names[:20])}; expected one that is named "
        f"{' or '.join(repr(name) for name in dict.fromkeys((column, ID_COLUMN)) if name)} in its first line; name it "
        "so, or write a .txt file with an id on each line"
    )
