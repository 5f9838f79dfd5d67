"""What records: the record of a run while it goes on, and how it ended."""

import contextlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from imu_ray.errors import StageFailedError, is_refusal
from imu_ray.events import event
from imu_ray.run.directory import MANIFEST, MODEL, MODEL_FOLDER, RunDirectory
from imu_ray.run.record import RunRecord


class Recorder:
    """Keeps the record of a run, and writes it to the run directory once there is something to record.

    Args:
        record: what is known at the start.
        run: where it is written.
        write: whether anything is written at all.
    """

    def __init__(self, record: RunRecord, run: RunDirectory, write: bool) -> None:
        self.record, self.run, self.write = record, run, write
        self._begun = False

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Record how the run ended when it did not end well."""
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            self.record.status = "interrupted" if interrupted else "failed"
            self.record.error = type(error).__name__
            with contextlib.suppress(StageFailedError, OSError):  # the error that is on its way says what is wrong
                if is_refusal(error) and self._may_withdraw():
                    self.run.withdraw()  # the corrected call finds the directory as this one did
                else:
                    self._save()
            event(f"run {self.record.status}", level=logging.WARNING, error=self.record.error)
            raise

    def _may_withdraw(self) -> bool:
        """Whether all that is in the run directory is of this call, and nothing of an update is among it."""
        ours = self.write and self._begun and not self.record.resumed
        return ours and not {"state", MODEL, MODEL_FOLDER} & set(self.run.storage.entries())

    def begin(self) -> None:
        """Write the record from now on: a run that fails before leaves nothing behind."""
        self._begun = True
        self._save()

    def complete(self) -> None:
        """Close the record of a run that ended well."""
        self.record.status, self._begun = "complete", True
        if self.write:
            self.record.artifacts = self.run.digests()
        self._save()
        if self.write:
            self.run.seal()
        seconds = sum(self.record.seconds.values())
        ascent = self.record.ascent
        ended = (ascent.status, ascent.reason) if ascent else (None, None)
        run_dir = str(self.run.location) if self.write else None
        event("run complete", run_dir=run_dir, seconds=seconds, status=ended[0], reason=ended[1])

    def _save(self) -> None:
        if self.write and self._begun:
            self.run.write_json(MANIFEST, self.record.to_json())
