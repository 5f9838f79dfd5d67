"""The ascent on Ray Train: the same steps as in process, and through the death of a worker."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import named
from faults import KillingTarget
from samples import pairs

from imu_ray.config import UnlearnConfig
from imu_ray.data import open_source
from imu_ray.distributed import feature_job, train_job
from imu_ray.errors import StageFailedError
from imu_ray.run.directory import RunDirectory
from imu_ray.scopes.head import Head
from imu_ray.tasks.classification import ClassificationTask
from imu_ray.updates.iterative import AscentProblem
from imu_ray.updates.stopping import StopTarget

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
NEVER = StopTarget("forget_accuracy", -1.0, "test")


def ascend(tmp_path, workers, dtype=torch.float32, target=NEVER, retries=2):
    # 75 rows in batches of 20: the last has 15, in microbatches of 6, 6 and 3.
    config = UnlearnConfig().with_overrides(
        {"influence.block_rows": 16, "influence.blocks_per_shard": 1, "resources.workers": workers, "resources.max_retries": retries,
         "ascent.batch_size": 20, "ascent.microbatch_rows": 6, "ascent.stop.max_epochs": 3, "ascent.stop.every_steps": 2}
    )  # fmt: skip
    model = named("fc").to(dtype)
    source = open_source(pairs(75), config.forget_set)
    task = ClassificationTask.for_model(model, source, config.forget_set)
    features = feature_job.extract(source, task, feature_job.share(model), config, "features")
    weights = np.random.default_rng(0).random(75)
    problem = AscentProblem(Head.of(model, "fc"), weights, config.ascent, 0, [target])
    run = RunDirectory(tmp_path / f"run{workers}")
    outcome = train_job.ascend(problem, features, {"test": features}, config.resources, run)
    return outcome, problem.head.matrix_CD, run


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_two_workers_take_the_same_steps_as_one(tmp_path, dtype, tolerance):
    (alone, start, _), (both, *_) = ascend(tmp_path, 1, dtype), ascend(tmp_path, 2, dtype)
    difference = (both.head.matrix_CD - alone.head.matrix_CD).norm()
    assert difference <= tolerance * (alone.head.matrix_CD - start).norm()
    assert both.trajectory[-1]["step"] == alone.trajectory[-1]["step"] == 12


def test_a_worker_is_reached_at_its_nodes_address(monkeypatch):
    monkeypatch.setattr(train_job.ray.util, "get_node_ip_address", lambda: "10.1.2.3")
    monkeypatch.setattr(train_job.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2))
    monkeypatch.setattr(train_job, "_run", lambda arguments, workers: workers)
    worker = train_job._ascend_as_worker({"threads": 1})
    assert (worker.rank, worker.world, worker.address) == (1, 2, "10.1.2.3")


def test_of_several_failures_the_one_that_is_not_about_another_worker_is_told():
    failed = RuntimeError()
    failed.worker_failures = {0: ConnectionError("worker 1 of the ascent ended"), 1: MemoryError("no room")}
    assert "MemoryError: no room" in str(train_job._explain(failed))


def test_a_killed_worker_changes_nothing(tmp_path):
    alone, start, _ = ascend(tmp_path, 1)
    killing = KillingTarget("forget_accuracy", -1.0, "test", folder=str(tmp_path), step=6)
    survived, *_ = ascend(tmp_path, 2, target=killing)
    assert (tmp_path / "step6").exists(), "a worker was killed"
    assert (survived.head.matrix_CD - alone.head.matrix_CD).norm() <= 1e-9 * (alone.head.matrix_CD - start).norm()
    assert [record["step"] for record in survived.trajectory] == [record["step"] for record in alone.trajectory]


def test_a_group_that_fails_too_often_ends_with_its_last_good_state_intact(tmp_path):
    killing = KillingTarget("forget_accuracy", -1.0, "test", folder=str(tmp_path), step=6)
    with pytest.raises(StageFailedError, match="the last good state is kept"):
        ascend(tmp_path, 2, target=killing, retries=0)
    # The worker that was not killed may have passed the check and saved it.
    assert RunDirectory(tmp_path / "run2").load_state().step in (4, 6)
    finished, *_ = ascend(tmp_path, 2)
    alone, start, _ = ascend(tmp_path, 1)
    assert (finished.head.matrix_CD - alone.head.matrix_CD).norm() <= 1e-9 * (alone.head.matrix_CD - start).norm()
