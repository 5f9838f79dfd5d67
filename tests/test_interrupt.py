"""Ctrl-C in any stage: nothing half-written, and no Ray left running."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def processes_with(mark):
    """Ids of the processes that inherited a mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_until_gone(pid):
    subprocess.run(["tail", f"--pid={pid}", "-f", "/dev/null"], timeout=60, check=True)


@pytest.mark.parametrize(
    ("fault", "workers"),
    [
        ("hang in the features", "1"),
        pytest.param("hang in the ascent", "1", marks=pytest.mark.long),
        pytest.param("hang in the ascent", "2", marks=pytest.mark.long),
    ],
)
def test_an_interrupt_leaves_neither_half_a_file_nor_ray(fault, workers, tmp_path, python_environment):
    for name in ("announce", "never"):
        os.mkfifo(tmp_path / name)
    mark = f"IMU_RAY_TEST_{uuid.uuid4().hex}"
    command = [sys.executable, str(Path(__file__).with_name("fault_driver.py")), fault, str(tmp_path), workers]
    environment = {**python_environment, "RAY_TMPDIR": tempfile.mkdtemp(dir="/tmp"), mark: "1"}
    with open(tmp_path / "log", "w") as log:
        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    with open(tmp_path / "announce"):  # returns when the stage is under way
        pass
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=90) != 0
    for pid in processes_with(mark):
        wait_until_gone(pid)
    left = [path.relative_to(tmp_path / "out" / "run") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.startswith(".part-")]
    if fault == "hang in the features":
        assert left == []
    else:
        assert json.loads((tmp_path / "out" / "run" / "manifest.json").read_text())["status"] == "interrupted"
        ours = {str(path) for path in left if not str(path).startswith("state/train/")}
        assert ours == {"manifest.json", "intensities.parquet", "state/ascent.safetensors"}
