"""Columns of a table as ids, labels and inputs; shared by tables in memory and Parquet files."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imu_ray.config import ForgetSetConfig
from imu_ray.data.ids import IdList
from imu_ray.data.image_files import ImageFiles
from imu_ray.data.labels import EXPECTED, Labels, check_label, check_labels, holds_lists, label_of, labels_of
from imu_ray.data.source import Fields, Rows
from imu_ray.errors import ForgetSetError

ID, LABEL, IMAGE = "id", "label", "image"
OPTIONAL = ("paraphrased_answer", "perturbed_answer")  # fields that a set may be without


def image_fields(config: ForgetSetConfig) -> Fields:
    """What an image task reads."""
    return {IMAGE: config.image_column, LABEL: config.label_column}


def columns_of(schema: pa.Schema, config: ForgetSetConfig, fields: Fields, name: str) -> Fields:
    """The columns of the fields, and that of the ids where rows are not numbered."""
    id_column = config.id_column or ("id" if "id" in schema.names else None)
    columns = {key: column for key, column in fields.items() if key not in OPTIONAL or column in schema.names}
    columns |= {} if id_column is None else {ID: id_column}
    for key, column in columns.items():
        kind = type_of(schema, column)
        if kind is None:
            count = schema.names.count(column)
            raise ForgetSetError(
                f"{name} has {count or 'no'} column{'s' * (count > 1)} {column!r}; it has {', '.join(schema.names)}; "
                f"name the right one in forget_set.{key}_column"
            )
        nested = pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType)
        if nested and (key == ID or (key == LABEL and config.target == "class")):
            expected = f"expected one text or whole number in each row; name another in forget_set.{key}_column"
            also = "; lists are labels of forget_set.target soft or multi_label" if key == LABEL else ""
            raise ForgetSetError(f"column {column!r} of {name} holds {kind}; {expected}{also}")
        if (
            key == LABEL
            and config.target != "class"
            and not (holds_lists(kind) or isinstance(kind, pa.FixedShapeTensorType))
        ):
            raise ForgetSetError(
                f"column {column!r} of {name} holds {kind}, with forget_set.target {config.target!r}; expected a list "
                f"of numbers in each row: {EXPECTED[config.target]}; name the right column in forget_set.label_column, "
                "or set another target"
            )
    return columns


def type_of(schema: pa.Schema, column: str) -> pa.DataType | None:
    """The type of a column, or of ``column.field`` in a column of structs; None where there is not just one."""
    if schema.names.count(column) == 1:
        return schema.field(column).type
    outer, dot, inner = column.partition(".")
    if not dot or column in schema.names or schema.names.count(outer) != 1:
        return None
    kind = schema.field(outer).type
    return type_of(pa.schema(list(kind)), inner) if pa.types.is_struct(kind) else None


def column_of(table: pa.Table, column: str) -> pa.ChunkedArray:
    """A column, or ``column.field`` of a column of structs."""
    if column in table.column_names:
        return table[column]
    outer, *inner = column.split(".")
    return pc.struct_field(table[outer], inner)


def outer_columns(schema: pa.Schema, columns: Iterable[str]) -> list[str]:
    """The columns of a table that hold these, each once."""
    return list(dict.fromkeys(one if one in schema.names else one.partition(".")[0] for one in columns))


def rows_of(
    table: pa.Table,
    columns: Fields,
    config: ForgetSetConfig,
    numbers: Sequence[int] | npt.NDArray[np.int64],
    file_of: Callable[[int], str],
    files: ImageFiles | None = None,
) -> Rows:
    """Rows of a table, which have ``numbers``; one whose label cannot be read is refused by its file and its id.

    Where there are ``files``, a text in place of an image is the path of one.
    """
    ids = list(map(str, column_of(table, columns[ID]).to_pylist() if ID in columns else numbers))

    def name_of(place: int) -> str:
        return f"row {ids[place]!r} of {file_of(int(numbers[place]))}"

    labels: Labels = np.zeros(len(ids), np.int64)
    if LABEL in columns:
        labels = labels_of(column_of(table, columns[LABEL]), config, name_of)
    parts: dict[str, Iterable[Any]] = {}
    for key, column in columns.items():
        if key not in (ID, LABEL):
            cells_of = _cells(column_of(table, column))
            if files is not None and key == IMAGE:
                cells_of = [files.of_cell(cell, name_of(place)) for place, cell in enumerate(cells_of)]
            parts[key] = map(_input, cells_of)
    inputs = zip(*parts.values(), strict=True)
    found = [value[0] if len(parts) == 1 else dict(zip(parts, value, strict=True)) for value in inputs]
    return Rows(ids, labels, found)


def _cells(column: pa.ChunkedArray) -> list[Any]:
    shape, kind = [], column.type
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    if shape and (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and not column.null_count:
        found = [_stacked(chunk, shape) for chunk in column.chunks]
        if all(part is not None for part in found):
            return [row for part in found if part is not None for row in part]
    if isinstance(column.type, pa.FixedShapeTensorType):
        return [row for chunk in column.chunks for row in chunk.to_numpy_ndarray()]
    return list(column.to_pylist())


def _stacked(lists: pa.Array, shape: list[int]) -> npt.NDArray[Any] | None:
    """Lists of fixed sizes as one array ``[rows, *shape]``; None where a number is missing."""
    rows = len(lists)
    for _ in shape:
        lists = lists.flatten()
    complete = not lists.null_count and len(lists) == rows * math.prod(shape)
    return lists.to_numpy(zero_copy_only=False).reshape(rows, *shape) if complete else None


def _input(cell: Any) -> Any:
    """Encoded bytes, text, or numbers as an array.

    A null stays None and is refused as a bad row where inputs are decoded.
    """
    if isinstance(cell, dict):
        return cell.get("bytes")
    if cell is None or isinstance(cell, bytes | str | np.ndarray):
        return cell
    if isinstance(cell, list) and cell and isinstance(cell[0], dict | str):  # turns of a conversation, several texts
        return cell
    try:
        return np.asarray(cell)
    except ValueError:  # lists of different lengths
        return np.asarray(None)


def check_keys(
    table: pa.Table,
    columns: Fields,
    config: ForgetSetConfig,
    num_classes: int,
    numbers: Sequence[int] | npt.NDArray[np.int64],
    file_of: Callable[[int], str],
) -> None:
    """Refuse missing or duplicate ids and labels outside ``0 .. num_classes - 1``; the first offender is named.

    Args:
        table: with the columns of ids and labels.
        columns: by field.
        config: says what a label may be.
        num_classes: outputs of the model.
        numbers: of the rows.
        file_of: where the row of a number lies.
    """
    ids = _plain(column_of(table, columns[ID])) if ID in columns else None
    if ids is not None:
        if ids.null_count:
            row = int(numbers[int(np.flatnonzero(ids.is_null().to_numpy())[0])])
            raise ForgetSetError(
                f"row {row} of {file_of(row)} has no {columns[ID]!r}, as {ids.null_count} of {len(ids)} rows; expected "
                "a unique id in every row; mend it, or name another column in forget_set.id_column"
            )
        if len(pc.unique(ids)) < len(ids):
            cells = ids.to_pylist()
            repeated, times = Counter(cells).most_common(1)[0]
            rows = (int(numbers[place]) for place, cell in enumerate(cells) if cell == repeated)
            files = " and ".join(dict.fromkeys(map(file_of, rows)))
            raise ForgetSetError(
                f"sample id {str(repeated)!r} stands {times} times in {files}; expected unique ids; remove the "
                "duplicates, or name the id column in forget_set.id_column"
            )
    if LABEL not in columns:
        return
    labels = _plain(column_of(table, columns[LABEL]))

    def name_of(place: int) -> str:
        row = int(numbers[place])
        return f"row {str(row if ids is None else ids[place].as_py())!r} of {file_of(row)}"

    if config.target != "class":
        check_labels(labels_of(labels, config, name_of), num_classes, config, name_of)
        return

    def first_with(value: pa.Scalar) -> str:
        found = pc.index_in(labels, value_set=pa.array([value.as_py()], labels.type))
        return name_of(int(np.flatnonzero(found.is_valid().to_numpy())[0]))

    for value in sorted(pc.unique(labels), key=lambda value: value.is_valid):  # a missing one makes numbers of others
        where = functools.partial(first_with, value)
        check_label(label_of(value.as_py(), config, where), num_classes, where)


def find_cells(column: pa.ChunkedArray, asked: IdList) -> Iterator[tuple[str, int]]:
    """Ids of a column that were asked for, and where they stand in it."""
    column = _plain(column)
    if not (pa.types.is_integer(column.type) or is_text(column.type)):
        column = pa.chunked_array([pa.array(map(str, column.to_pylist()), pa.string())])
    texts = column.cast(pa.large_string())
    places = np.flatnonzero(pc.is_in(texts, value_set=pa.array(asked.ids, pa.large_string())).to_numpy())
    yield from zip(texts.take(pa.array(places)).to_pylist(), places.tolist(), strict=True)


def find_numbers(asked: IdList, count: int) -> Iterator[tuple[str, int]]:
    """Of rows that are numbered, those whose number was asked for."""
    yield from ((str(number), number) for number in asked.numbers if 0 <= number < count)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def find_names(names: Sequence[str], asked: IdList) -> Iterator[tuple[str, int]]:
    """Of rows whose ids are in memory, those that were asked for."""
    wanted = frozenset(asked.ids)
    yield from ((name, row) for row, name in enumerate(names) if name in wanted)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
