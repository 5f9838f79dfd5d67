"""The record of a run, which ``manifest.json`` holds: settings, fingerprints, hashes, versions, seconds, status."""

import datetime
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from imu_ray.config import UnlearnConfig

PACKAGES = ("imu-ray", "torch", "torchvision", "ray", "pyarrow", "numpy", "safetensors")


class Part(BaseModel):
    """A part of the record; what it holds is checked when it is made."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


class ModelRecord(Part):
    """The model, by hash before and after; where it came from when a spec was given."""

    kind: str
    layers: list[str]
    hash_before: str
    hash_after: str | None = None
    factory: str | None = None
    kwargs: dict[str, Any] | None = None
    checkpoint: str | None = None
    head: str | None = None
    merge_adapter: bool = False
    gradient_checkpointing: bool = False


class SelectionRecord(Part):
    """Rows that were named, by ids or by a condition on columns: what was asked for and found; never an id.

    ``ids_digest`` is the SHA-256 of the ids that were asked for, each once, ascending, with its length before it.
    """

    rows_searched: int
    rows_found: int
    ids_asked: int | None = None
    ids_doubled: int | None = None
    ids_missing: int | None = None
    ids_digest: str | None = None
    where: str | None = None


class SamplesRecord(Part):
    """A sample set: rows given, read and used, and a fingerprint of their content; never the content itself.

    ``in_forget_set`` counts the used rows of an evaluation set whose input, with all columns that are read for it, is
    byte for byte that of a row to forget.
    ``settings`` are those of an evaluation set that differ from ``forget_set``, and the name of a preprocessing that
    was told from the model.
    """

    name: str
    rows_given: int
    rows_read: int
    rows_used: int
    in_forget_set: int = 0
    fingerprint: str
    bad_rows: list[dict[str, str]]
    forward_calls: int
    forward_seconds: float
    feature_bytes: int
    label_counts: dict[int, int] | None = None
    selection: SelectionRecord | None = None
    settings: dict[str, Any] = {}


class CurvatureRecord(Part):
    """The curvature that steered an update, and the rows it was summed over, by set, or of a bundle with its digest.

    ``source`` is what summed them: this library, or kronfluence.
    """

    kind: str
    rows: dict[str, int]
    bundle: str | None = None
    source: str = "imu_ray"


class TargetRecord(Part):
    """When the update was to stop."""

    metric: str
    threshold: float
    reason: str
    tolerance: float
    rising: bool


class AscentRecord(Part):
    """What the update did, and how it ended; without a change of outputs where samples are of no one class."""

    update: str
    recipe: str
    recipe_reason: str
    status: str
    reason: str
    steps: int
    kept_samples: int
    targets: list[TargetRecord]
    parameter_drift: float
    output_change: float | None
    warnings: list[str]


class VerdictRecord(Part):
    """The status word of the run, and what it rests on (``audits.verdict``)."""

    word: str
    reason: str
    checked: list[str]
    not_checked: list[str]
    thresholds: dict[str, float]


class IdsRecord(Part):
    """A fingerprint of the ids to forget that only who has the key can make, and so test.

    HMAC-SHA256 over the sorted HMACs of the single ids, which ``forget_ids.parquet`` holds.
    """

    rows: int
    fingerprint: str


class RunRecord(Part):
    """Everything that is known of a run, filled in while it goes on."""

    status: str = "running"
    stage: str
    created: str
    resumed: list[str] = []
    error: str | None = None
    config: dict[str, Any]
    config_identity: str
    limits: dict[str, int | None]
    seed: int
    model: ModelRecord
    versions: dict[str, str]
    hardware: dict[str, Any]
    seconds: dict[str, float] = {}
    inputs: dict[str, str] = {}
    forget_set: SamplesRecord | None = None
    evaluation: dict[str, SamplesRecord] = {}
    overlaps: list[str] = []  # sentences on evaluation sets that hold rows to forget
    influence: dict[str, Any] | None = None
    curvature: CurvatureRecord | None = None
    ascent: AscentRecord | None = None
    verdict: VerdictRecord | None = None
    data_access: dict[str, list[str]] = {}
    forget_ids: IdsRecord | None = None
    samples_shown: int = 0  # samples to forget that stand in report_with_samples.html
    artifacts: dict[str, str] = {}

    @classmethod
    def begin(cls, stage: str, config: UnlearnConfig, model: ModelRecord, dtype: torch.dtype) -> "RunRecord":
        """The record of a run that begins now, in this environment."""
        return cls(
            stage=stage,
            created=now(),
            config={**config.to_dict(), "forget_set": config.forget_set.described()},
            config_identity=config.identity(),
            limits=config.ascent.stop.limits,
            seed=config.seed,
            model=model,
            versions=versions(),
            hardware={
                "platform": platform.platform(),
                "processor": processor(),
                "cpus": os.cpu_count(),
                "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
                "device": "cuda" if config.resources.gpus_per_worker else "cpu",
                "threads_per_worker": config.resources.cpus_per_worker,
                "dtype": str(dtype).removeprefix("torch."),
            },
        )

    def resume(self, begun: Mapping[str, Any]) -> None:
        """Take over when the run began, and note that it was resumed now."""
        self.resumed = [*begun.get("resumed", []), self.created]
        self.created = begun["created"]

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Time one stage; a second visit adds to the first."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.monotonic() - started, 3)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as ``manifest.json`` holds them."""
        return self.model_dump(mode="json")


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """The version of Python and of each package that figures depend on, in this environment."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """Name of this machine's processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
