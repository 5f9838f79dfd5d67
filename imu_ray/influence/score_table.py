"""What is known of each sample of a whole forget set: it lies in temporary files, and is read from there a part at a time."""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imu_ray.errors import StageFailedError
from imu_ray.influence.order_statistics import Column, Parts, quantile
from imu_ray.scopes.features import SCORE_SCHEMA

ROW_GROUP = 65_536
JOINED = 64  # tables that are made one with memory of its own, because each holds the whole message that it came in
INTENSITY_SCHEMA = SCORE_SCHEMA.append(pa.field("outlier", pa.float64())).append(pa.field("intensity", pa.float64()))


@contextmanager
def _on_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StageFailedError(
            f"scores cannot be written to the temporary directory: {error}; make room there, or name another place in TMPDIR"
        ) from error


class ColumnFile:
    """One float64 column in a temporary file, which is gone after the ``with`` block."""

    def __enter__(self) -> "ColumnFile":
        with _on_disk():
            self._file = tempfile.TemporaryFile()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what cannot be written is not wanted any more, and must not hide why
            self._file.close()

    def take(self, part: Column) -> None:
        """The next samples."""
        with _on_disk():
            self._file.write(part.tobytes())

    def parts(self) -> Iterator[Column]:
        """All samples, a part at a time."""
        with _on_disk():
            self._file.seek(0)  # writes what is left to write
        while part := self._file.read(8 * ROW_GROUP):
            yield np.frombuffer(part)


class ScoreTable:
    """Takes the score tables of the shards in order, into a temporary file.

    Attributes:
        label_counts: samples of each label.
        figures: what stands behind the scores (``fit_direction``).
    """

    def __init__(self, figures: Mapping[str, Any]) -> None:
        self.figures = dict(figures)
        self.label_counts: Counter[int] = Counter()
        self._waiting: list[pa.Table] = []
        self._joined: list[pa.Table] = []
        self._held = 0
        with _on_disk():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 -- open as long as the table; it has no name, so that no kill leaves it behind
            # Dictionaries, reading ahead and threads would take memory and save nothing: most values differ, and the file is local.
            self._writer = pq.ParquetWriter(self._file, SCORE_SCHEMA, use_dictionary=False)

    def take(self, table: pa.Table) -> None:
        """The next shard's samples (``SCORE_SCHEMA``)."""
        for count in table["label"].value_counts().to_pylist():
            self.label_counts[count["values"]] += count["counts"]
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
        with _on_disk():
            self._writer.close()
            self._file.flush()
        self._outlier_at = quantile(self.column("gradient_norm"), clip_quantile)
        pa.default_memory_pool().release_unused()
        return self

    def column(self, name: str) -> Parts:
        """``influence``, ``loss`` (cross-entropy) or ``gradient_norm``, ``[N]``, in the parts of ``batches``."""
        return partial(self._column, name)

    def _column(self, name: str) -> Iterator[Column]:
        return (part[name].to_numpy() for part in self._parts([name]))

    def _parts(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        with pq.ParquetFile(self._file, pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=columns, use_threads=False)

    def batches(self, weights: Parts) -> Iterator[pa.Table]:
        """The table with ``outlier`` and the intensities ``[N]``, a part at a time, in order (``INTENSITY_SCHEMA``)."""
        for part, intensity in zip(self._parts(), weights(), strict=True):
            norm = part["gradient_norm"].to_numpy()
            outlier = norm / self._outlier_at if self._outlier_at else np.zeros_like(norm)
            yield part.append_column("outlier", pa.array(outlier)).append_column("intensity", pa.array(intensity))

    def _flush(self) -> None:
        if self._held:
            table = pa.concat_tables([*self._joined, *self._waiting])
            self._joined, self._waiting, self._held = [], [], 0
            with _on_disk():
                self._writer.write_table(table, row_group_size=ROW_GROUP)
