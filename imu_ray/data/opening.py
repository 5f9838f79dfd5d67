"""Which kind of source reads what was given."""

import copy
from pathlib import Path
from typing import Any

from imu_ray.config import ForgetSetConfig
from imu_ray.data.dataset import DatasetSource
from imu_ray.data.folder import FolderSource
from imu_ray.data.frame import FrameSource, ListSource
from imu_ray.data.hugging_face import HuggingFaceSource
from imu_ray.data.jsonl import JsonLinesSource
from imu_ray.data.location import Location
from imu_ray.data.market import MarketSource
from imu_ray.data.parquet import ParquetSource
from imu_ray.data.source import Fields, Source
from imu_ray.data.table import TableSource
from imu_ray.data.tar import TarSource
from imu_ray.errors import ForgetSetError

# Every kind of source; the one that takes what was given reads it. That of ray.data is added by ``distributed``.
SOURCES: list[type[Source]] = [
    TableSource,
    FrameSource,
    ListSource,
    HuggingFaceSource,
    DatasetSource,
    ParquetSource,
    JsonLinesSource,
    FolderSource,
    MarketSource,
    TarSource,
]


def open_source(given: Any, config: ForgetSetConfig, role: str = "forget set", fields: Fields | None = None) -> Source:
    """A ``Source`` from a path or URI (Parquet or JSON lines, a file or a folder; folder of images), table or Dataset.

    ``fields`` are those that the task reads; None: an image and its label.

    Raises:
        ForgetSetError: nothing is there, it is empty, a column is missing or the kind is not known.
    """
    source = copy.copy(given) if isinstance(given, Source) else _open(given, config, role, fields)
    source.row_settings = source.row_settings or config  # of one that was opened before, its own
    if not source.num_rows:
        raise ForgetSetError(f"the {role} {source.name} is empty; expected at least one sample; give others")
    return source


def _open(given: Any, config: ForgetSetConfig, role: str, fields: Fields | None) -> Source:
    place = Location.open(str(given), role) if isinstance(given, str | Path) else None
    kinds = [kind for kind in SOURCES if kind.takes(place or given)]
    if len(kinds) == 1:
        return kinds[0](place or given, config, fields)
    if place is None:
        raise ForgetSetError(
            f"the {role} is a {type(given).__name__}; expected a path, a pyarrow.Table, a DataFrame, "
            "a Dataset of torch, ray.data or Hugging Face, or a list of pairs; give one of these"
        )
    found = (
        f"files of several kinds ({', '.join(kind.__name__ for kind in kinds)})" if kinds else "no file that is read"
    )
    raise ForgetSetError(
        f"the {role} {given} holds {found}; expected Parquet files, JSON lines (.jsonl), tar archives, or (on a "
        "local or mounted path) images in one folder per class, or a saved dataset of Hugging Face's; put each kind in "
        "a folder of its own"
    )
