"""The demo as `make demo` runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imu_ray.demo import digits_cnn

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_demo_forgets_a_class_and_shows_where_it_is_weak(tmp_path, python_environment):
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "demo.py"], env=python_environment, capture_output=True, text=True, timeout=280, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout.splitlines()[-1])
    forgotten = runs["class"]["metrics"]
    assert forgotten["after"]["forget"]["accuracy"] <= 0.02
    assert forgotten["after"]["retain"]["accuracy"] >= forgotten["before"]["retain"]["accuracy"] - 0.02
    assert forgotten["after"]["test"]["per_class"]["3"]["accuracy"] <= 0.1
    random = runs["random"]["metrics"]
    assert random["after"]["forget"]["accuracy"] <= random["before"]["test"]["accuracy"]
    assert random["after"]["retain"]["accuracy"] < random["before"]["retain"]["accuracy"], "the weakness that the table shows"
    for column in ("before", "after", "retrained", "membership inference", "forgotten class in test"):
        assert column in done.stdout
    assert "Where this is weak" in done.stdout
    original = load_file(Path(runs["class"]["run_dir"]).parents[1] / "original.safetensors")
    changed = load_file(Path(runs["class"]["run_dir"]) / "model.safetensors")
    assert {key for key in original if not torch.equal(original[key], changed[key])} == {"head.weight", "head.bias"}
    assert digits_cnn().load_state_dict(changed)
