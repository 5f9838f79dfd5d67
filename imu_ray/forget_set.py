"""Where samples come from: Parquet, images in folders, a torch Dataset or an Arrow table, as blocks of rows.

A source is a small picklable description (a table or Dataset held in memory travels to the workers once), and a shard is a
range of its rows, read inside the task that needs it; any task can therefore run again anywhere.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from imu_ray.config import ForgetSetConfig
from imu_ray.errors import ForgetSetError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Rows:
    """Consecutive samples as they are stored: ids, labels ``[B]`` int64 and raw inputs (encoded images, arrays or tensors)."""

    ids: list[str]
    labels: npt.NDArray[np.int64]
    inputs: list[Any]

    def digest(self) -> str:
        """SHA-256 of ids, labels and inputs: the same content gives the same digest whatever file it lies in."""
        seen = hashlib.sha256()
        for sample_id, label, value in zip(self.ids, self.labels.tolist(), self.inputs, strict=True):
            content = value if isinstance(value, bytes) else np.ascontiguousarray(_plain(value)).tobytes()
            seen.update(f"{len(sample_id)}:{sample_id}{label}:{len(content)}:".encode())
            seen.update(content)
        return seen.hexdigest()


def _plain(value: Any) -> npt.NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


@dataclass(frozen=True)
class Shard:
    """An aligned run of blocks: rows ``start`` to ``stop`` of the source."""

    index: int
    start: int
    stop: int
    block_rows: int

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Row range of each block."""
        for start in range(self.start, self.stop, self.block_rows):
            yield start, min(start + self.block_rows, self.stop)


class ForgetSet(ABC):
    """Samples to forget, or an evaluation set; ``num_rows`` and ``read`` are all that a new source needs."""

    name: str
    num_rows: int

    @abstractmethod
    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""

    def check(self, num_classes: int) -> None:
        """Refuse duplicate ids and labels outside ``0 .. num_classes - 1`` as far as that needs no input to be read."""

    def shards(self, block_rows: int, blocks_per_shard: int) -> list[Shard]:
        """Cut into aligned shards of ``blocks_per_shard`` blocks; the last may be shorter."""
        step = block_rows * blocks_per_shard
        starts = range(0, self.num_rows, step)
        return [Shard(i, start, min(start + step, self.num_rows), block_rows) for i, start in enumerate(starts)]


class TableForgetSet(ForgetSet):
    """Rows of an Arrow table in memory."""

    def __init__(self, table: pa.Table, config: ForgetSetConfig, name: str = "the table") -> None:
        self.name, self.config, self.num_rows = name, config, table.num_rows
        self.columns = _columns(table.schema, config, name)
        self.table = table.select([column for column in self.columns if column])

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""
        return _rows(self.table.slice(start, stop - start), self.columns, self.config, start, self.name)

    def check(self, num_classes: int) -> None:
        """Refuse duplicate ids, and labels outside the model's classes."""
        _check_keys(self.table, self.columns, self.config, num_classes, self.name)


class ParquetForgetSet(ForgetSet):
    """Rows of one or more Parquet files, in the order of their names; files are read by row range."""

    def __init__(self, filesystem: fs.FileSystem, paths: Sequence[str], config: ForgetSetConfig, name: str) -> None:
        self.name, self.config, self.filesystem, self.paths = name, config, filesystem, list(paths)
        self.starts, self.num_rows = [], 0
        for path in self.paths:
            file = self._open(path)
            self.columns = _columns(file.schema_arrow, config, path)
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
                        low, high = max(start - first, 0), min(stop - first, len(batch))
                        if low < high:
                            yield pa.Table.from_batches([batch.slice(low, high - low)])
                        first += len(batch)
                else:
                    first += size

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""
        parts = list(self._slices(start, stop, [column for column in self.columns if column]))
        return _rows(pa.concat_tables(parts), self.columns, self.config, start, self.name)

    def check(self, num_classes: int) -> None:
        """Refuse duplicate ids, and labels outside the model's classes; reads the id and label columns only."""
        wanted = [column for column in self.columns[1:] if column]
        _check_keys(pa.concat_tables(self._slices(0, self.num_rows, wanted)), self.columns, self.config, num_classes, self.name)


