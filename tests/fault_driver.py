"""A driver script with a fault in one stage; run by test_interrupt.py and test_resume.py."""

import sys

from architectures import Residual, lively, named
from faults import FullDiskTarget, HangingPairs, HangingTarget, KillingTarget
from samples import SMALL, pairs, paper, tensors

import imu_ray
from imu_ray import UnlearnConfig, pipeline
from imu_ray.updates.stopping import StopTarget

TARGETS = {
    "hang in the ascent": lambda folder: HangingTarget("forget.accuracy", -1.0, "test", folder=folder),
    "kill in the ascent": lambda folder: KillingTarget("forget.accuracy", -1.0, "test", folder=folder, step=6),
    "full disk": lambda folder: FullDiskTarget("forget.accuracy", -1.0, "test"),
    "none": lambda folder: StopTarget("forget.accuracy", -1.0, "test"),
}
STEPS = {"ascent.scope": "last:2", "ascent.views": 2, "ascent.update": "iterative", "ascent.stop.max_steps": 12}


def forget(folder, scope="head", workers=1, samples=None):
    """The request in which it happens, on a head or in float64 on layers that K-FAC steers."""
    workers = {"resources.workers": workers, "resources.ascent_workers": workers}
    if scope == "head":
        model, config = named("fc"), paper(SMALL | workers)
    else:
        model = lively(Residual).double()
        config = UnlearnConfig.from_recipe("samples").with_overrides(SMALL | STEPS | workers)
    samples = samples or pairs(50, dtype=next(model.parameters()).dtype)
    return imu_ray.unlearn(model, samples, config=config, run_dir=f"{folder}/out/run")


if __name__ == "__main__":
    fault, folder, workers, *scope = sys.argv[1:]
    samples = HangingPairs(*tensors(50), folder) if fault == "hang in the features" else None
    target = TARGETS.get(fault, TARGETS["none"])(folder)
    pipeline.resolve_targets = lambda *_: [target]
    forget(folder, *scope, workers=int(workers), samples=samples)
