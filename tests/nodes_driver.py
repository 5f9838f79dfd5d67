"""A driver script on a cluster of several nodes on one machine, which are lost, added or refused; run by test_nodes.py.

What must happen at a certain place is triggered by the sample or the shard that is worked on there, once.
"""

import contextlib
import faulthandler
import functools
import gc
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import ray
import torch
from architectures import Residual, lively, named
from faults import MarkingPairs, NodeLosingTarget, kill_once, once
from ray.cluster_utils import Cluster
from samples import SMALL, Pairs, paper, tensors
from torch import nn

import imu_ray
from imu_ray import UnlearnConfig, pipeline
from imu_ray.data import Rows, Source
from imu_ray.distributed import factor_job, score_job, task_scope
from imu_ray.errors import ConfigError
from imu_ray.updates.stopping import StopTarget

# A killed raylet is noticed within a second or two instead of fifteen.
NOTICE_QUICKLY = {
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 2,
    "health_check_initial_delay_ms": 0,
}
FEW_AND_MANY = 500, 2_000  # shards
ROWS, MIDDLE = 160, 80  # rows of the disturbed runs, and the first row of the shard at which it happens


class Wide(nn.Module):
    """A fixed random projection and a wide head: results of a task above 100 kB stay on the node that made them."""

    def __init__(self, width, classes=5):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("projection", torch.randn(36, width, generator=generator) / 6)
        self.fc = nn.Linear(width, classes)
        with torch.no_grad():
            self.fc.weight.copy_(torch.randn(classes, width, generator=generator) / width**0.5)
            self.fc.bias.zero_()

    def forward(self, x):
        return self.fc(torch.tanh(x.flatten(1) @ self.projection))


class CountedPairs(MarkingPairs):
    """Appends a byte to the file ``reads`` for every read."""

    def __getitem__(self, row):
        with open(Path(self.folder) / "reads", "ab") as file:
            file.write(b".")
        return super().__getitem__(row)


class LosingPairs(CountedPairs):
    """Loses the node that first reads the row in the middle."""

    def __getitem__(self, row):
        if row == MIDDLE:
            kill_once(self.folder, "lost", node=True)
        return super().__getitem__(row)


class Losing:
    """A function of a shard which, once, loses the node that works on the shard in the middle."""

    def __init__(self, function, folder, key="lost"):
        self.function, self.folder, self.key = function, str(folder), key

    def __call__(self, shard, *values, **more):
        if shard.ids[0].as_py().partition("#")[0] == str(MIDDLE):  # views have the row's id and a number
            kill_once(self.folder, self.key, node=True)
        return self.function(shard, *values, **more)


class RecordingPairs(MarkingPairs):
    """Notes the node of every read. The first reader asks for another node, then waits until that one reads too."""

    driver = ""

    def __getitem__(self, row):
        node, folder = ray.get_runtime_context().get_node_id(), Path(self.folder)
        if node != self.driver:
            (folder / node).touch()
            try:
                (folder / "first").open("x").write(node)
                (folder / "wanted").open("w").close()
                (folder / "seen").open("r").close()  # a named pipe, opened at the other end by a reader on another node
            except FileExistsError:
                if (folder / "first").read_text() != node and once(folder, "answered"):
                    (folder / "seen").open("w").close()
        return super().__getitem__(row)


def note_this_node(folder, row):
    (Path(folder) / str(row)).write_text(ray.get_runtime_context().get_node_id())


class NotingPairs(MarkingPairs):
    """Notes the node that reads each row."""

    def __getitem__(self, row):
        note_this_node(self.folder, row)
        return super().__getitem__(row)


class Noting:
    """A function of a shard that notes the node on which it is called, by the shard's first row."""

    def __init__(self, function, folder):
        self.function, self.folder = function, str(folder)

    def __call__(self, shard, **more):
        note_this_node(self.folder, shard.ids[0].as_py())
        return self.function(shard, **more)


class OneRowShards(Source):
    """As many random samples as there should be shards."""

    name = "one row a shard"

    def __init__(self, count):
        self.num_rows = count

    def read(self, start, stop):
        inputs = np.random.default_rng(start).normal(size=(stop - start, 1, 6, 6)).astype(np.float32)
        return Rows([str(row) for row in range(start, stop)], np.arange(start, stop) % 5, list(inputs))


def settings(workers, **more):
    return paper(SMALL | more, resources__workers=workers)


def losing(functions, folder):
    """A context in which each of some functions of shards, by key, loses a node."""
    patches = contextlib.ExitStack()
    for key, (module, name) in functions.items():
        patches.enter_context(mock.patch.object(module, name, Losing(getattr(module, name), folder, key)))
    return patches


def start_cluster(**head):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": NOTICE_QUICKLY, **head})
    ray.init(address=cluster.address, log_to_driver=False)
    return cluster


def apart(some, others, original):
    """How far two outcomes are apart, as a share of the way from the original model."""
    some, others, original = (
        torch.cat([tensor.flatten() for tensor in model.state_dict().values() if tensor.is_floating_point()])
        for model in (some, others, original)
    )
    return float((some - others).norm() / (others - original).norm())


STAGES = {
    "features": {}, "statistics": {"lost": (score_job, "shard_statistics")}, "scores": {"lost": (score_job, "score_shard")},
}  # fmt: skip
PHASES = {
    "curvature": (factor_job, "_layer_sums"), "gradient": (task_scope, "_gradient"), "trial": (task_scope, "_sums"),
}  # fmt: skip
STEPS = {"ascent.update": "iterative", "ascent.stop.max_steps": 12, "ascent.microbatch_rows": 6, "audit.report": False}
LAYERS = {"ascent.scope": "last:2", "ascent.views": 2, "audit.report": False}
NEVER = ("forget.accuracy", -1.0, "test")
UPDATES = {  # recipe, settings, target
    "head": ("paper", STEPS, StopTarget(*NEVER)),
    "layers": ("samples", LAYERS | STEPS, StopTarget(*NEVER)),
    "one step": ("samples", LAYERS, StopTarget("forget_views.loss", 4.5, "test", 0.05, True)),
}


