"""What a queue asks of the library, and the job file that answers."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import imu_ray
from imu_ray.config import UnlearnConfig
from imu_ray.data import Source, open_source
from imu_ray.distributed.session import ray_session
from imu_ray.errors import ConfigError
from imu_ray.job import JobConfig
from imu_ray.models.checkpoint import model_hash
from imu_ray.models.spec import ModelSpec
from imu_ray.recipes import resolve_settings
from imu_ray.requests.rows import find_rows, only_rows, read_ids
from imu_ray.tasks import TASKS


class Work(Protocol):
    """What a queue asks of the library. ``checkpoint`` None is the model of the job file."""

    ignore_missing: bool
    identity: str
    """digest of what may not change between the begin of a batch and its end"""

    def model_hash(self, checkpoint: str | None) -> str:
        """Hash of a model's tensors."""

    def find(self, ids: Sequence[str]) -> Collection[str]:
        """Those ids that the data has a row of."""

    def plan(self, checkpoint: str | None, ids: Sequence[str]) -> dict[str, Any]:
        """What it takes to forget them."""

    def unlearn(self, checkpoint: str | None, ids_at: str, run_dir: str) -> None:
        """Forget the rows whose ids a file lists; whatever becomes of it is in ``run_dir``."""


class JobWork:
    """The work of a job file, whose ``forget_set.path`` is the full data; its ``run_dir`` is not used.

    Use it as a context manager: Ray is started when it is first needed, once.

    Args:
        job: the job file.
        ignore_missing: forget the other rows of a request some ids of which the data does not have.

    Raises:
        ConfigError: a setting says already which rows are to be forgotten, or is not known.
    """

    def __init__(self, job: JobConfig, ignore_missing: bool = False) -> None:
        for name in ("size", "ids", "where"):
            if (value := getattr(job.forget_set, name)) is not None:
                raise ConfigError(
                    f"forget_set.{name} is {value!r}; expected null, because the requests say which rows are forgotten"
                )
        self.job, self.spec, self.ignore_missing = job, job.model.spec(), ignore_missing
        settings = job.config
        # A request names rows, so that there is nothing that `auto` would have to ask.
        recipe = "samples" if settings.recipe == "auto" else settings.recipe
        self.config = UnlearnConfig(**{**settings.to_dict(), "recipe": recipe})
        resolve_settings(None, self.config, job.task)
        described = [self.config.identity(), job.task, job.forget_set.path, job.evaluation]
        self.identity = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        self._session = contextlib.ExitStack()
        self._has_ray = False

    def __enter__(self) -> "JobWork":
        return self

    def __exit__(self, *error: object) -> None:
        self._session.close()

    def model_hash(self, checkpoint: str | None) -> str:
        """Hash of a model's tensors."""
        return model_hash(self._model(checkpoint).build())

    def find(self, ids: Sequence[str]) -> Collection[str]:
        """Those ids that the data has a row of."""
        return find_rows(self._data(), ids)

    def plan(self, checkpoint: str | None, ids: Sequence[str]) -> dict[str, Any]:
        """What ``imu_ray.plan`` says."""
        self._start_ray()
        return imu_ray.plan(**self._arguments(checkpoint, ids))

    def unlearn(self, checkpoint: str | None, ids_at: str, run_dir: str) -> None:
        """``imu_ray.unlearn``."""
        self._start_ray()
        imu_ray.unlearn(**self._arguments(checkpoint, read_ids(ids_at)), run_dir=run_dir)

    def _model(self, checkpoint: str | None) -> ModelSpec:
        return self.spec if checkpoint is None else dataclasses.replace(self.spec, checkpoint=checkpoint)

    def _data(self) -> Source:
        fields = TASKS[self.job.task].fields(self.config.forget_set)
        return open_source(self.job.forget_set.path, self.config.forget_set, "full data", fields)

    def _arguments(self, checkpoint: str | None, ids: Collection[str]) -> dict[str, Any]:
        own = {"model": self._model(checkpoint), "forget_set": only_rows(self._data(), ids), "config": self.config}
        return {**self.job.arguments(), **own}

    def _start_ray(self) -> None:
        if not self._has_ray:  # one for the plan and the run; too many workers are told by the plan, not refused
            self._session.enter_context(ray_session(self.config.with_overrides({"resources.workers": 1}).resources))
            self._has_ray = True