class FolderForgetSet(ForgetSet):
    """Images in one folder per class: ``root/class/name.png``; a sample's id is its path below the root."""

    def __init__(self, root: Path, config: ForgetSetConfig) -> None:
        self.root, self.name = root, str(root)
        self.paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        self.num_rows = len(self.paths)
        folders = sorted({path.split("/")[0] for path in self.paths if "/" in path})
        loose = [path for path in self.paths if "/" not in path]
        if loose:
            raise ForgetSetError(f"{loose[0]} lies directly in {root}; expected images in one folder per class")
        if config.classes is None and not all(folder.isdecimal() for folder in folders):
            raise ForgetSetError(
                f"the folders of {root} are named {', '.join(folders[:5])}; a folder's place in the alphabet need not be the "
                "model's class index; list the model's class names in order under forget_set.classes, or name the folders by index"
            )
        self.label_of = {folder: _label(folder, config, f"folder {folder!r} of {root}") for folder in folders}

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""
        paths = self.paths[start:stop]
        labels = np.array([self.label_of[path.split("/")[0]] for path in paths], dtype=np.int64)
        return Rows(paths, labels, [(self.root / path).read_bytes() for path in paths])

    def check(self, num_classes: int) -> None:
        """Refuse labels outside the model's classes."""
        for folder, label in self.label_of.items():
            if not 0 <= label < num_classes:
                raise ForgetSetError(f"folder {folder!r} of {self.root} means label {label}; expected 0 to {num_classes - 1}")