def made(*names):
    """A new folder."""
    place = Path(*names)
    place.mkdir(parents=True)
    return place


def lose_nodes(folder):
    """Undisturbed scores on one node; then, on three, one lost in each stage, and replaced after it."""
    data = tensors(ROWS)
    cluster = start_cluster()
    cluster.add_node(num_cpus=2)
    imu_ray.score(Wide(2048), Pairs(*data), config=settings(1), run_dir=made(folder, "none") / "run")
    cluster.add_node(num_cpus=2)
    for stage, functions in STAGES.items():
        cluster.add_node(num_cpus=2)
        place = made(folder, stage)
        samples = (LosingPairs if stage == "features" else CountedPairs)(*data, place)
        with losing(functions, place):
            imu_ray.score(Wide(2048), samples, config=settings(3), run_dir=place / "run")
    return cluster


def lose_nodes_in_update(case, folder):
    """An undisturbed update on one node; then, on several, one lost between steps, or one in each phase of one step."""
    inputs, labels = tensors(ROWS, dtype=torch.float64)
    recipe, more, usual = UPDATES[case]
    if case == "head":
        model = Wide(2048).double()
    else:  # on images with features as large
        model, inputs = lively(Residual).double(), inputs.repeat(1, 1, 4, 4)
    cluster = start_cluster()
    cluster.add_node(num_cpus=2)

    def update(place, workers, target):
        pipeline.resolve_targets = lambda *_: [target]
        workers = {"resources.workers": workers, "resources.ascent_workers": workers}
        config = UnlearnConfig.from_recipe(recipe).with_overrides(SMALL | more | workers)
        return imu_ray.unlearn(model, Pairs(inputs, labels), config=config, run_dir=place / "run").model

    alone = update(made(folder, "none"), 1, usual)
    phases = PHASES if case == "one step" else {}
    for _ in range(len(phases) or 1):
        cluster.add_node(num_cpus=2)
    target = usual if phases else NodeLosingTarget(*NEVER, folder=str(folder), step=6)
    with losing(phases, folder):
        changed = update(folder, 2, target)
    (folder / "apart").write_text(str(apart(changed, alone, model)))
    return cluster


def add_a_node(folder):
    """One node with one CPU, and another that comes when it has begun; then a run that notes which node did what."""
    for name in ("wanted", "seen"):
        os.mkfifo(folder / name)
    cluster = start_cluster()
    cluster.add_node(num_cpus=1)

    samples = RecordingPairs(*tensors(64), folder)
    samples.driver = ray.get_runtime_context().get_node_id()
    # Two workers on one CPU are refused unless nodes may come.
    config = settings(2, **{"resources.autoscaling": True})
    # A node can be started by the main thread only.
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(imu_ray.score, named(), samples, config=config, run_dir=folder / "run")
        (folder / "wanted").open("r").close()  # returns when a task has begun to read
        cluster.add_node(num_cpus=1)
        run.result()
    places = {name: folder / name for name in ("read", "scored")}
    for place in places.values():
        place.mkdir()
    score_job.score_shard = Noting(score_job.score_shard, places["scored"])
    imu_ray.score(Wide(2048), NotingPairs(*tensors(64), places["read"]), config=settings(1), run_dir=folder / "noted")
    return cluster


def spill(folder):
    """Features of 164 MB, in an object store of 80 MB and in one of 400."""
    data = tensors(10_000)
    for name, megabytes in (("large", 400), ("small", 80)):
        cluster = start_cluster(num_cpus=2, object_store_memory=megabytes * 10**6)
        config = paper(resources__workers=2)
        imu_ray.score(Wide(4096), Pairs(*data), config=config, run_dir=folder / name)
        (folder / f"{name}.json").write_text(json.dumps(ray.cluster_resources()["object_store_memory"]))
        if name == "large":
            ray.shutdown()
            cluster.shutdown()
    return cluster


def memory():
    """Resident memory of this process and its highest, in MB."""
    gc.collect()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")}


def count_shards(folder):
    """Resident memory of the driver with few shards and with many."""
    cluster = start_cluster(num_cpus=2)
    found = {}
    for shards in FEW_AND_MANY:
        config = settings(2, **{"influence.block_rows": 1})
        imu_ray.score(named(), OneRowShards(shards), config=config, run_dir=folder / str(shards))
        found[shards] = memory()
    (folder / "memory.json").write_text(json.dumps(found))
    return cluster


def refuse_a_node(folder):
    """One node like the driver's, and one with another torch."""
    made = folder / "site" / "torch-1.0.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    cluster = start_cluster()
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": os.pathsep.join([str(made.parent), os.environ["PYTHONPATH"]])})
    try:
        imu_ray.score(named(), Pairs(*tensors(32)), config=settings(1), run_dir=folder / "run")
    except ConfigError as error:
        (folder / "refused").write_text(str(error))
    (folder / "nodes").write_text(json.dumps([node["NodeManagerAddress"] for node in ray.nodes()]))
    return cluster


SCENARIOS = {
    "lose": lose_nodes, "add": add_a_node, "spill": spill, "refuse": refuse_a_node, "count": count_shards,
} | {case: functools.partial(lose_nodes_in_update, case) for case in UPDATES}  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(float(os.environ.get("DUMP", 240)))
    running = SCENARIOS[sys.argv[1]](Path(sys.argv[2]))
    ray.shutdown()
    running.shutdown()
