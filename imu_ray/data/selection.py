"""Rows of a source that are named, by their ids or by a condition on columns; only they are read."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from imu_ray.config import ForgetSetConfig
from imu_ray.data.id_files import read_ids
from imu_ray.data.ids import IdList
from imu_ray.data.source import Rows, Shard, Source
from imu_ray.errors import ConfigError, ForgetSetError
from imu_ray.run.record import SelectionRecord

SHOWN = 5  # ids in an error


class SelectedSource(Source):
    """The named rows of another source, ascending: to whoever reads it, all there is.

    Attributes:
        source: where the rows are.
        rows: which.
        selection: what was asked for and found.
    """

    def __init__(self, source: Source, rows: npt.NDArray[np.int64], selection: SelectionRecord) -> None:
        self.source, self.rows = source.narrow(rows)
        self.name, self.num_rows, self.selection = source.name, len(rows), selection
        self.row_settings = source.row_settings

    def file_of(self, row: int) -> str:
        """As the source says."""
        return self.source.file_of(int(self.rows[row]))

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop`` of those."""
        return self.source.take(self.rows[start:stop])

    def read_blocks(self, shard: Shard) -> Iterator[Rows]:
        """The blocks of a shard, whose rows are taken at once."""
        rows = self.read(shard.start, shard.stop)
        return (rows.part(start - shard.start, stop - shard.start) for start, stop in shard.blocks())

    def check(self, num_classes: int) -> None:
        """Refuse labels outside the classes; of the other rows nothing is read."""
        self.source.check_rows(self.rows, num_classes)


def select_rows(source: Source, config: ForgetSetConfig) -> Source:
    """The rows that ``forget_set.ids`` or ``forget_set.where`` name, or the source itself without either.

    Raises:
        ConfigError: both are set.
        ForgetSetError: nothing is found, or not all ids are and that was not allowed; the list or the condition cannot
            be read, or fits no column.
    """
    if config.ids is not None and config.where is not None:
        raise ConfigError("forget_set.ids and forget_set.where are both set; expected one of them; leave the other out")
    if config.where is not None:
        rows = source.matching(config.where)
        if not len(rows):
            raise ForgetSetError(
                f"no row of {source.name} meets forget_set.where {config.where!r}; expected one at least; mend the "
                "condition, because a request that matches nothing is not done"
            )
        found = SelectionRecord(rows_searched=source.num_rows, rows_found=len(rows), where=config.where)
        return SelectedSource(source, rows, found)
    if config.ids is None:
        return source
    named = isinstance(config.ids, str | Path)
    asked = read_ids(str(config.ids), config.id_column) if named else IdList.of(config.ids)
    places = find_rows(source, asked)
    rows = np.sort(np.fromiter(places.values(), np.int64, len(places)))
    missing = [one for one in asked.ids if one not in places]
    if missing and (config.missing_ids == "error" or not places):
        raise ForgetSetError(_missing(missing, asked, source, config, bool(places)))
    found = SelectionRecord(
        rows_searched=source.num_rows,
        rows_found=len(rows),
        ids_asked=len(asked.ids),
        ids_doubled=asked.doubles,
        ids_missing=len(missing),
        ids_digest=asked.digest,
    )
    return SelectedSource(source, rows, found)


def find_rows(source: Source, asked: IdList) -> dict[str, int]:
    """Numbers of the rows with these ids, as far as there are such; of columns no other than that of the ids is read.

    Raises:
        ForgetSetError: two rows have one of them.
    """
    found: dict[str, int] = {}
    for sample_id, row in source.find(asked):
        if found.setdefault(sample_id, row) != row:
            raise ForgetSetError(
                f"sample id {sample_id!r} stands in rows {found[sample_id]} and {row} of "
                f"{_files(source, found[sample_id], row)}; expected unique ids; remove the duplicates, or name the id "
                "column in forget_set.id_column"
            )
    return found


def _files(source: Source, *rows: int) -> str:
    return " and ".join(dict.fromkeys(map(source.file_of, rows)))


def _missing(missing: list[str], asked: IdList, source: Source, config: ForgetSetConfig, some: bool) -> str:
    shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
    numbered = ", whose rows are numbered from 0 for want of forget_set.id_column" if source.is_numbered else ""
    listed = f" of {config.ids}" if isinstance(config.ids, str) else ""
    remedy = "mend the list" + (", or set forget_set.missing_ids=ignore to forget the others" if some else "")
    return (
        f"{len(missing)} of {len(asked.ids)} ids{listed} are not in {source.name}{numbered} ({shown}); expected "
        f"{'all of them' if config.missing_ids == 'error' else 'one at least'}; {remedy}"
    )
