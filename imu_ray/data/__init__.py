"""Where samples come from: Parquet, images in folders, a torch Dataset or an Arrow table, as blocks of rows."""

from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs
from torch.utils.data import Dataset

from imu_ray.config import ForgetSetConfig
from imu_ray.data.dataset import DatasetSource
from imu_ray.data.folder import IMAGE_SUFFIXES, FolderSource
from imu_ray.data.part import PartSource, draw_rows
from imu_ray.data.source import Rows, Shard, Source
from imu_ray.data.table import ParquetSource, TableSource
from imu_ray.errors import ForgetSetError

__all__ = ["PartSource", "Rows", "Shard", "Source", "draw_rows", "open_source"]


def open_source(source: Any, config: ForgetSetConfig, role: str = "forget set") -> Source:
    """A ``Source`` from a path or URI (Parquet file, folder of Parquet files, folder of images), table or Dataset.

    Raises:
        ForgetSetError: nothing is there, it is empty, a column is missing or the kind is not known.
    """
    if isinstance(source, Source):
        found = source
    elif isinstance(source, pa.Table):
        found = TableSource(source, config)
    elif isinstance(source, str | Path):
        found = _open_path(str(source), config, role)
    elif isinstance(source, Dataset):
        found = DatasetSource(source)
    else:
        raise ForgetSetError(f"the {role} is a {type(source).__name__}; expected a path, a pyarrow.Table or a torch Dataset")
    if not found.num_rows:
        raise ForgetSetError(f"the {role} {found.name} is empty; expected at least one sample")
    return found


def _open_path(path: str, config: ForgetSetConfig, role: str) -> Source:
    try:
        filesystem, inner = fs.FileSystem.from_uri(path if "://" in path else str(Path(path).absolute()))
        info = filesystem.get_file_info(inner)
        listing = filesystem.get_file_info(fs.FileSelector(inner, recursive=True)) if info.type == fs.FileType.Directory else [info]
    except (OSError, pa.ArrowException) as error:
        raise ForgetSetError(f"the {role} {path} cannot be opened: {error}") from None
    if info.type == fs.FileType.NotFound:
        raise ForgetSetError(f"the {role} {path} does not exist; expected a Parquet file, or a folder of Parquet files or images")
    files = sorted(entry.path for entry in listing if entry.path.endswith(".parquet"))
    images = [entry.path for entry in listing if entry.path.lower().endswith(IMAGE_SUFFIXES)]
    if files and images:
        raise ForgetSetError(
            f"the {role} {path} holds Parquet files and images ({images[0]}); expected one kind; put them in folders of their own"
        )
    if info.type == fs.FileType.File or files:
        return ParquetSource(filesystem, files or [inner], config, path)
    if isinstance(filesystem, fs.LocalFileSystem):
        return FolderSource(Path(inner), config)
    raise ForgetSetError(f"the {role} {path} holds no .parquet file; image folders are read from local or mounted paths only")
