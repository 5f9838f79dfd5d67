"""One run at a time in a place, on local disks and on buckets, whatever became of the run before."""

import errno
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import threading

import pytest
from pyarrow import fs

from imu_ray import CheckpointError
from imu_ray.run import lock
from imu_ray.run.directory import RunDirectory
from imu_ray.run.lock import Claim


@pytest.fixture
def quick(monkeypatch):
    """Claims that are renewed often, and are dead only when a test says so."""
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.02)
    monkeypatch.setattr(lock, "DEAD_SECONDS", 60.0)


@pytest.fixture(params=["local", "local without file locks", "s3"])
def location(request, quick, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if request.param == "local without file locks":
        monkeypatch.setattr(fcntl, "flock", refuse)
    return request.getfixturevalue("s3_uri") if request.param == "s3" else tmp_path / "runs" / "run"


def test_a_second_run_is_refused_until_the_first_has_ended(location):
    with RunDirectory(location).locked():
        refused = pytest.raises(CheckpointError, match=f"is in use by process {os.getpid()} on ")
        with refused, RunDirectory(location).locked():
            pass
        assert RunDirectory(location).storage.entries() == []
    with RunDirectory(location).locked():
        pass


def test_a_held_directory_travels_to_other_processes(location):
    with (run := RunDirectory(location)).locked():
        assert pickle.loads(pickle.dumps(run)).location == run.location


def test_a_lock_leaves_nothing(tmp_path):
    with RunDirectory(tmp_path / "runs" / "run").locked():
        assert os.listdir(tmp_path / "runs" / "run") == [".lock"]
    assert os.listdir(tmp_path) == []
    with RunDirectory(tmp_path).locked():
        RunDirectory(tmp_path).write_text("a.txt", "x")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_lock_that_is_released_while_another_waits_for_it_is_taken_anew(tmp_path, monkeypatch):
    flock, removed = fcntl.flock, []

    def flock_late(descriptor, operation):
        if not removed:
            removed.append((tmp_path / ".lock").unlink())  # the first run ends here
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with RunDirectory(tmp_path).locked():
        assert (tmp_path / ".lock").exists()


KILLED = """
import os, signal, sys
from imu_ray.run import lock
from imu_ray.run.directory import RunDirectory
with RunDirectory(sys.argv[1]).locked():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("place", ["local", "s3"])
def test_the_lock_of_a_killed_run_does_not_keep_its_resume_out(
    place, request, tmp_path, quick, python_environment, monkeypatch
):
    location = request.getfixturevalue("s3_uri") if place == "s3" else str(tmp_path)
    environment = {**os.environ, **python_environment}
    killed = subprocess.run([sys.executable, "-c", KILLED, location], env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    monkeypatch.setattr(lock, "DEAD_SECONDS", 0.2)
    with RunDirectory(location).locked():
        pass
    assert RunDirectory(location).storage.entries() == []


def claims(tmp_path, count):
    made = [Claim(fs.LocalFileSystem(), str(tmp_path)) for _ in range(count)]
    assert sorted(made, key=lambda claim: claim.name) == made, "the first comes first"
    return made


def test_of_runs_that_begin_together_the_first_is_let_in(quick, tmp_path):
    inside, refused = [], []

    def run(claim):
        try:
            with claim.held():
                inside.append(claim)
                all_others_ended.wait(60)
        except CheckpointError:
            refused.append(claim)
            if len(refused) == 2:
                all_others_ended.set()

    made, all_others_ended = claims(tmp_path, 3), threading.Event()
    for claim in made:
        claim._write()  # all have said so before any of them looks
    threads = [threading.Thread(target=run, args=[claim]) for claim in reversed(made)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == made[:1]
    assert set(refused) == set(made[1:])


def removed(claim, other, monkeypatch):
    monkeypatch.setattr(claim, "_claims", set)  # by another run, which took this one for dead


def held_by_another_too(claim, other, monkeypatch):
    other.holds = True
    other._write()  # as after a pause between the look and the write


def not_answered(claim, other, monkeypatch):
    def fail():
        raise OSError("no route to host")

    monkeypatch.setattr(claim, "_claims", fail)
    monkeypatch.setattr(lock, "DEAD_SECONDS", 0.1)


@pytest.mark.parametrize("happens", [removed, held_by_another_too, not_answered])
def test_a_run_knows_that_it_lost_the_place(happens, quick, tmp_path, monkeypatch):
    claim, other = claims(tmp_path, 2)
    with claim.held() as lost:
        happens(claim, other, monkeypatch)
        assert lost.wait(60)
