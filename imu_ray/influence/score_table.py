"""The scores of a whole forget set: what selection needs in memory, the rest in a file until it is written with the intensities."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from imu_ray.errors import StageFailedError
from imu_ray.influence.features import SCORE_SCHEMA

ROW_GROUP = 65_536
JOINED = 64  # tables that are made one with memory of its own, because each holds the whole message that it came in
INTENSITY_SCHEMA = SCORE_SCHEMA.append(pa.field("outlier", pa.float64())).append(pa.field("intensity", pa.float64()))
Column = npt.NDArray[np.float64]


class ScoreTable:
    """Takes the score tables of the shards in order. Of each sample its influence stays in memory; the rest goes to a temporary file.

    Attributes:
        influence: ``[N]``.
        label_counts: samples of each label.
        figures: what stands behind the scores (``fit_direction``).
    """

    def __init__(self, rows: int, figures: Mapping[str, Any]) -> None:
        self.figures = dict(figures)
        self.influence = np.empty(rows)
        self.label_counts: Counter[int] = Counter()
        self._taken = 0
        self._waiting: list[pa.Table] = []
        self._joined: list[pa.Table] = []
        self._held = 0
        self._folder = tempfile.TemporaryDirectory(prefix="imu-scores-")  # readable by this user alone
        # Dictionaries, reading ahead and threads would take memory and save nothing: most values differ, and the file is local.
        self._writer = pq.ParquetWriter(Path(self._folder.name) / "scores.parquet", SCORE_SCHEMA, use_dictionary=False)

    def _write(self, do: Callable[[], None]) -> None:
        try:
            do()
        except OSError as error:
            raise StageFailedError(
                f"scores cannot be written to {self._folder.name}: {error}; make room there, or name another place in TMPDIR"
            ) from error

    def take(self, table: pa.Table) -> None:
        """The next shard's samples (``SCORE_SCHEMA``)."""
        rows = slice(self._taken, self._taken + len(table))
        self.influence[rows] = table["influence"].to_numpy()
        for count in table["label"].value_counts().to_pylist():
            self.label_counts[count["values"]] += count["counts"]
        self._taken = rows.stop
        self._waiting.append(table)
        self._held += len(table)
        if len(self._waiting) == JOINED:
            self._joined.append(pa.concat_tables(self._waiting).combine_chunks())
            self._waiting = []
        if self._held >= ROW_GROUP:
            self._flush()

    def close(self, clip_quantile: float) -> "ScoreTable":
        """All shards are in. ``outlier`` will be the gradient norm as a multiple of this quantile of the norms."""
        self._flush()
        self._write(self._writer.close)
        self._outlier_at = float(np.quantile(self._read("gradient_norm"), clip_quantile, overwrite_input=True))
        pa.default_memory_pool().release_unused()
        return self

    def loss(self) -> Column:
        """Cross-entropy ``[N]``."""
        return self._read("loss")

    def _read(self, name: str) -> Column:
        values, start = np.empty(len(self.influence)), 0
        for part in self._parts([name]):
            values[start : start + len(part)] = part[name].to_numpy()
            start += len(part)
        return values

    def _parts(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        with pq.ParquetFile(Path(self._folder.name) / "scores.parquet", pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=columns, use_threads=False)

    def batches(self, weights: Column) -> Iterator[pa.Table]:
        """The table with ``outlier`` and the intensities ``[N]``, a part at a time, in order (``INTENSITY_SCHEMA``)."""
        start = 0
        for part in self._parts():
            norm = part["gradient_norm"].to_numpy()
            outlier = norm / self._outlier_at if self._outlier_at else np.zeros_like(norm)
            stop = start + len(part)
            yield part.append_column("outlier", pa.array(outlier)).append_column("intensity", pa.array(weights[start:stop]))
            start = stop

    def _flush(self) -> None:
        if self._held:
            table = pa.concat_tables([*self._joined, *self._waiting])
            self._joined, self._waiting, self._held = [], [], 0
            self._write(lambda: self._writer.write_table(table, row_group_size=ROW_GROUP))
