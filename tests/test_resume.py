"""A run that dies is taken up by the same call, to the same model."""

import signal

import pytest
import torch
from fault_driver import TARGETS, forget
from safetensors.torch import load_file

from imu_ray import pipeline
from imu_ray.run.directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def without_fault(monkeypatch):
    """The driver's request in this process; gives the saved model."""

    def run(folder, scope):
        monkeypatch.setattr(pipeline, "resolve_targets", lambda *_: [TARGETS["none"](folder)])
        forget(folder, scope)
        return load_file(folder / "out" / "run" / "model.safetensors")

    return run


# The state of step 4 is written after its check: the full disk is met there, the killed process two steps later.
@pytest.mark.parametrize(
    ("fault", "scope", "last_good"),
    [
        ("kill in the ascent", "layers", 4),
        pytest.param("kill in the ascent", "head", 4, marks=pytest.mark.long),
        pytest.param("full disk", "head", 2, marks=pytest.mark.long),
    ],
)
def test_the_same_call_goes_on_to_the_same_bits(fault, scope, last_good, tmp_path, drive, without_fault):
    died = drive("fault_driver.py", fault, tmp_path, 1, scope)
    run = tmp_path / "out" / "run"
    if fault == "full disk":
        assert "StageFailedError" in died.stderr
        assert "make room" in died.stderr
    else:
        assert died.returncode == -signal.SIGKILL
    assert not (run / "model.safetensors").exists()
    assert RunDirectory(run).load_state().step == last_good, "the last good state is intact"
    saved, uninterrupted = (without_fault(folder, scope) for folder in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(saved[key], value) for key, value in uninterrupted.items())
    left = [path.name for path in (run / "state").iterdir()]
    assert left == ["ascent.safetensors"], "it may take more steps from there"
