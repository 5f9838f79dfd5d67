"""What a run gives back."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn

from imu_ray.errors import ConfigError
from imu_ray.run.directory import INTENSITIES, RunDirectory
from imu_ray.run.record import AscentRecord, RunRecord


@dataclass(frozen=True)
class UnlearnResult:
    """What a run gives back.

    Attributes:
        model: an unlearned copy of the model; the original is not modified.
        run_dir: where the artifacts lie: a path, or the URI as given.
        metrics: every audit's figures, before and after.
        trajectory: a row per check of the update.
        record: what was done.
    """

    model: nn.Module
    run_dir: Path | str
    metrics: dict[str, Any]
    trajectory: pa.Table
    record: RunRecord

    @property
    def status(self) -> str:
        """``reached``, ``already_met``, ``not_reached``, ``stopped_by_guard``; without a target ``epochs_done``."""
        return _ascent_of(self.record).status

    @property
    def reason(self) -> str:
        """Why it ended so."""
        return _ascent_of(self.record).reason

    @property
    def manifest(self) -> dict[str, Any]:
        """The record as ``manifest.json`` holds it."""
        return self.record.to_json()

    @functools.cached_property
    def intensities(self) -> pa.Table:
        """``sample_id, label, loss, influence, gradient_norm, outlier, intensity``, a row per sample of the forget set.

        Read when it is first asked for, because of a large set it takes 60 bytes a sample and more, from the run
        directory, which must be there still.
        """
        return RunDirectory(self.run_dir).read_table(INTENSITIES)


def _ascent_of(record: RunRecord) -> AscentRecord:
    if record.ascent is None:
        raise ConfigError(f"the run of {record.stage} has no update; expected the record of unlearn or ascend")
    return record.ascent
