"""From which size several workers pay: ten epochs of the ascent of a head, in one process and in two that sum by gloo.

    python tests/benchmarks/bench_ascent.py [--repeat 3]

One thread each, on 10 classes and 512 features, batches of 4,096; start-up excluded (a worker group of Ray Train takes about ten seconds
more). Medians; writes JSON to ``results/``.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from imu_ray.config import ForgetSetConfig, UnlearnConfig
from imu_ray.run.record import processor
from imu_ray.scopes.features import FeatureShard, FeatureStore
from imu_ray.scopes.head import Head, HeadScope
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.classification import ClassificationTask
from imu_ray.updates.base import UpdateProblem
from imu_ray.updates.iterative import run_iterative

WIDTH, CLASSES, EPOCHS, BATCH = 512, 10, 10, 4096
ROWS = (10_000, 50_000, 200_000)


def seconds(rows: int, workers: Workers) -> float:
    """One ascent on random features; the paper's recipe, no target, so that all epochs are run."""
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(rows, WIDTH)).astype(np.float32), random.integers(0, CLASSES, rows)
    parts = [slice(start, min(start + 256, rows)) for start in range(0, rows, 256)]
    shards = [FeatureShard(features[part], labels[part], [], (part.stop - part.start,)) for part in parts]
    # A rate so small that the guard never speaks; the arithmetic is the same.
    settings = {
        "ascent.stop.max_epochs": EPOCHS,
        "ascent.learning_rate": 1e-6,
        "ascent.batch_size": BATCH,
        "ascent.microbatch_rows": 256,
    }
    config = UnlearnConfig.from_recipe("paper").with_overrides(settings).ascent
    matrix = torch.from_numpy(random.normal(size=(CLASSES, WIDTH + 1))) * 0.01
    head = Head("fc", matrix, True, ClassificationTask(ForgetSetConfig(), "fc", CLASSES))
    scope = HeadScope(head, {"forget": FeatureStore(shards)}, workers)
    workers.agree("ready")
    started = time.perf_counter()
    run_iterative(scope, UpdateProblem(random.random(rows), config, 0))
    return time.perf_counter() - started


def in_group(rank: int, world: int, path: str, rows: int, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    results.put(seconds(rows, Workers(rank, world)))
    torch.distributed.destroy_process_group()


def together(world: int, rows: int) -> float:
    """The slowest of ``world`` processes."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        group = [
            context.Process(target=in_group, args=(rank, world, f"{folder}/group", rows, results))
            for rank in range(world)
        ]
        for process in group:
            process.start()
        times = [results.get() for _ in group]
        for process in group:
            process.join()
    return max(times)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for rows in ROWS:
        rounds = [(seconds(rows, Workers()), together(2, rows)) for _ in range(options.repeat)]
        one, two = (statistics.median(times) for times in zip(*rounds, strict=True))
        found.append(
            {
                "rows": rows,
                "one_process_s": round(one, 2),
                "two_processes_s": round(two, 2),
                "speed_up": round(one / two, 2),
            }
        )
        print(found[-1], flush=True)
    made = {
        "processor": processor(),
        "width": WIDTH,
        "classes": CLASSES,
        "epochs": EPOCHS,
        "batch": BATCH,
        "sizes": found,
    }
    path = Path(__file__).with_name("results") / f"ascent-{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
