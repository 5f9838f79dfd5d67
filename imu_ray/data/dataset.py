"""Samples in a map-style torch Dataset."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, IterableDataset

from imu_ray.config import ForgetSetConfig
from imu_ray.data.columns import LABEL, OPTIONAL, find_numbers, image_fields
from imu_ray.data.ids import IdList
from imu_ray.data.labels import Label, array_of, label_of
from imu_ray.data.source import Fields, Rows, Source, reading
from imu_ray.errors import ForgetSetError

MOST_ROWS = 10**12  # the driver could not list the shards of more


class DatasetSource(Source):
    """A map-style torch Dataset; a sample's id is its index.

    It gives ``(input, label)`` pairs where a sample has a label; otherwise mappings with the columns of the task, or
    the input alone.
    """

    def __init__(self, given: Dataset[Any], config: ForgetSetConfig, fields: Fields | None = None) -> None:
        self.dataset, self.config, self.name, self.is_numbered = given, config, type(given).__name__, True
        self.fields = fields or image_fields(config)
        if isinstance(given, IterableDataset) or not hasattr(given, "__len__"):
            raise ForgetSetError(
                f"{self.name} has no length; expected a map-style Dataset (__len__ and __getitem__), so that a row can "
                "be read again after a fault; wrap it in one"
            )
        with reading(self.name):
            self.num_rows = len(given)
        if self.num_rows > MOST_ROWS:
            raise ForgetSetError(
                f"{self.name} says that it has {self.num_rows} rows; expected at most {MOST_ROWS}; mend its length"
            )

    @classmethod
    def takes(cls, given: Any) -> bool:
        """A Dataset."""
        return isinstance(given, Dataset)

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""
        return self.take(np.arange(start, stop))

    def take(self, rows: npt.NDArray[np.int64]) -> Rows:
        """Some rows."""
        numbers = rows.tolist()
        inputs, labels = zip(*map(self._item, numbers), strict=True)
        ids = list(map(str, numbers))
        return Rows(ids, array_of(labels, lambda place: f"row {ids[place]!r} of {self.name}"), list(inputs))

    def find(self, asked: IdList) -> Iterator[tuple[str, int]]:
        """Rows with these ids, which are their numbers; none is read."""
        return find_numbers(asked, self.num_rows)

    def _item(self, row: int) -> tuple[Any, Label]:
        where = f"row {row} of {self.name}"
        with reading(where):
            item = self.dataset[row]
        if LABEL not in self.fields:
            return self._columns(item, where), 0
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ForgetSetError(
                f"{where} is a {type(item).__name__}; expected an (input, label) pair; mend what it gives"
            )
        label = _scalar(item[1]) if self.config.target == "class" else item[1]
        return item[0], label_of(label, self.config, where)

    def _columns(self, item: Any, where: str) -> Any:
        """The input of a sample without a label."""
        named = isinstance(item, Mapping)
        fields = {
            key: column for key, column in self.fields.items() if key not in OPTIONAL or (named and column in item)
        }
        if named and (missing := set(fields.values()) - item.keys()):
            raise ForgetSetError(
                f"{where} has no {', '.join(sorted(missing))}; expected it among {', '.join(map(str, item))}; name the "
                "right ones in forget_set.<field>_column"
            )
        if not named and len(fields) > 1:
            expected = f"expected a mapping with {', '.join(fields.values())}; mend what it gives"
            raise ForgetSetError(f"{where} is a {type(item).__name__}; {expected}")
        found = {key: item[column] if named else item for key, column in fields.items()}
        return found if len(found) > 1 else next(iter(found.values()))


def _scalar(label: Any) -> Any:
    """A label as a plain number, from a tensor or NumPy scalar."""
    try:
        return label.item() if hasattr(label, "item") else label
    except (ValueError, RuntimeError):  # more than one number
        return label
