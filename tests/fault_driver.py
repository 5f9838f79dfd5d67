"""A driver script with a fault in one stage; run by test_interrupt.py and test_resume.py."""

import sys

import ray
from architectures import named
from faults import FullDiskTarget, HangingPairs, HangingTarget, KillingTarget, NodeLosingTarget
from nodes_driver import start_cluster
from samples import SMALL, pairs, paper, tensors

import imu_ray
from imu_ray import pipeline
from imu_ray.updates.stopping import StopTarget

TARGETS = {
    "hang in the ascent": lambda folder: HangingTarget("forget.accuracy", -1.0, "test", folder=folder),
    "kill in the ascent": lambda folder: KillingTarget("forget.accuracy", -1.0, "test", folder=folder, step=6),
    "full disk": lambda folder: FullDiskTarget("forget.accuracy", -1.0, "test"),
    "lose a node": lambda folder: NodeLosingTarget("forget.accuracy", -1.0, "test", folder=folder, step=6),
    "none": lambda folder: StopTarget("forget.accuracy", -1.0, "test"),
}


def start_cluster_of_three():
    """A driver's node without CPUs to offer, and two others with room for the whole group each."""
    cluster = start_cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    return cluster


if __name__ == "__main__":
    fault, folder, workers = sys.argv[1:]
    workers = {"resources.workers": int(workers), "resources.ascent_workers": int(workers)}
    samples = HangingPairs(*tensors(50), folder) if fault == "hang in the features" else pairs(50)
    target = TARGETS.get(fault, TARGETS["none"])(folder)
    pipeline.resolve_targets = lambda *_: [target]
    cluster = start_cluster_of_three() if fault == "lose a node" else None
    imu_ray.unlearn(named("fc"), samples, config=paper(SMALL | workers), run_dir=f"{folder}/out/run")
    if cluster is not None:
        ray.shutdown()
        cluster.shutdown()
