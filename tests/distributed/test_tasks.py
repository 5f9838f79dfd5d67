"""What a worker process does before a task, and what becomes of the tasks of a stage."""

import os
import platform
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray

from imu_ray.config import UnlearnConfig
from imu_ray.distributed import feature_job, tasks
from imu_ray.errors import ForgetSetError
from imu_ray.scopes.features import FeatureShard

pytestmark = pytest.mark.usefixtures("ray_cluster")


def private_mb(shard: FeatureShard | None = None) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


@ray.remote
def given_back() -> float:
    """Megabytes that go back at the beginning of a task, of 128 of which 120 were freed between pieces that are still in use."""
    pieces = [b"x" * 65_536 for _ in range(2048)]
    kept = pieces[::16]
    del pieces
    before = private_mb()
    tasks._trimmed[0] = 0.0  # not a moment ago
    shard = FeatureShard(np.ones((1, 2), np.float32), np.zeros(1, np.int64), pa.array(["0"]), (1,))
    after = feature_job._map._function([ray.put((private_mb, "scores", 1))], shard)
    assert len(kept) == 128
    return before - after


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator gives memory back in its own way")
def test_a_task_gives_back_what_earlier_ones_freed():
    assert ray.get(given_back.remote(), timeout=120) > 60


@ray.remote
def read_or_fail(path: str | None) -> str:
    if path is None:
        raise ForgetSetError("this one fails")
    return Path(path).read_text()  # waits for a writer


def test_tasks_in_flight_end_by_themselves_when_a_stage_fails(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refs = []

    def submit(index):
        refs.append(read_or_fail.options(max_retries=0).remote([str(tmp_path / "pipe"), None][index]))
        return refs[-1]

    runner = tasks.TaskRunner(UnlearnConfig().with_overrides({"resources.workers": 2}))
    with pytest.raises(ForgetSetError, match="this one fails"):
        runner.run("stage", submit, 2, lambda index, result: 1)
    (tmp_path / "pipe").write_text("done")
    assert ray.get(refs[0], timeout=60) == "done"
