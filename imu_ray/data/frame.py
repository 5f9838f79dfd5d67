"""Samples in a DataFrame, or in a list of pairs or mappings: by their Arrow table."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from torch import Tensor

from imu_ray.config import ForgetSetConfig
from imu_ray.data.labels import array_of, label_of
from imu_ray.data.source import Fields, reading
from imu_ray.data.table import TableSource
from imu_ray.errors import ForgetSetError

STREAM = "__arrow_c_stream__"  # Arrow's PyCapsule interface: pandas, polars, DuckDB and others


class FrameSource(TableSource):
    """Rows of a DataFrame, of whatever library, that gives itself as an Arrow table."""

    def __init__(self, given: Any, config: ForgetSetConfig, fields: Fields | None = None) -> None:
        self.name = f"the {type(given).__name__}"
        with reading(self.name):
            table = pa.table(given)
        super().__init__(table, config, fields)

    @classmethod
    def takes(cls, given: Any) -> bool:
        """What has Arrow's interface for tables, but is none of its own."""
        return hasattr(given, STREAM) and not isinstance(given, pa.Table)


class ListSource(TableSource):
    """A list of ``(input, label)`` pairs, whose ids are their numbers, or of mappings with columns.

    An input is an image's bytes, a PIL image (kept as PNG, which loses nothing), an array or a tensor.
    """

    name = "the list"

    def __init__(self, given: list[Any], config: ForgetSetConfig, fields: Fields | None = None) -> None:
        with reading("the list"):
            table = pa.Table.from_pylist(given) if isinstance(given[0], Mapping) else _of_pairs(given, config)
        super().__init__(table, config, fields)

    @classmethod
    def takes(cls, given: Any) -> bool:
        """A list of pairs or of mappings."""
        return isinstance(given, list) and bool(given) and isinstance(given[0], Mapping | tuple)


def _of_pairs(pairs: list[Any], config: ForgetSetConfig) -> pa.Table:
    for row, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ForgetSetError(
                f"row {row} of the list is a {type(pair).__name__}; expected an (input, label) pair; mend it"
            )
    inputs = [_plain(value) for value, _ in pairs]
    plain = "item" if config.target == "class" else "tolist"
    labels = [getattr(label, plain)() if hasattr(label, plain) else label for _, label in pairs]
    found = [label_of(label, config, f"row {row} of the list") for row, label in enumerate(labels)]
    if config.target != "class":
        labels = array_of(found, "row {} of the list".format).tolist()
    arrays = [value for value in inputs if isinstance(value, np.ndarray)]
    if arrays and len({(value.shape, value.dtype) for value in arrays}) == 1 and len(arrays) == len(inputs):
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(arrays))
    else:
        column = pa.array([value.tolist() if isinstance(value, np.ndarray) else value for value in inputs])
    return pa.table({config.image_column: column, config.label_column: labels})


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, Image.Image):
        content = io.BytesIO()
        value.save(content, format="PNG")
        return content.getvalue()
    return value
