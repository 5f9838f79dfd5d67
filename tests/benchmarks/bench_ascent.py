"""Cost of the ascent: ten epochs on 50,000 x 512 features and 10 classes, beside a forward pass of ResNet-18 over as many images.

    python tests/benchmarks/bench_ascent.py [--rows 50000] [--repeat 5]

One thread, one machine, one run. The forward pass is timed on ``--images`` images of 32 x 32 and scaled to ``--rows``. Then two
workers (plain processes) against two independent plain loops, each on half of the data. Medians; writes JSON to ``results/``.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from imu_ray.config import UnlearnConfig
from imu_ray.scopes.features import FeatureShard
from imu_ray.scopes.head import Head
from imu_ray.updates.batches import FeatureStore
from imu_ray.updates.iterative import AscentProblem, run_ascent
from imu_ray.updates.workers import Workers

WIDTH, CLASSES = 512, 10
# Rows, epochs, batch, width, classes. Reductions cost the same whatever the batch, so that small steps scale worst.
SHAPES = [
    (50_000, 3, 256, WIDTH, CLASSES),
    (50_000, 10, 4096, WIDTH, CLASSES),
    (50_000, 10, 16384, WIDTH, CLASSES),
    (50_000, 10, 50_000, WIDTH, CLASSES),
    (16_384, 4, 4096, 2048, 100),
]


def problem(rows: int, epochs: int, batch: int, width: int = WIDTH, classes: int = CLASSES, seed: int = 0) -> AscentProblem:
    """Random features of the size in question; the paper's recipe, no target, so that all epochs are run."""
    random = np.random.default_rng(seed)
    features, labels = random.normal(size=(rows, width)).astype(np.float32), random.integers(0, classes, rows)
    cuts = range(0, rows, 1024)
    shards = [FeatureShard(features[i : i + 1024], labels[i : i + 1024], [], sizes(min(1024, rows - i))) for i in cuts]
    # A rate so small that the guard never speaks; the arithmetic is the same.
    settings = UnlearnConfig().with_overrides(
        {
            "ascent.stop.max_epochs": epochs,
            "ascent.learning_rate": 1e-6,
            "ascent.batch_size": batch,
            "ascent.microbatch_rows": max(32, min(256, batch // 8)),
        }
    )
    matrix = torch.from_numpy(random.normal(size=(classes, width + 1))) * 0.01
    return AscentProblem(Head("fc", matrix, True), random.random(rows), settings.ascent, 0, (), None, FeatureStore(shards))


def sizes(rows: int) -> tuple[int, ...]:
    return tuple(min(256, rows - start) for start in range(0, rows, 256))


def timed_ascent(*shape: int) -> float:
    made = problem(*shape)
    started = time.perf_counter()
    run_ascent(made, Workers())
    return time.perf_counter() - started


def forward_seconds(images: int) -> float:
    """Seconds per image of ResNet-18 in eval mode, batches of 256, one thread."""
    model = torchvision.models.resnet18(weights=None, num_classes=CLASSES).eval()
    batch = torch.randn(256, 3, 32, 32)
    with torch.inference_mode():
        model(batch)
        started = time.perf_counter()
        for _ in range(images // 256):
            model(batch)
    return (time.perf_counter() - started) / (images // 256 * 256)


def in_group(rank: int, world: int, path: str, *rest: Any) -> None:
    *shape, results = rest
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    made = problem(*shape)
    torch.distributed.barrier()
    started = time.perf_counter()
    run_ascent(made, Workers(rank, world))
    results.put(time.perf_counter() - started)
    torch.distributed.destroy_process_group()


def alone(rank: int, world: int, path: str, *rest: Any) -> None:
    *shape, results = rest
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    rows, epochs, batch, *size = shape
    made = problem(rows // world, epochs, batch // world, *size, seed=rank)
    torch.distributed.barrier()  # or the one that starts first would have the machine to itself for a while
    started = time.perf_counter()
    run_ascent(made, Workers())
    results.put(time.perf_counter() - started)
    torch.distributed.destroy_process_group()


def together(target: object, world: int, *arguments: int) -> float:
    """The slowest of ``world`` processes, start-up excluded."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        group = [context.Process(target=target, args=(rank, world, f"{folder}/group", *arguments, results)) for rank in range(world)]
        for process in group:
            process.start()
        for process in group:
            process.join()
    times = []
    while not results.empty():
        times.append(results.get())
    return max(times)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ascents, forwards = [], []
    for _ in range(options.repeat):
        ascents.append(timed_ascent(options.rows, 10, 256))
        forwards.append(forward_seconds(options.images) * options.rows)
    scaling = []
    for shape in SHAPES:
        measured = [[timed_ascent(*shape), together(in_group, 2, *shape), together(alone, 2, *shape)] for _ in range(options.repeat)]
        one, group, plain = (statistics.median(column) for column in zip(*measured, strict=True))
        scaling.append(
            {"rows": shape[0], "batch_size": shape[2], "width": shape[3], "classes": shape[4], "one_worker_s": one, "two_workers_s": group, "two_independent_halves_s": plain,
             "speed_up": one / group, "speed_up_of_independent_loops": one / plain, "share": plain / group}
        )  # fmt: skip
    ascent, forward = statistics.median(ascents), statistics.median(forwards)
    record = {
        "date": time.strftime("%Y-%m-%d"), "platform": platform.platform(), "torch": torch.__version__, "repeat": options.repeat,
        "ascent_10_epochs_s": ascent, "resnet18_forward_s": forward, "ascent_over_forward": ascent / forward, "scaling": scaling,
    }  # fmt: skip
    path = Path(__file__).parent / "results" / f"ascent-{record['date']}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
