"""The demo as `make demo` runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imu_ray.demo import digits_cnn
from imu_ray.distributed import session

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_demo_forgets_a_class_and_shows_where_it_is_weak(tmp_path, python_environment):
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "demo.py", "--out", "made"],
        env=python_environment,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout.splitlines()[-1])
    assert (runs["status"], runs["run_dir"]) == ("complete", str(tmp_path / "made"))
    forgotten = runs["class"]["metrics"]
    assert forgotten["after"]["forget"]["accuracy"] <= 0.02
    assert forgotten["after"]["retain"]["accuracy"] >= forgotten["before"]["retain"]["accuracy"] - 0.02
    assert forgotten["after"]["test"]["per_class"]["3"]["accuracy"] <= 0.1
    random = runs["random"]["metrics"]
    assert random["after"]["forget"]["bounded_loss"] >= random["before"]["test"]["bounded_loss"] * 0.8
    assert random["after"]["retain"]["accuracy"] >= random["before"]["retain"]["accuracy"] - 0.01
    for name in ("class", "random"):
        assert json.loads((Path(runs[name]["run_dir"]) / "manifest.json").read_text())["ascent"]["status"] == "reached"
    for column in ("before", "after", "retrained", "membership inference", "forgotten class in test"):
        assert column in done.stdout
    assert "Where this is weak" in done.stdout
    original = load_file(tmp_path / "made" / "original.safetensors")
    changed = load_file(tmp_path / "made" / "class" / "run" / "model.safetensors")
    assert {key for key in original if not torch.equal(original[key], changed[key])} == {"head.weight", "head.bias"}
    assert digits_cnn().load_state_dict(changed)
    assert f"{tmp_path}/made/{{class,random}}/data/{{forget,retain,test}}.parquet" in done.stdout
    assert len(list(tmp_path.glob("made/*/data/*.parquet"))) == 6


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, {"address": "local", "num_cpus": 2}),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, {}),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"metadata": {"job_submission_id": "raysubmit_1"}}'}, {}),
    ],
)
def test_the_demo_runs_on_the_cluster_that_it_was_submitted_to(environment, asked, monkeypatch):
    started = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(session.ray, "init", lambda **given: started.update(given))
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    with session.ray_of_its_own(cpus=2):
        pass
    assert {key: started[key] for key in ("address", "num_cpus") if key in started} == asked
