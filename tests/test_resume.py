"""A run that dies is taken up by the same call, to the same model."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from imu_ray.run.directory import RunDirectory

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, drive):
    """The model of a run without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    done = drive("fault_driver.py", "none", folder, 1)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out" / "run" / "model.safetensors")


# The state of step 4 is written after its check: the full disk is met there, the killed process two steps later.
@pytest.mark.parametrize(("fault", "last_good"), [("kill in the ascent", 4), ("full disk", 2)])
def test_the_same_call_goes_on_to_the_same_bits(fault, last_good, tmp_path, drive, uninterrupted):
    died = drive("fault_driver.py", fault, tmp_path, 1)
    run = tmp_path / "out" / "run"
    if fault == "full disk":
        assert "StageFailedError" in died.stderr
        assert "make room" in died.stderr
    else:
        assert died.returncode == -signal.SIGKILL
    assert not (run / "model.safetensors").exists()
    assert RunDirectory(run).load_state().step == last_good, "the last good state is intact"
    again = drive("fault_driver.py", "none", tmp_path, 1)
    assert again.returncode == 0, again.stderr
    saved = load_file(run / "model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in uninterrupted.items())
    left = [path.name for path in (run / "state").iterdir()]
    assert left == ["ascent.safetensors"], "it may take more steps from there"


def test_a_lost_node_changes_nothing(tmp_path, drive, uninterrupted):
    done = drive("fault_driver.py", "lose a node", tmp_path, 2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "node").exists(), "a node was lost"
    saved = load_file(tmp_path / "out" / "run" / "model.safetensors")
    for key, value in uninterrupted.items():
        torch.testing.assert_close(saved[key], value, rtol=1e-6, atol=1e-7)
