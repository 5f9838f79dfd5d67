"""Samples as JSON lines: a file, or a folder of files in the order of their names, held in memory as one table."""

import posixpath
from typing import Any

import pyarrow as pa
import pyarrow.json as pj

from imu_ray.config import ForgetSetConfig
from imu_ray.data.hugging_face import HuggingFaceSource
from imu_ray.data.image_files import ImageFiles
from imu_ray.data.location import JSON_LINES, Location
from imu_ray.data.source import Fields, Files, reading
from imu_ray.data.table import TableSource


class JsonLinesSource(TableSource):
    """An object on each line, with the columns as keys; other keys are left alone.

    An image is the path of a file below the folder, ``{"bytes": ...}`` or ``data:...`` in base64, or nested numbers.
    """

    def __init__(self, given: Location, config: ForgetSetConfig, fields: Fields | None = None) -> None:
        self.name = given.name
        tables: list[pa.Table] = []
        paths, starts = given.ending_in(*JSON_LINES), []
        for path in paths:
            starts.append(sum(map(len, tables)))
            with reading(path, given.filesystem), given.filesystem.open_input_stream(path) as stream:
                tables.append(pj.read_json(stream))
        with reading(self.name):
            table = pa.concat_tables(tables, promote_options="permissive")
        super().__init__(table, config, fields)
        self.parts = Files(paths, starts)
        folder = given.path if given.is_folder else posixpath.dirname(given.path)
        self.files = ImageFiles(given.filesystem, folder)

    @classmethod
    def takes(cls, given: Any) -> bool:
        """A file of that name, or a folder that holds some."""
        return isinstance(given, Location) and bool(given.ending_in(*JSON_LINES)) and not HuggingFaceSource.takes(given)
