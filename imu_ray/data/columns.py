"""Columns of a table as ids, labels and inputs; shared by tables in memory and Parquet files."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imu_ray.config import ForgetSetConfig
from imu_ray.data.source import Rows
from imu_ray.errors import ForgetSetError

Columns = tuple[str, str, str | None]


def columns_of(schema: pa.Schema, config: ForgetSetConfig, name: str) -> Columns:
    """Names of the image, label and id columns; the id is None when rows are numbered."""
    id_column = config.id_column or ("id" if "id" in schema.names else None)
    for key, column in (("image", config.image_column), ("label", config.label_column), ("id", id_column)):
        if column is None:
            continue
        if (count := schema.names.count(column)) != 1:
            raise ForgetSetError(
                f"{name} has {count or 'no'} column{'s' * (count > 1)} {column!r}; it has {', '.join(schema.names)}; "
                f"name the right one in forget_set.{key}_column"
            )
        kind = schema.field(column).type
        if key != "image" and (pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType)):
            expected = "expected one text or whole number in each row"
            raise ForgetSetError(f"column {column!r} of {name} holds {kind}; {expected}")
    return config.image_column, config.label_column, id_column


def rows_of(table: pa.Table, columns: Columns, config: ForgetSetConfig, start: int, name: str) -> Rows:
    """Rows of a table, the first with number ``start``; a row whose label cannot be read is refused by name."""
    image_column, label_column, id_column = columns
    ids = list(map(str, table[id_column].to_pylist() if id_column else range(start, start + len(table))))
    cells = zip(ids, table[label_column].to_pylist(), strict=True)
    labels = [label_of(value, config, f"row {sample_id} of {name}") for sample_id, value in cells]
    return Rows(ids, np.array(labels, dtype=np.int64), [_input(cell) for cell in _cells(table[image_column])])


def _cells(column: pa.ChunkedArray) -> list[Any]:
    if isinstance(column.type, pa.FixedShapeTensorType):
        return [row for chunk in column.chunks for row in chunk.to_numpy_ndarray()]
    return list(column.to_pylist())


def _input(cell: Any) -> Any:
    """Encoded bytes, or numbers as an array; a null stays None and is refused as a bad row where inputs are decoded."""
    if isinstance(cell, dict):
        return cell.get("bytes")
    if cell is None or isinstance(cell, bytes | np.ndarray):
        return cell
    try:
        return np.asarray(cell)
    except ValueError:  # lists of different lengths
        return np.asarray(None)


def label_of(value: Any, config: ForgetSetConfig, where: str) -> int:
    """A label as a class index: a whole number, its digits, or a name listed in ``forget_set.classes``."""
    # The text of a label may be anything when the wrong column is named, so it is not shown.
    if isinstance(value, str) and config.classes is not None:
        if value not in config.classes:
            listed = ", ".join(config.classes)
            raise ForgetSetError(
                f"{where} has a label that is not among forget_set.classes: {listed}; mend it, or the list"
            )
        return config.classes.index(value)
    if isinstance(value, str) and value.isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        shown = repr(value) if isinstance(value, int | float | None) else f"a {type(value).__name__}"
        expected = "expected a whole number of 64 bits, or a name listed in forget_set.classes"
        raise ForgetSetError(f"{where} has label {shown}; {expected}")
    return value


def check_keys(table: pa.Table, columns: Columns, config: ForgetSetConfig, num_classes: int, name: str) -> None:
    """Refuse missing or duplicate ids and labels outside ``0 .. num_classes - 1``; the first offender is named."""
    _, label_column, id_column = columns
    if id_column:
        ids = _plain(table[id_column])
        if ids.null_count:
            missing = f"{ids.null_count} rows of {name} have no {id_column!r}"
            raise ForgetSetError(f"{missing}; expected a unique id in every row")
        if len(pc.unique(ids)) < len(ids):
            repeated, times = Counter(ids.to_pylist()).most_common(1)[0]
            raise ForgetSetError(
                f"sample id {str(repeated)!r} stands {times} times in {name}; expected unique ids; remove the "
                "duplicates, or name the id column in forget_set.id_column"
            )
    labels = _plain(table[label_column])
    for value in pc.unique(labels).to_pylist():
        label = label_of(value, config, f"a row of {name}")
        if not 0 <= label < num_classes:
            row = next(row for row, found in enumerate(labels) if found.as_py() == value)
            sample_id = table[id_column][row].as_py() if id_column else row
            raise ForgetSetError(f"row {str(sample_id)!r} of {name} has label {label}; expected 0 to {num_classes - 1}")


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
