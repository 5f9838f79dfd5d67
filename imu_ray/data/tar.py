"""Samples in tar archives, as WebDataset writes them: ``key.jpg`` followed by ``key.cls`` or ``key.json``."""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from imu_ray.config import ForgetSetConfig
from imu_ray.data.columns import LABEL, find_names
from imu_ray.data.ids import IdList
from imu_ray.data.labels import Label, array_of, check_labels, label_of
from imu_ray.data.location import IMAGE_SUFFIXES, TAR, Location
from imu_ray.data.source import Fields, Files, Rows, Source, reading
from imu_ray.errors import ForgetSetError

PARTS = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # key and ending: up to the first dot of the name, and after it
INPUTS = (*IMAGE_SUFFIXES, ".npy")
PICKLES = ("pickle", "pkl", "pyd", "pt", "pth", "joblib")
BLOCK = 512
Members = dict[str, tuple[int, int]]  # ending -> where its content begins, and its bytes


class TarSource(Source):
    """Rows of one or more archives in the order of their names; what is where is found once, by the headers alone.

    An id is the key, or a field of ``key.json``; a label is the text of ``key.cls``, or such a field.
    """

    def __init__(self, given: Location, config: ForgetSetConfig, fields: Fields | None = None) -> None:
        if fields is not None and set(fields) - {"image", LABEL}:
            expected = f"expected rows with {', '.join(fields.values())}; give a table"
            raise ForgetSetError(f"{given.name} holds images; {expected}")
        self.name, self.filesystem, self.config = given.name, given.filesystem, config
        self.has_labels = fields is None or LABEL in fields
        self.paths = given.ending_in(*TAR)
        if packed := [path for path in self.paths if not path.lower().endswith(".tar")]:
            raise ForgetSetError(f"{packed[0]} is compressed, so that no row can be read by itself; unpack it to .tar")
        self.ids: list[str] = []
        labels: list[Label] = []
        places: list[tuple[int, int, int]] = []
        starts: list[int] = []
        for number, path in enumerate(self.paths):
            starts.append(len(labels))
            with reading(path, self.filesystem), self.filesystem.open_input_file(path) as file:
                for key, members in _samples(file, path):
                    input_at = _input_of(members, config, f"sample {key!r} of {path}")
                    sample_id, label = self._keys(file, key, members, config, path)
                    self.ids.append(sample_id)
                    labels.append(label)
                    places.append((number, *input_at))
        self.num_rows = len(self.ids)
        self.files = Files(self.paths, starts)
        self.labels = array_of(labels, self._name_of)
        self.places = np.array(places, dtype=np.int64).reshape(-1, 3)

    @classmethod
    def takes(cls, given: Any) -> bool:
        """An archive, or a folder that holds some."""
        return isinstance(given, Location) and bool(given.ending_in(*TAR))

    def _keys(self, file: Any, key: str, members: Members, config: ForgetSetConfig, path: str) -> tuple[str, Label]:
        """The id and the label of a sample."""
        where = f"sample {key!r} of {path}"
        fields: Any = {}
        if "json" in members and (config.id_column is not None or "cls" not in members):
            try:
                fields = json.loads(_content(file, *members["json"]))
            except ValueError:
                fields = None
            if not isinstance(fields, dict):
                raise ForgetSetError(f"{key}.json of {path} is no JSON object; expected fields of the sample; mend it")
        sample_id = key if config.id_column is None else fields.get(config.id_column)
        if sample_id is None:
            raise ForgetSetError(f"{where} has no {config.id_column!r} in {key}.json; see forget_set.id_column")
        if not self.has_labels:
            return str(sample_id), 0
        if "cls" in members:
            label: Any = _content(file, *members["cls"]).decode(errors="replace").strip()
        elif config.label_column in fields:
            label = fields[config.label_column]
        else:
            raise ForgetSetError(
                f"{where} has no {key}.cls, and no {config.label_column!r} in {key}.json; expected its label in one of "
                "them; see forget_set.label_column"
            )
        return str(sample_id), label_of(label, config, where)

    def file_of(self, row: int) -> str:
        """The archive of a row."""
        return self.files.of(row)

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""
        return self.take(np.arange(start, stop))

    def take(self, rows: npt.NDArray[np.int64]) -> Rows:
        """Some rows, ascending; of the archives no other content is read."""
        inputs: list[Any] = []
        for number in np.unique(self.places[rows, 0]):
            path = self.paths[number]
            with reading(path, self.filesystem), self.filesystem.open_input_file(path) as file:
                here = rows[self.places[rows, 0] == number]
                inputs += [_content(file, start, size) for _, start, size in self.places[here].tolist()]
        return Rows([self.ids[row] for row in rows], self.labels[rows], inputs)

    def find(self, asked: IdList) -> Iterator[tuple[str, int]]:
        """Rows with these ids; none is read."""
        return find_names(self.ids, asked)

    def check(self, num_classes: int) -> None:
        """Refuse duplicate ids, and labels outside the model's classes."""
        if len(set(self.ids)) < self.num_rows:
            repeated = Counter(self.ids).most_common(1)[0][0]
            raise ForgetSetError(
                f"sample id {repeated!r} stands more than once in {self.name}; expected unique ids, and the files of a "
                "sample one after the other; remove the duplicates, or name a field of the JSON in forget_set.id_column"
            )
        self.check_rows(np.arange(self.num_rows), num_classes)

    def check_rows(self, rows: npt.NDArray[np.int64], num_classes: int) -> None:
        """Refuse labels outside the model's classes."""
        check_labels(self.labels[rows], num_classes, self.config, lambda place: self._name_of(int(rows[place])))

    def _name_of(self, row: int) -> str:
        return f"row {self.ids[row]!r} of {self.file_of(row)}"


