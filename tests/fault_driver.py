"""A driver script with a fault in one stage; run by test_interrupt.py and test_resume.py."""

import sys

from architectures import named
from faults import FullDiskTarget, HangingPairs, HangingTarget, KillingTarget
from samples import pairs, tensors

import imu_ray
from imu_ray import pipeline
from imu_ray.ascent.stopping import StopTarget

TARGETS = {
    "hang in the ascent": lambda folder: HangingTarget("forget_accuracy", -1.0, "test", folder=folder),
    "kill in the ascent": lambda folder: KillingTarget("forget_accuracy", -1.0, "test", folder=folder, step=6),
    "full disk": lambda folder: FullDiskTarget("forget_accuracy", -1.0, "test"),
    "none": lambda folder: StopTarget("forget_accuracy", -1.0, "test"),
}

if __name__ == "__main__":
    fault, folder, workers = sys.argv[1:]
    settings = {
        "influence.block_rows": 16, "influence.blocks_per_shard": 1, "ascent.batch_size": 16, "ascent.stop.every_steps": 2,
        "resources.workers": int(workers),
    }  # fmt: skip
    samples = HangingPairs(*tensors(50), folder) if fault == "hang in the features" else pairs(50)
    target = TARGETS.get(fault, TARGETS["none"])(folder)
    pipeline.stop_targets = lambda *_: [target]
    imu_ray.unlearn(named("fc"), samples, config=imu_ray.UnlearnConfig().with_overrides(settings), run_dir=f"{folder}/out/run")
