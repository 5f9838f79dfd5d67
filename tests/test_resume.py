"""A run that dies is taken up by the same call, to the same model."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imu_ray.checkpoint import RunDirectory

pytestmark = pytest.mark.slow


def drive(fault, folder, environment):
    script = str(Path(__file__).with_name("fault_driver.py"))
    return subprocess.run(
        [sys.executable, script, fault, str(folder), "1"],
        env={**environment, "RAY_TMPDIR": "/tmp"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The model of a run without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    done = drive("none", folder, dict(os.environ))
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out" / "run" / "model.safetensors")


@pytest.mark.parametrize("fault", ["kill in the ascent", "full disk"])
def test_the_same_call_goes_on_to_the_same_bits(fault, tmp_path, python_environment, uninterrupted):
    died = drive(fault, tmp_path, python_environment)
    run = tmp_path / "out" / "run"
    if fault == "full disk":
        assert "StageFailedError" in died.stderr
        assert "make room" in died.stderr
    else:
        assert died.returncode == -signal.SIGKILL
    assert not (run / "model.safetensors").exists()
    assert RunDirectory(run).load_state().step == 4, "the last good state is intact"
    again = drive("none", tmp_path, python_environment)
    assert again.returncode == 0, again.stderr
    saved = load_file(run / "model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in uninterrupted.items())
    assert not (run / "state").exists()
