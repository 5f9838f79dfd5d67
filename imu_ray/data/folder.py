"""Samples as image files in one folder per class."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imu_ray.config import ForgetSetConfig
from imu_ray.data.columns import LABEL, find_names
from imu_ray.data.ids import IdList
from imu_ray.data.labels import check_label, class_of
from imu_ray.data.location import IMAGE_SUFFIXES, Location
from imu_ray.data.market import holds_sightings
from imu_ray.data.source import Fields, Rows, Source, reading
from imu_ray.errors import ForgetSetError


class FolderSource(Source):
    """Images in one folder per class: ``root/class/name.png``; a sample's id is its path below the root."""

    def __init__(self, given: Location, config: ForgetSetConfig, fields: Fields | None = None) -> None:
        if fields is not None and LABEL not in fields:
            raise ForgetSetError(
                f"{given.name} holds images; expected rows with {', '.join(fields.values())}; give a table"
            )
        self.root, self.name = Path(given.path), given.name
        if config.target != "class":
            raise ForgetSetError(
                f"{self.name} holds images in folders by class, with forget_set.target {config.target!r}; expected "
                "rows with a list of numbers each, in Parquet or JSON lines"
            )
        self.paths = given.images()
        self.num_rows = len(self.paths)
        folders = sorted({path.split("/")[0] for path in self.paths if "/" in path})
        loose = [path for path in self.paths if "/" not in path]
        if loose:
            raise ForgetSetError(
                f"{loose[0]} lies directly in {self.root}; expected images in one folder per class; move it into one"
            )
        if config.classes is None and not all(folder.isdecimal() for folder in folders):
            raise ForgetSetError(
                f"the folders of {self.root} are named {', '.join(folders[:5])}; a folder's place in the alphabet need "
                "not be the model's class index; list the model's class names in order under forget_set.classes, or "
                "name the folders by index"
            )
        self.labels = {folder: class_of(folder, config, f"folder {folder!r} of {self.root}") for folder in folders}

    @classmethod
    def takes(cls, given: Any) -> bool:
        """A local folder that holds images, in folders by class."""
        is_folder = isinstance(given, Location) and given.is_local and given.is_folder
        return is_folder and bool(given.ending_in(*IMAGE_SUFFIXES)) and not holds_sightings(given)

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""
        return self.take(np.arange(start, stop))

    def take(self, rows: npt.NDArray[np.int64]) -> Rows:
        """Some rows."""
        paths = [self.paths[row] for row in rows]
        labels = np.array([self.labels[path.split("/")[0]] for path in paths], dtype=np.int64)
        return Rows(paths, labels, [self._bytes(path) for path in paths])

    def find(self, asked: IdList) -> Iterator[tuple[str, int]]:
        """Rows with these ids, which are paths below the root; none is read."""
        return find_names(self.paths, asked)

    def _bytes(self, path: str) -> bytes:
        with reading(str(self.root / path)):
            return (self.root / path).read_bytes()

    def check(self, num_classes: int) -> None:
        """Refuse labels outside the model's classes."""
        for folder, label in self.labels.items():
            check_label(label, num_classes, f"folder {folder!r} of {self.root}")
