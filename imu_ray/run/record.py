"""The record of what was done: settings, data fingerprints, model hashes, versions, hardware, seconds, status."""

import datetime
import hashlib
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from imu_ray.config import UnlearnConfig
from imu_ray.data import Source
from imu_ray.models.checkpoint import model_hash
from imu_ray.scopes.features import ShardReport

PACKAGES = ("imu-ray", "torch", "torchvision", "ray", "pyarrow", "numpy", "safetensors")


def fingerprint(reports: Sequence[ShardReport]) -> str:
    """SHA-256 over the contents of all blocks, in order."""
    return hashlib.sha256(b"".join(report.digests for report in reports)).hexdigest()


def describe_samples(source: Source, reports: Sequence[ShardReport]) -> dict[str, Any]:
    """Name, rows, fingerprint and rows left out of one sample set; no sample content."""
    return {
        "name": source.name,
        "rows_given": source.rows_given,
        "rows_read": source.num_rows,
        "rows_used": sum(report.rows for report in reports),
        "fingerprint": fingerprint(reports),
        "bad_rows": [vars(bad) for report in reports for bad in report.bad_rows],
        "forward_calls": sum(1 for report in reports for size in report.block_sizes if size),
        "forward_seconds": sum(report.forward_seconds for report in reports),
        "feature_bytes": sum(report.feature_bytes for report in reports),
    }


def digest_of(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


class Manifest:
    """Gathers the record while a run goes on; ``values`` is what ``manifest.json`` holds."""

    def __init__(self, stage: str, config: UnlearnConfig, model: nn.Module, head: str) -> None:
        self.values: dict[str, Any] = {
            "status": "running",
            "stage": stage,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "config": config.to_dict(),
            "config_identity": config.identity(),
            "seed": config.seed,
            "model": {"class": type(model).__name__, "head": head, "hash_before": model_hash(model)},
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
            "hardware": {
                "platform": platform.platform(),
                "processor": processor(),
                "cpus": os.cpu_count(),
                "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
                "device": "cuda" if config.resources.gpus_per_worker else "cpu",
                "threads_per_worker": config.resources.cpus_per_worker,
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            },
            "seconds": {},
        }

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage; a second visit adds to the first."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = self.values["seconds"]
            seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - started, 3)


def label_counts(labels: npt.NDArray[np.int64]) -> dict[int, int]:
    """Samples per class, by label."""
    found, counts = np.unique(labels, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


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
