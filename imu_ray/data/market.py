"""Pictures of persons in one folder, named as in Market-1501: ``0002_c1s1_000451_03.jpg`` is person 2, by camera 1."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imu_ray.config import ForgetSetConfig
from imu_ray.data.columns import LABEL, find_names
from imu_ray.data.ids import IdList
from imu_ray.data.location import IMAGE_SUFFIXES, Location
from imu_ray.data.source import Fields, Rows, Source, reading
from imu_ray.errors import ForgetSetError

NAME = re.compile(r"(-1|\d+)_c(\d+)(?:s\d+)?_")
EXAMPLE = "0002_c1s1_000451_03.jpg"


class Sighting(NamedTuple):
    """Who a picture shows, and which camera took it. Person -1 is junk, 0 a distractor: someone without an id."""

    person: str
    camera: int


def sighting_of(sample_id: str) -> Sighting | None:
    """Person and camera from a sample's id, a file name or a path; None where it is no such name."""
    found = NAME.match(sample_id.rpartition("/")[2])
    return None if found is None else Sighting(found[1], int(found[2]))


def persons_of(folder: str | Path) -> tuple[str, ...]:
    """Ids of the persons in a folder, sorted: the order in which persons are numbered for training as a rule.

    Raises:
        ForgetSetError: a name is not of this kind.
    """
    found = read_names(Location.open(str(folder), "folder of persons")).values()
    return tuple(sorted({sighting.person for sighting in found if int(sighting.person) > 0}))


def holds_sightings(given: Any) -> bool:
    """Whether a local folder holds pictures with such names itself, rather than in folders of classes."""
    if not (isinstance(given, Location) and given.is_local and given.is_folder):
        return False
    below = (path.removeprefix(given.path).lstrip("/") for path in given.ending_in(*IMAGE_SUFFIXES))
    return any("/" not in path and sighting_of(path) for path in below)


def read_names(given: Location) -> dict[str, Sighting]:
    """Person and camera of every picture in a folder by its name; ``ForgetSetError`` where a name does not tell."""
    paths = given.images()
    found = {path: sighting for path in paths if "/" not in path and (sighting := sighting_of(path))}
    if len(found) < len(paths):
        wrong = [path for path in paths if path not in found]
        raise ForgetSetError(
            f"{len(wrong)} of {len(paths)} images in {given.name} have no name that tells person and camera "
            f"({', '.join(wrong[:5])}); expected names such as {EXAMPLE}, directly in the folder; rename them, or take "
            "them out"
        )
    return found


class MarketSource(Source):
    """Pictures of persons in one folder; an id is a file's name, a label the person's place in ``forget_set.classes``.

    Query and gallery are read without labels: they hold persons that are no class of the model.
    """

    def __init__(self, given: Location, config: ForgetSetConfig, fields: Fields | None = None) -> None:
        self.root, self.name = Path(given.path), given.name
        sightings = read_names(given)
        self.paths, self.num_rows = list(sightings), len(sightings)
        self.labels = np.zeros(self.num_rows, np.int64)
        if fields is None or LABEL in fields:
            self.labels[:] = [self._label(path, sighting.person, config) for path, sighting in sightings.items()]

    def _label(self, path: str, person: str, config: ForgetSetConfig) -> int:
        if config.classes is None:
            raise ForgetSetError(
                f"{self.name} holds persons by id, and their places among the model's outputs are not known; expected "
                "the ids of all training persons in the order of the outputs under forget_set.classes; "
                "imu_ray.data.persons_of(training folder) lists them in the usual order"
            )
        if person not in config.classes:
            raise ForgetSetError(
                f"{path} in {self.name} shows person {person}, who is not among the {len(config.classes)} of "
                "forget_set.classes; expected training persons; take it out, or give such pictures as "
                "evaluation['query'] or evaluation['gallery'] of task 'reid'"
            )
        return config.classes.index(person)

    @classmethod
    def takes(cls, given: Any) -> bool:
        """A local folder with pictures of such names in it."""
        return holds_sightings(given)

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""
        return self.take(np.arange(start, stop))

    def take(self, rows: npt.NDArray[np.int64]) -> Rows:
        """Some rows."""
        paths = [self.paths[row] for row in rows]
        return Rows(paths, self.labels[rows], [self._bytes(path) for path in paths])

    def find(self, asked: IdList) -> Iterator[tuple[str, int]]:
        """Rows with these ids, which are names of files; none is read."""
        return find_names(self.paths, asked)

    def _bytes(self, path: str) -> bytes:
        with reading(str(self.root / path)):
            return (self.root / path).read_bytes()