def _samples(file: Any, path: str) -> Iterator[tuple[str, Members]]:
    """Key and members of each sample: files that follow each other with one key.

    Raises:
        ForgetSetError: a member is no plain file, leads out of the archive or is a pickle; the archive breaks off.
    """
    key, members, end = "", Members(), 0
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            end = member.offset_data + (-(-member.size // BLOCK) * BLOCK if member.isreg() else 0)
            parts = _parts(member, path)
            if parts is None:
                continue
            if parts[0] != key and members:
                yield key, members
                members = {}
            key = parts[0]
            if parts[1] in members:
                raise ForgetSetError(f"{member.name!r} stands twice in {path}; expected each file once; write it anew")
            members[parts[1]] = (member.offset_data, member.size)
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        raise ForgetSetError(
            f"{path} breaks off, or is damaged, {end} bytes from its beginning; expected the end of an archive there; "
            "copy or write it anew"
        )
    if members:
        yield key, members


def _parts(member: tarfile.TarInfo, path: str) -> tuple[str, str] | None:
    """Key and ending of a member's name; None of a folder and of a hidden file."""
    name = member.name.removeprefix("./")
    if name.startswith("/") or ".." in name.split("/"):
        raise ForgetSetError(f"{member.name!r} leads out of {path}; expected names below the archive; write it anew")
    if member.isdir() or name.rpartition("/")[2].startswith("."):
        return None
    if not member.isreg():
        raise ForgetSetError(f"{member.name!r} in {path} is a link or device; expected files alone; write it anew")
    found = PARTS.fullmatch(name)
    if found is None:
        raise ForgetSetError(f"{member.name!r} in {path} has no ending; expected names such as key.jpg; rename it")
    ending = found[2].lower()
    if ending.rpartition(".")[2] in PICKLES:
        raise ForgetSetError(
            f"{member.name!r} in {path} is a pickle, which runs code where it is read; expected images, .npy, .cls and "
            ".json; write the archive without it"
        )
    return found[1], ending


def _input_of(members: Members, config: ForgetSetConfig, where: str) -> tuple[int, int]:
    """Where the input of a sample is: the file that ``image_column`` names by its ending, or the only image."""
    if config.image_column in members:
        return members[config.image_column]
    found = [ending for ending in members if f".{ending}" in INPUTS]
    if len(found) != 1:
        several = f"images {', '.join(found)}" if found else "no image"
        raise ForgetSetError(
            f"{where} has {several} among {', '.join(members)}; expected one; name its ending in "
            "forget_set.image_column"
        )
    return members[found[0]]


def _content(file: Any, start: int, size: int) -> bytes:
    file.seek(start)
    content: bytes = file.read(size)
    if len(content) < size:
        raise OSError(f"it ends {size - len(content)} bytes before a sample does")
    return content
