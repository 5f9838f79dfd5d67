"""One Ray session per pytest process, private to it."""

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from pyarrow import fs

ROOT = Path(__file__).resolve().parents[1]
DRIVER_SECONDS = 280  # of a driver script, several times what it takes

# Workers import the package and the tests' own modules.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
)
for name, value in {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(name, value)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray with four logical CPUs, whatever the machine has."""
    import ray

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        logging_level="warning",
        log_to_driver=False,
        _temp_dir=tempfile.mkdtemp(dir="/tmp"),  # a socket's path has 107 characters at most
    )
    yield
    ray.shutdown()


@pytest.fixture
def restored_log():
    """Loggers as they were."""
    root, ours = logging.getLogger(), logging.getLogger("imu_ray")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


@pytest.fixture(scope="session")
def python_environment():
    """Environment of a subprocess that uses the package from this tree."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture(scope="session")
def drive(python_environment):
    """Runs a driver script of tests/ in a process of its own, which starts a Ray of its own."""

    def run(script, *arguments):
        command = [sys.executable, str(ROOT / "tests" / script), *map(str, arguments)]
        environment = {**python_environment, "RAY_TMPDIR": tempfile.mkdtemp(dir="/tmp")}
        try:
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DRIVER_SECONDS)
        except subprocess.TimeoutExpired as error:
            said = (error.stderr or b"").decode(errors="replace")[-20_000:]
            pytest.fail(f"{script} {' '.join(command[2:])} hangs:\n{said}")

    return run


@pytest.fixture
def s3_uri(monkeypatch, tmp_path):
    """URI of an empty prefix on a local object store."""
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    fs.FileSystem.from_uri(f"s3://bucket/?{endpoint}&allow_bucket_creation=true")[0].create_dir("bucket")
    yield f"s3://bucket/{tmp_path.name}?{endpoint}"
    server.stop()
