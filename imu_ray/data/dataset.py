"""Samples in a map-style torch Dataset."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from imu_ray.config import ForgetSetConfig
from imu_ray.data.columns import label_of
from imu_ray.data.source import Rows, Source
from imu_ray.errors import ForgetSetError

_NO_CLASSES = ForgetSetConfig()


class DatasetSource(Source):
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
        labels = np.array(
            [label_of(_scalar(label), _NO_CLASSES, f"row {row} of {self.name}") for row, (_, label) in enumerate(items, start)],
            dtype=np.int64,
        )
        return Rows([str(row) for row in range(start, stop)], labels, [value for value, _ in items])


def _scalar(label: Any) -> Any:
    """A label as a plain number, from a tensor or NumPy scalar."""
    return label.item() if hasattr(label, "item") else label
