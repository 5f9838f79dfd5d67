import contextlib
import json
import os
import stat
import struct
import threading

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

from imu_ray.errors import CheckpointError, StageFailedError
from imu_ray.run.directory import RunDirectory, UpdateState


def test_a_broken_state_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "ascent.safetensors").write_text("x")
    with pytest.raises(CheckpointError, match="delete the state folder"):
        RunDirectory(tmp_path).load_state()


def test_a_metric_that_is_not_a_number_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunDirectory(tmp_path).write_json("metrics.json", {"accuracy": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_read_only_place_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(CheckpointError, match="is not writable"):
        RunDirectory(tmp_path / "run").check("unlearn", "identity")


BEGUN = {"stage": "unlearn", "config_identity": "a", "limits": {"max_epochs": 10, "max_steps": None}}
SAME, LONGER = BEGUN["limits"], {"max_epochs": 20, "max_steps": None}


@pytest.mark.parametrize(
    ("status", "ascent", "limits", "found"),
    [
        ("failed", None, SAME, "failed"),
        ("interrupted", None, LONGER, "interrupted"),
        ("complete", None, SAME, "complete"),
        ("complete", "not_reached", SAME, "complete"),
        ("complete", "not_reached", LONGER, "extended"),
        ("complete", "epochs_done", LONGER, "extended"),
        ("complete", "reached", LONGER, "complete"),
        ("complete", "stopped_by_guard", LONGER, "complete"),
    ],
)
def test_the_status_of_a_run_of_the_same_settings_says_what_is_left_to_do(status, ascent, limits, found, tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert run.check("unlearn", "a", limits) is None
    run.write_json("manifest.json", {**BEGUN, "status": status, **({"ascent": {"status": ascent}} if ascent else {})})
    assert run.check("unlearn", "a", limits) == {**run.read_manifest(), "status": found}


@pytest.mark.parametrize(
    ("stage", "identity", "limits", "message"),
    [
        ("unlearn", "b", SAME, "holds a run of unlearn with other settings"),
        ("audit", "a", SAME, "holds a run of unlearn with other settings"),
        (
            "unlearn",
            "a",
            {"max_epochs": 5, "max_steps": None},
            "max_epochs is 5, .* began with 10; expected as many or",
        ),
        ("unlearn", "a", {"max_epochs": 10, "max_steps": 3}, "max_steps is 3, .* began with no limit"),
    ],
)
def test_another_run_or_a_shorter_one_is_refused(stage, identity, limits, message, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.write_json("manifest.json", {**BEGUN, "status": "complete", "ascent": {"status": "not_reached"}})
    with pytest.raises(CheckpointError, match=message):
        run.check(stage, identity, limits)


def test_a_run_that_may_take_more_steps_keeps_its_last_state(tmp_path):
    run = RunDirectory(tmp_path)
    run.save_state(UpdateState(4, {"matrix": torch.ones(3)}, []))
    run.write_text("state/train/x", "of Ray Train")
    run.clear_state(but_last=True)
    assert os.listdir(tmp_path / "state") == ["ascent.safetensors"]
    run.clear_state()
    assert os.listdir(tmp_path) == []


def test_nothing_is_written_to_a_place_that_was_lost(tmp_path, monkeypatch):
    run, lost = RunDirectory(tmp_path), threading.Event()
    monkeypatch.setattr(run.storage, "locked", lambda: contextlib.nullcontext(lost))
    with run.locked():
        run.write_text("a.txt", "before")
        lost.set()
        with pytest.raises(StageFailedError, match="may be in use by another run"):
            run.write_text("a.txt", "after")
    assert (tmp_path / "a.txt").read_text() == "before"


@pytest.mark.parametrize("name", [".part-abc", ".lock", ".lock-123-abc"])
def test_a_directory_with_nothing_but_what_a_killed_run_left_is_new(name, tmp_path):
    (tmp_path / name).write_text("x")
    assert RunDirectory(tmp_path).check("unlearn", "a") is None


def test_a_directory_made_beforehand_becomes_private(tmp_path):
    tmp_path.chmod(0o755)
    RunDirectory(tmp_path).write_text("a.txt", "x")
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_a_manifest_that_is_no_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match=r"no manifest\.json of a run"):
        RunDirectory(tmp_path).check("unlearn", "a")


def test_the_trajectory_is_written_for_tensorboard(tmp_path):
    RunDirectory(tmp_path / "run").write_events([{"step": 0.0, "forget_loss": 0.5}, {"step": 2.5, "forget_loss": 1.5}])
    (path,) = (tmp_path / "run" / "tensorboard").iterdir()
    seen = {}
    for record in tf_records(path):
        event = Event.FromString(record)
        seen |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    assert seen == {("step", 0): 0.0, ("forget_loss", 0): 0.5, ("step", 3): 2.5, ("forget_loss", 3): 1.5}


def tf_records(path):
    """Payloads of a TFRecord file: length (8 bytes), its checksum (4), the payload, its checksum (4)."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield data[12 : 12 + length]
        data = data[16 + length :]
