"""A driver script that hangs in one stage until it is interrupted; run by test_interrupt.py."""

import sys

from architectures import named
from faults import HangingPairs, HangingTarget
from samples import pairs, tensors

import imu_ray
from imu_ray import pipeline

if __name__ == "__main__":
    stage, folder = sys.argv[1:]
    settings = {"influence.block_rows": 16, "influence.blocks_per_shard": 1, "ascent.batch_size": 16, "ascent.stop.every_steps": 2}
    if stage == "ascent on Ray Train":
        settings["resources.workers"] = 2
    samples = HangingPairs(*tensors(50), folder) if stage == "features" else pairs(50)
    if stage.startswith("ascent"):
        pipeline.stop_targets = lambda *_: [HangingTarget("forget_accuracy", -1.0, "test", folder=folder)]
    imu_ray.unlearn(named("fc"), samples, config=imu_ray.UnlearnConfig().with_overrides(settings), run_dir=f"{folder}/out/run")
