"""A part of a source: a random draw of its rows, nested in size."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from imu_ray.data.source import Rows, Shard, Source
from imu_ray.errors import ConfigError


def draw_rows(count: int, size: int | float, seed: int) -> npt.NDArray[np.int64]:
    """``size`` rows (or that share) of ``count``, ascending; with one seed a larger draw contains a smaller one.

    Raises:
        ConfigError: there are not so many rows.
    """
    rows = max(1, round(size * count)) if isinstance(size, float) else size
    if rows > count:
        raise ConfigError(f"forget_set.size is {size}; expected at most the {count} rows of the forget set")
    return np.sort(np.random.default_rng(seed).permutation(count)[:rows])


class PartSource(Source):
    """Some rows of another source, ascending."""

    def __init__(self, source: Source, rows: npt.NDArray[np.int64]) -> None:
        self.source, self.rows, self.name, self.num_rows = source, rows, source.name, len(rows)
        self.selection, self.row_settings = source.selection, source.row_settings

    @classmethod
    def at(cls, source: Source, places: npt.NDArray[np.int64]) -> "PartSource":
        """Of a source the rows at some places of what the caller gave, which ``positions`` tell; ascending."""
        return cls(source, np.searchsorted(source.positions(0, source.num_rows), np.sort(places)))

    @property
    def rows_given(self) -> int:
        """Rows of the source."""
        return self.source.rows_given

    def file_of(self, row: int) -> str:
        """As the source says."""
        return self.source.file_of(int(self.rows[row]))

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop`` of the part."""
        return self.source.take(self.rows[start:stop])

    def read_blocks(self, shard: Shard) -> Iterator[Rows]:
        """The blocks of a shard, which is read whole, so that no span of the source is read for two of them."""
        rows = self.read(shard.start, shard.stop)
        for start, stop in shard.blocks():
            yield rows.part(start - shard.start, stop - shard.start)

    def positions(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Places of rows ``start`` to ``stop`` in the source."""
        return self.rows[start:stop]

    def check(self, num_classes: int) -> None:
        """As the source, over all its rows."""
        self.source.check(num_classes)
