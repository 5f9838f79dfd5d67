"""The ascent on Ray Train: the same steps as in process, and through the death of a worker."""

import numpy as np
import pytest
from architectures import named
from faults import KillingTarget
from samples import SMALL, pairs, paper

from imu_ray.data import open_source
from imu_ray.distributed import feature_job, train_job
from imu_ray.errors import StageFailedError
from imu_ray.run.directory import RunDirectory
from imu_ray.scopes.head import Head
from imu_ray.tasks.classification import ClassificationTask
from imu_ray.updates.base import UpdateProblem
from imu_ray.updates.stopping import StopTarget

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
NEVER = StopTarget("forget.accuracy", -1.0, "test")


def update(tmp_path, workers, target=NEVER, retries=2):
    # 75 rows in batches of 20: the last has 15, in microbatches of 6, 6 and 3.
    settings = {"ascent.batch_size": 20, "ascent.microbatch_rows": 6, "resources.max_retries": retries}
    settings |= {"resources.workers": workers, "resources.ascent_workers": workers}
    config = paper(SMALL | settings, ascent__stop__max_epochs=3)
    model = named("fc")
    source = open_source(pairs(75), config.forget_set)
    task = ClassificationTask.for_model(model, {"forget": source}, config.forget_set)
    features = feature_job.extract(source, Head.of(model, task), feature_job.share(model), config, "features")
    weights = np.random.default_rng(0).random(75)
    head, run = Head.of(model, task), RunDirectory(tmp_path / f"run{workers}")
    problem = UpdateProblem(weights, config.ascent, 0, [target])
    outcome = train_job.update(problem, head, {"forget": features, "test": features}, config.resources, run)
    return outcome, head.matrix_CD, run


def test_of_several_failures_the_one_that_is_not_about_another_worker_is_told():
    failed = RuntimeError()
    failed.worker_failures = {0: RuntimeError("Connection closed by peer"), 1: MemoryError("no room")}
    assert "MemoryError: no room" in str(train_job._explain(train_job._cause(failed)))


@pytest.mark.long
def test_a_killed_worker_changes_nothing(tmp_path):
    alone, start, _ = update(tmp_path, 1)
    killing = KillingTarget("forget.accuracy", -1.0, "test", folder=str(tmp_path), step=6)
    survived, *_ = update(tmp_path, 2, killing)
    assert (tmp_path / "step6").exists(), "a worker was killed"
    assert (survived.parameters["fc"] - alone.parameters["fc"]).norm() <= 1e-9 * (alone.parameters["fc"] - start).norm()
    assert survived.trajectory[-1]["step"] == 12
    assert [record["step"] for record in survived.trajectory] == [record["step"] for record in alone.trajectory]


@pytest.mark.long
def test_a_group_that_fails_too_often_ends_with_its_last_good_state_intact(tmp_path):
    killing = KillingTarget("forget.accuracy", -1.0, "test", folder=str(tmp_path), step=6)
    with pytest.raises(StageFailedError, match="the last good state is kept"):
        update(tmp_path, 2, killing, retries=0)
    # The worker that was not killed may have passed the check and saved it.
    assert RunDirectory(tmp_path / "run2").load_state().step in (4, 6)
    finished, *_ = update(tmp_path, 2)
    alone, start, _ = update(tmp_path, 1)
    assert (finished.parameters["fc"] - alone.parameters["fc"]).norm() <= 1e-9 * (alone.parameters["fc"] - start).norm()
