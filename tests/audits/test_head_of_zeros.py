"""A model whose head is all zeros: every sample is told alike, and every share of the head's norm is one of 0."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from architectures import named
from samples import pairs

import imu_ray

pytestmark = pytest.mark.usefixtures("ray_cluster")


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_a_run_on_a_head_of_zeros_ends_with_figures_that_are_numbers(tmp_path):
    model = named("fc")
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.zero_()
    config = imu_ray.UnlearnConfig().with_overrides(
        {"influence.block_rows": 16, "ascent.batch_size": 20, "ascent.stop.max_epochs": 1}
    )
    imu_ray.unlearn(model, pairs(40), evaluation={"test": pairs(40, seed=3)}, config=config, run_dir=tmp_path / "run")
    manifest, _ = (
        json.loads((tmp_path / "run" / name).read_text(), parse_constant=refuse)
        for name in ("manifest.json", "metrics.json")
    )
    assert manifest["status"] == "complete"
    assert manifest["ascent"]["parameter_drift"] == 0.0
    table = pq.read_table(tmp_path / "run" / "intensities.parquet")
    assert all(np.isfinite(table[name].to_numpy()).all() for name in table.column_names[2:])
