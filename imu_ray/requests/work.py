"""What a queue asks of the library, and the job file that answers."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import imu_ray
from imu_ray.config import UnlearnConfig
from imu_ray.data import find_rows, open_source
from imu_ray.data.ids import IdList
from imu_ray.distributed.session import ray_session
from imu_ray.errors import ConfigError, RequestError
from imu_ray.job import JobConfig
from imu_ray.models.checkpoint import model_hash
from imu_ray.models.spec import ModelSpec
from imu_ray.recipes import resolve_settings
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

    Raises:
        ConfigError: a setting says already which rows are to be forgotten, or is not known.
    """

    def __init__(self, job: JobConfig) -> None:
        for name in ("ids", "where", "size"):
            if getattr(job.forget_set, name) is not None:
                raise ConfigError(
                    f"forget_set.{name} is set; expected null, because the requests say which rows are forgotten"
                )
        self.job, self.spec = job, job.model.spec()
        self.ignore_missing = job.forget_set.missing_ids == "ignore"
        # A request names rows, so that there is nothing that `auto` would have to ask. What is not found is told
        # before a batch begins, which then has all its rows.
        recipe = "samples" if job.recipe == "auto" else job.recipe
        own = {"recipe": recipe, "forget_set": {**job.config.forget_set.to_dict(), "missing_ids": "error"}}
        self.config = UnlearnConfig(**{**job.config.to_dict(), **own})
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
        """Those ids that the data has a row of.

        Raises:
            RequestError: the data has no ids of its own.
        """
        fields = TASKS[self.job.task].fields(self.config.forget_set)
        data = open_source(self.job.forget_set.path, self.config.forget_set, "full data", fields)
        if data.is_numbered:
            raise RequestError(
                f"{data.name} has no id column, and the number of a row is another's once a row is deleted; expected a "
                "column of ids; name it in forget_set.id_column"
            )
        return find_rows(data, IdList.of(ids))

    def plan(self, checkpoint: str | None, ids: Sequence[str]) -> dict[str, Any]:
        """What ``imu_ray.plan`` says."""
        self._start_ray()
        return imu_ray.plan(**self._arguments(checkpoint, tuple(ids)))

    def unlearn(self, checkpoint: str | None, ids_at: str, run_dir: str) -> None:
        """``imu_ray.unlearn``."""
        self._start_ray()
        imu_ray.unlearn(**self._arguments(checkpoint, ids_at), run_dir=run_dir)

    def _model(self, checkpoint: str | None) -> ModelSpec:
        return self.spec if checkpoint is None else dataclasses.replace(self.spec, checkpoint=checkpoint)

    def _arguments(self, checkpoint: str | None, ids: str | tuple[str, ...]) -> dict[str, Any]:
        config = self.config.with_overrides({"forget_set.ids": ids})
        return {**self.job.arguments(), "model": self._model(checkpoint), "config": config}

    def _start_ray(self) -> None:
        if not self._has_ray:  # one for the plan and the run; too many workers are told by the plan, not refused
            self._session.enter_context(ray_session(self.config.with_overrides({"resources.workers": 1}).resources))
            self._has_ray = True
