"""What becomes of the tasks of a stage, and in which order their results come."""

import os
from pathlib import Path

import pytest
import ray

from imu_ray.config import UnlearnConfig
from imu_ray.distributed.tasks import TaskRunner
from imu_ray.errors import ForgetSetError

pytestmark = pytest.mark.usefixtures("ray_cluster")


@ray.remote(max_retries=0)
def read_or_fail(path: str | None) -> str:
    if path is None:
        raise ForgetSetError("this one fails")
    return Path(path).read_text()  # waits for a writer


def run(submit, samples_of=lambda index, result: 1, fetch=True):
    runner = TaskRunner(UnlearnConfig().with_overrides({"resources.workers": 2}))
    return list(runner.run("stage", submit, 2, samples_of, fetch=fetch))


def test_tasks_in_flight_end_by_themselves_when_a_stage_fails(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refs = []

    def submit(index):
        refs.append(read_or_fail.remote([str(tmp_path / "pipe"), None][index]))
        return refs[-1]

    with pytest.raises(ForgetSetError, match="this one fails"):
        run(submit)
    (tmp_path / "pipe").write_text("done")
    assert ray.get(refs[0], timeout=60) == "done"


@pytest.mark.parametrize("fetch", [True, False])
def test_results_come_in_the_order_of_the_shards_though_the_last_ends_first(tmp_path, fetch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("last")

    def samples_of(index, result):
        if index == 1:
            (tmp_path / "pipe").write_text("first")
        return 1

    results = run(lambda index: read_or_fail.remote(str(tmp_path / ["pipe", "file"][index])), samples_of, fetch)
    assert (results if fetch else ray.get(results)) == ["first", "last"]
