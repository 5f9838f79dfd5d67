"""Samples in a dataset of Hugging Face's ``datasets``, an object or a folder that ``save_to_disk`` wrote."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import fs

from imu_ray.config import ForgetSetConfig
from imu_ray.data.columns import columns_of, image_fields
from imu_ray.data.image_files import ImageFiles
from imu_ray.data.location import Location
from imu_ray.data.source import Fields, reading
from imu_ray.data.table import ArrowSource
from imu_ray.errors import ConfigError, ForgetSetError

PACKAGE = "datasets"
ONE, SEVERAL = "state.json", "dataset_dict.json"  # what marks a saved dataset, and a saved group of them


class HuggingFaceSource(ArrowSource):
    """Rows of a dataset, whose Arrow files are mapped into memory by every process that reads them.

    Features are taken as they are stored: an image is its encoded bytes, or a file that they name.
    """

    def __init__(self, given: Any, config: ForgetSetConfig, fields: Fields | None = None) -> None:
        self.name = given.name if isinstance(given, Location) else "the dataset"
        found = _load(given) if isinstance(given, Location) else given
        if not hasattr(found, "with_format") or isinstance(found, Mapping) or not hasattr(found, "num_rows"):
            parts = f" of {', '.join(map(str, found))}" if isinstance(found, Mapping) else ""
            raise ForgetSetError(
                f"{self.name} is a {type(found).__name__}{parts}; expected one Dataset whose rows can be read "
                "again; take one split of it (dataset['train']), not streamed"
            )
        schema = found.features.arrow_schema
        self.columns = columns_of(schema, config, fields or image_fields(config), self.name)
        self.dataset = found.with_format("arrow")
        self.files = ImageFiles(fs.LocalFileSystem(), "/", anywhere=True)
        self.begin(config, schema, found.num_rows)

    @classmethod
    def takes(cls, given: Any) -> bool:
        """Such an object, or a local folder that holds one."""
        if isinstance(given, Location):
            marks = (f"{given.path}/{name}" in given.files for name in (ONE, SEVERAL))
            return given.is_local and given.is_folder and any(marks)
        return any(kind.__module__.partition(".")[0] == PACKAGE for kind in type(given).__mro__)

    def part(self, rows: slice | npt.NDArray[np.int64], columns: Iterable[str]) -> pa.Table:
        """Some rows of some columns."""
        chosen = self.dataset.select_columns(list(columns))
        found: pa.Table = chosen[rows if isinstance(rows, slice) else rows.tolist()]
        return found


def _load(given: Location) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"{given.name} was saved by Hugging Face's datasets; expected the extra: pip install imu-ray[hf]"
        ) from None
    with reading(given.name):
        return datasets.load_from_disk(given.path)