class DatasetForgetSet(ForgetSet):
    """A map-style torch Dataset of ``(input, label)`` pairs; a sample's id is its index."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ForgetSetError(
                f"{type(dataset).__name__} has no length; expected a map-style Dataset (__len__ and __getitem__), so that a row "
                "can be read again after a fault"
            )
        self.dataset, self.num_rows, self.name = dataset, len(dataset), type(dataset).__name__

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""
        items = [self.dataset[row] for row in range(start, stop)]
        for row, item in enumerate(items, start):
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise ForgetSetError(f"row {row} of {self.name} is a {type(item).__name__}; expected an (input, label) pair")
        labels = np.array([int(label) for _, label in items], dtype=np.int64)
        return Rows([str(row) for row in range(start, stop)], labels, [value for value, _ in items])


def open_forget_set(source: Any, config: ForgetSetConfig, role: str = "forget set") -> ForgetSet:
    """A ``ForgetSet`` from a path or URI (Parquet file, folder of Parquet files, folder of images), table or Dataset.

    Raises:
        ForgetSetError: nothing is there, it is empty, a column is missing or the kind is not known.
    """
    if isinstance(source, ForgetSet):
        found = source
    elif isinstance(source, pa.Table):
        found = TableForgetSet(source, config)
    elif isinstance(source, str | Path):
        found = _open_path(str(source), config, role)
    elif isinstance(source, Dataset):
        found = DatasetForgetSet(source)
    else:
        raise ForgetSetError(f"the {role} is a {type(source).__name__}; expected a path, a pyarrow.Table or a torch Dataset")
    if not found.num_rows:
        raise ForgetSetError(f"the {role} {found.name} is empty; expected at least one sample")
    return found


def _open_path(path: str, config: ForgetSetConfig, role: str) -> ForgetSet:
    try:
        filesystem, inner = fs.FileSystem.from_uri(path if "://" in path else str(Path(path).absolute()))
        info = filesystem.get_file_info(inner)
        listing = filesystem.get_file_info(fs.FileSelector(inner, recursive=True)) if info.type == fs.FileType.Directory else [info]
    except (OSError, pa.ArrowException) as error:
        raise ForgetSetError(f"the {role} {path} cannot be opened: {error}") from None
    if info.type == fs.FileType.NotFound:
        raise ForgetSetError(f"the {role} {path} does not exist; expected a Parquet file, or a folder of Parquet files or images")
    files = sorted(entry.path for entry in listing if entry.path.endswith(".parquet"))
    if info.type == fs.FileType.File or files:
        return ParquetForgetSet(filesystem, files or [inner], config, path)
    if isinstance(filesystem, fs.LocalFileSystem):
        return FolderForgetSet(Path(inner), config)
    raise ForgetSetError(f"the {role} {path} holds no .parquet file; image folders are read from local or mounted paths only")


def _columns(schema: pa.Schema, config: ForgetSetConfig, name: str) -> tuple[str, str, str | None]:
    """Names of the image, label and id columns; the id is None when rows are numbered."""
    id_column = config.id_column or ("id" if "id" in schema.names else None)
    for key, column in (("image", config.image_column), ("label", config.label_column), ("id", id_column)):
        if column is not None and column not in schema.names:
            raise ForgetSetError(
                f"{name} has no column {column!r}; it has {', '.join(schema.names)}; name the right one in forget_set.{key}_column"
            )
    return config.image_column, config.label_column, id_column


def _rows(table: pa.Table, columns: tuple[str, str, str | None], config: ForgetSetConfig, start: int, name: str) -> Rows:
    image_column, label_column, id_column = columns
    ids = [str(value) for value in table[id_column].to_pylist()] if id_column else [str(start + i) for i in range(len(table))]
    labels = [
        _label(value, config, f"row {sample_id} of {name}") for sample_id, value in zip(ids, table[label_column].to_pylist(), strict=True)
    ]
    return Rows(ids, np.array(labels, dtype=np.int64), [_input(cell) for cell in _cells(table[image_column])])


def _cells(column: pa.ChunkedArray) -> list[Any]:
    if isinstance(column.type, pa.FixedShapeTensorType):
        return [row for chunk in column.chunks for row in chunk.to_numpy_ndarray()]
    return list(column.to_pylist())


def _input(cell: Any) -> Any:
    """Encoded bytes, or numbers as an array; a null stays None and is refused as a bad row where inputs are decoded."""
    if isinstance(cell, dict):
        return cell.get("bytes")
    return cell if cell is None or isinstance(cell, bytes | np.ndarray) else np.asarray(cell)


def _label(value: Any, config: ForgetSetConfig, where: str) -> int:
    if isinstance(value, str) and config.classes is not None:
        if value not in config.classes:
            raise ForgetSetError(f"{where} has label {value!r}; expected one of forget_set.classes: {', '.join(config.classes)}")
        return config.classes.index(value)
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ForgetSetError(f"{where} has label {value!r}; expected a whole number, or a name listed in forget_set.classes")
    return value


def _check_keys(table: pa.Table, columns: tuple[str, str, str | None], config: ForgetSetConfig, num_classes: int, name: str) -> None:
    _, label_column, id_column = columns
    if id_column:
        ids = table[id_column]
        if ids.null_count:
            raise ForgetSetError(f"{ids.null_count} rows of {name} have no {id_column!r}; expected a unique id in every row")
        if pc.count_distinct(ids).as_py() < len(ids):
            repeated, times = Counter(ids.to_pylist()).most_common(1)[0]
            raise ForgetSetError(
                f"sample id {str(repeated)!r} stands {times} times in {name}; expected unique ids; remove the duplicates, or name "
                "the id column in forget_set.id_column"
            )
    for value in pc.unique(table[label_column]).to_pylist():
        label = _label(value, config, f"a row of {name}")
        if not 0 <= label < num_classes:
            row = pc.index(table[label_column], value).as_py()
            sample_id = table[id_column][row].as_py() if id_column else row
            raise ForgetSetError(f"row {str(sample_id)!r} of {name} has label {label}; expected 0 to {num_classes - 1}")
