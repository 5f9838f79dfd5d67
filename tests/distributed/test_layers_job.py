"""Updates of layers through any number of workers, the death of each, and that of the driver (which this file is, as a script)."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import ray
import torch
from architectures import Residual, lively
from faults import KillBefore, KillingPairs, KillingTarget
from samples import pairs, tensors

from imu_ray import UnlearnConfig, pipeline, unlearn
from imu_ray.distributed import factor_job, score_job, task_scope, train_job
from imu_ray.influence.curvature import LAYER_CURVATURES
from imu_ray.inputs import Inputs
from imu_ray.run.directory import RunDirectory
from imu_ray.scopes.base import norm
from imu_ray.updates.base import UpdateProblem
from imu_ray.updates.stopping import StopTarget

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
NEVER = StopTarget("forget.accuracy", -1.0, "test")
SETTINGS = {
    "ascent.scope": "last:2", "ascent.views": 2, "ascent.objective": "npo", "audit.report": False,
    "influence.block_rows": 8, "influence.blocks_per_shard": 2, "resources.workers": 2,
    # Four steps an epoch, the last of 15 rows; 30 views in microbatches of 14, 14 and 2.
    "ascent.batch_size": 20, "ascent.microbatch_rows": 14, "ascent.stop.max_epochs": 5, "ascent.stop.every_steps": 10,
}  # fmt: skip


def config(**more):
    return UnlearnConfig.from_recipe("samples").with_overrides(SETTINGS | more)


@pytest.fixture(scope="module")
def opened():
    """Features of 75 rows, of their views and of unseen rows, by type."""
    return {
        dtype: Inputs.open(
            lively(Residual).to(dtype),
            pairs(75, dtype=dtype),
            "classification",
            {"test": pairs(40, seed=1, dtype=dtype)},
            config(),
        ).extract(config())
        for dtype in (torch.float64, torch.float32)
    }


def iterate(inputs, workers, folder, target=NEVER, preconditioner="kfac"):
    settings = config(
        **{"ascent.update": "iterative", "ascent.preconditioner": preconditioner, "resources.ascent_workers": workers}
    )
    sets, preconditioners = [inputs.features[name] for name in ("forget_views", "test")], {}
    if preconditioner != "none":
        preconditioners = factor_job.fit(sets, inputs.part, settings.ascent)
    problem = UpdateProblem(np.random.default_rng(0).random(75), settings.ascent, 0, [target], preconditioners)
    return train_job.update(problem, inputs.part, inputs.features, settings.resources, RunDirectory(folder))


def share(outcome, expected, inputs):
    """How far two outcomes are apart, as a share of the way from the original parameters."""
    start = inputs.part.parameters
    difference, way = (
        norm({name: tensor - others[name] for name, tensor in expected.parameters.items()})
        for others in (outcome.parameters, start)
    )
    return difference / way


@pytest.mark.parametrize(
    ("dtype", "preconditioner", "tolerance"),
    [(torch.float64, "kfac", 1e-9), pytest.param(torch.float32, "none", 1e-2, marks=pytest.mark.long)],
)
def test_any_number_of_workers_takes_the_same_steps(opened, tmp_path, dtype, preconditioner, tolerance):
    inputs = opened[dtype]
    alone = iterate(inputs, 1, tmp_path / "1", preconditioner=preconditioner)
    assert alone.trajectory[-1]["step"] == 20
    assert alone.trajectory[-1]["parameter_drift"] > 0.01
    for workers in (2, 4):
        several = iterate(inputs, workers, tmp_path / f"{workers}", preconditioner=preconditioner)
        assert share(several, alone, inputs) <= tolerance


@pytest.mark.long
def test_a_worker_killed_between_steps_changes_nothing(opened, tmp_path):
    inputs = opened[torch.float64]
    killing = KillingTarget("forget.accuracy", -1.0, "test", folder=str(tmp_path), step=10)
    survived = iterate(inputs, 2, tmp_path / "killed", killing)
    assert (tmp_path / "step10").exists(), "a worker was killed"
    assert share(survived, iterate(inputs, 1, tmp_path / "alone"), inputs) <= 1e-9


def one_step(samples, folder):
    """A whole request in one step."""
    return unlearn(
        lively(Residual), samples, evaluation={"test": pairs(40, seed=1)}, config=config(), run_dir=folder / "run"
    )


def aim(folder=None):
    """Aim at a loss; the driver is killed at its first trial, once, if there is a folder."""
    target = ("forget_views.loss", 4.0, "test", 0.05, True)
    chosen = KillingTarget(*target, str(folder), 1) if folder else StopTarget(*target)
    return lambda *_: [chosen]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outcome of one step without a fault."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "resolve_targets", aim())
        return one_step(pairs(75), tmp_path_factory.mktemp("whole"))


def same(found, expected):
    assert found.manifest["ascent"]["status"] == expected.manifest["ascent"]["status"] == "reached"
    state = found.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.model.state_dict().items())
    assert found.trajectory.drop_columns("seconds").equals(expected.trajectory.drop_columns("seconds"))


class KillingKFAC(type(LAYER_CURVATURES["kfac"])):
    """Kills the worker that solves a layer first."""

    def __init__(self, folder):
        self.folder = folder

    def solve(self, sums, damping):
        return KillBefore(super().solve, self.folder, "solve")(sums, damping)


def test_a_worker_killed_in_any_phase_of_one_step_changes_no_bit(undisturbed, tmp_path, monkeypatch):
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    monkeypatch.setattr(pipeline, "resolve_targets", aim())
    monkeypatch.setitem(LAYER_CURVATURES, "kfac", KillingKFAC(tokens))
    phases = {
        "moments": (score_job, "shard_statistics"), "scores": (score_job, "score_shard"),
        "curvature": (factor_job, "_layer_sums"), "gradient": (task_scope, "_gradient"), "trial": (task_scope, "_sums"),
    }  # fmt: skip
    for phase, (module, name) in phases.items():
        monkeypatch.setattr(module, name, KillBefore(getattr(module, name), tokens, phase))
    same(one_step(KillingPairs(*tensors(75), tokens, row=20), tmp_path), undisturbed)
    assert {path.name for path in tokens.iterdir()} == {*phases, "row20", "solve"}


def test_a_driver_killed_after_the_direction_was_found_goes_on_with_it(
    undisturbed, tmp_path, monkeypatch, python_environment
):
    address = ray.get_runtime_context().gcs_address
    died = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env={**python_environment, "RAY_ADDRESS": address},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert RunDirectory(tmp_path / "run").load_state() is not None
    monkeypatch.setattr(pipeline, "resolve_targets", aim())
    for module, name in ((factor_job, "fit"), (task_scope, "shard_gradient")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("it was found before"))
    same(one_step(pairs(75), tmp_path), undisturbed)


if __name__ == "__main__":
    from pathlib import Path

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    pipeline.resolve_targets = aim(sys.argv[1])
    one_step(pairs(75), Path(sys.argv[1]))
