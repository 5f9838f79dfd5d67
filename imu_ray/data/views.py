"""Augmented views of a source's rows: which row, and which draw. What a draw makes of a row is the task's."""

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from imu_ray.data.source import Rows, Shard, Source, View


class ViewSource(Source):
    """``views`` views of every row of another source, those of a row together; ids are ``"<id>#<view>"``.

    Attributes:
        source: what the views are of.
        views: of each row.
        transform: a name in ``imu_ray.tasks.transforms.TRANSFORMS``, or ``"package.module:callable"``.
        seed: with a row's place in what the caller gave and the number of the view, it gives the draw.
        stream: draws of another stream are others, whatever the seeds.
    """

    def __init__(self, source: Source, views: int, transform: str, seed: int, stream: str = "") -> None:
        self.source, self.views, self.transform, self.seed, self.stream = source, views, transform, seed, stream
        self.name, self.num_rows = f"views of {source.name}", views * source.num_rows
        self.row_settings = source.row_settings

    @property
    def rows_given(self) -> int:
        """Rows of what the caller gave; places are among them."""
        return self.source.rows_given

    def file_of(self, row: int) -> str:
        """Where the row of a view lies."""
        return self.source.file_of(row // self.views)

    def read(self, start: int, stop: int) -> Rows:
        """Views ``start`` to ``stop``."""
        return next(self.read_blocks(Shard(0, start, stop, stop - start)))

    def read_blocks(self, shard: Shard) -> Iterator[Rows]:
        """The blocks of a shard; each row of the source is read once for all of them."""
        base = Shard(shard.index, *self._rows(shard.start, shard.stop), -(-shard.block_rows // self.views))
        made = map(self._views, self.source.read_blocks(base), base.blocks())
        waiting, first = next(made), base.start * self.views
        for start, stop in shard.blocks():
            while first + len(waiting.ids) < stop:
                waiting = Rows.concatenate([waiting, next(made)])
            yield waiting.part(start - first, stop - first)
            waiting, first = waiting.part(stop - first, len(waiting.ids)), stop
            if waiting.ids and isinstance(image := waiting.inputs[0].input, Image.Image):
                with contextlib.suppress(Exception):  # refused where it is decoded
                    image.load()  # a file that two blocks would read in two threads

    def _rows(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of the source that views belong to."""
        return start // self.views, -(-stop // self.views)

    def _views(self, rows: Rows, place: tuple[int, int]) -> Rows:
        """All views of consecutive rows of the source."""
        ids = [f"{sample_id}#{view}" for sample_id in rows.ids for view in range(self.views)]
        inputs = [
            View(value, self.transform, draw(self.seed, position, view, self.stream))
            for value, position in zip(rows.inputs, self.source.positions(*place).tolist(), strict=True)
            for view in range(self.views)
        ]
        return Rows(ids, np.repeat(rows.labels, self.views, axis=0), inputs)

    def positions(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Places of the rows of views ``start`` to ``stop`` in what the caller gave."""
        first, last = self._rows(start, stop)
        return self.source.positions(first, last)[np.arange(start, stop) // self.views - first]

    def check(self, num_classes: int) -> None:
        """As the source."""
        self.source.check(num_classes)


def draw(seed: int, position: int, view: int, stream: str = "") -> int:
    """63 random bits, a function of its arguments alone."""
    digest = hashlib.blake2b(f"{stream}{seed} {position} {view}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
