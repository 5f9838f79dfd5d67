"""How scoring scales: in samples, in workers, and in tasks alone.

    python tests/benchmarks/bench_scaling.py [--only samples growth workers tasks] [--shards 100000] [--repeat 5]

On a Ray cluster of this machine, start-up and a first small run excluded; medians of ``--repeat`` rounds where a round is short:

- ``samples``: seconds of scoring (moments and scores) for 10^3 to 10^6 samples of 512 features and 10 classes, and 10^7 of 16, on two
  workers, from random features that tasks have put into the object store; and one head of 1,000 classes and 2,048 features; and 10^6 of 512 once
  more through an object store of a fifth of their size. Memory: of the driver and of the largest worker, what is private to the process
  (RssAnon), sampled ten times a second, and how far above what it was after imports.
- ``growth``: seconds of scoring 10^4, 10^5 and 10^6 samples of 512 features in turn, and the ratio of each to the one before.
- ``workers``: ResNet-18 over 32 x 32 images, features and scores, with one worker and with two; beside it one plain forward loop over all
  images, and two at once over half of them each.
- ``tasks``: a stage of stand-in tasks that do nothing for half a second, 20 for each of 4 to 32 workers, over what they would take without
  any orchestration; and ``--shards`` stand-ins that end at once: tasks a second, the limit of one driver.

Adds to ``results/scaling-DATE.json`` and prints it.
"""

import argparse
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
import torchvision

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]
# ruff: noqa: E402 - this tree comes first
from bench_influence import Images

from imu_ray.config import ForgetSetConfig, UnlearnConfig
from imu_ray.distributed import score_job
from imu_ray.distributed.feature_job import FeatureSet
from imu_ray.distributed.tasks import TaskRunner
from imu_ray.influence.intensity import SCHEMES
from imu_ray.inputs import Inputs
from imu_ray.run.record import processor
from imu_ray.scopes.features import FeatureShard, ShardReport
from imu_ray.scopes.head import Head
from imu_ray.tasks.classification import ClassificationTask

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "benchmarks"), str(ROOT / "tests")]),
    "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
}  # fmt: skip
# Samples, features, classes, blocks a shard.
SIZES = [
    (10**3, 512, 10, 4), (10**4, 512, 10, 4), (10**5, 512, 10, 4), (10**6, 512, 10, 4), (10**7, 16, 10, 16), (10**4, 2048, 1000, 4),
]  # fmt: skip
GROWTH = (10**4, 10**5, 10**6)
SPILLED = [(10**6, 512, 10, 4)]  # five times the object store


def config(workers: int, blocks: int = 4) -> UnlearnConfig:
    return UnlearnConfig().with_overrides({"resources.workers": workers, "influence.blocks_per_shard": blocks})


@contextmanager
def cluster(cpus: int, store: int | None = None) -> Iterator[None]:
    ray.init(
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=store,
        _temp_dir=tempfile.mkdtemp(dir="/tmp"),
    )
    try:
        yield
    finally:
        ray.shutdown()


def random_shard(index: int, rows: int, width: int, classes: int) -> FeatureShard:
    random = np.random.default_rng(index)
    labels = random.integers(0, classes, rows)
    features = random.normal(size=(rows, width)).astype(np.float32)
    features[np.arange(rows), labels % width] += 2.0
    sizes = tuple(min(256, rows - start) for start in range(0, rows, 256))
    return FeatureShard(features, labels, pa.array([f"{index}-{row}" for row in range(rows)]), sizes, np.arange(rows))


@ray.remote
def _random_shard(*arguments: int) -> FeatureShard:
    return random_shard(*arguments)


def random_features(rows: int, width: int, classes: int, settings: UnlearnConfig) -> FeatureSet:
    size = 256 * settings.influence.blocks_per_shard
    counts = [min(size, rows - start) for start in range(0, rows, size)]
    refs, running = [], []
    for index, count in enumerate(counts):
        refs.append(_random_shard.remote(index, count, width, classes))
        running.append(refs[-1])
        if len(running) >= 8:
            _, running = ray.wait(running, num_returns=1, fetch_local=False)
    ray.wait(running, num_returns=len(running), fetch_local=False)
    reports = [
        ShardReport(index, count, (count,), b"", (), 0.0, count * width * 4, np.zeros(count, np.uint64))
        for index, count in enumerate(counts)
    ]
    return FeatureSet(TaskRunner(settings), refs, reports)


def random_head(width: int, classes: int) -> Head:
    task = ClassificationTask(ForgetSetConfig(), "fc", classes)
    return Head("fc", torch.from_numpy(np.random.default_rng(0).normal(size=(classes, width + 1))) * 0.1, True, task)


def private_mb(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def worker_processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and _is_worker(path)]


def _is_worker(path: Path) -> bool:
    try:
        return (path / "cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


def load_late_imports() -> None:
    """What is imported at the first call only: the rest of torch by a multiplication, pandas by an array of Arrow's."""
    torch.ones(64, 64, dtype=torch.float64) @ torch.ones(64, 64, dtype=torch.float64)
    pa.array([""], pa.string())


@ray.remote
def _imported() -> int:
    """Imports what scoring imports."""
    from imu_ray.distributed import score_job

    assert score_job.score is not None
    load_late_imports()
    time.sleep(5.0)  # so that the other worker takes the other task
    return os.getpid()


class Peak:
    """Highest private memory of the driver and of any worker, sampled ten times a second, and above ``imported``, that after imports."""

    def __init__(self, imported: dict[int, float]) -> None:
        self.imported = imported

    def __enter__(self) -> "Peak":
        self.highest = {process: private_mb(process) for process in [os.getpid(), *worker_processes()]}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._ended.wait(0.1):
            for process in self.highest:
                self.highest[process] = max(self.highest[process], private_mb(process))

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        # A worker that began later has no baseline of its own; that of the others stands in.
        usual = max(self.imported.values())
        rises = {process: highest - self.imported.get(process, usual) for process, highest in self.highest.items()}
        self.driver = {"private_mb": self.highest.pop(os.getpid()), "above_imports_mb": rises.pop(os.getpid())}
        self.worker = {
            "private_mb": max(self.highest.values(), default=0.0),
            "above_imports_mb": max(rises.values(), default=0.0),
        }


def measure_samples(repeat: int) -> list[dict[str, Any]]:
    # The first size warms up.
    return (
        measure_sizes([SIZES[0], *SIZES], 6 * 10**9, repeat)[1:]
        + measure_sizes([SIZES[0], *SPILLED], 4 * 10**8, repeat)[1:]
    )


def measure_sizes(sizes: list[tuple[int, int, int, int]], store: int, repeat: int) -> list[dict[str, Any]]:
    found = []
    with cluster(2, store):
        load_late_imports()
        processes = {os.getpid(), *ray.get([_imported.remote() for _ in range(2)])}
        imported = {process: private_mb(process) for process in processes}
        for rows, width, classes, blocks in sizes:
            settings = config(2, blocks)
            features, head = random_features(rows, width, classes, settings), random_head(width, classes)
            seconds = []
            with Peak(imported) as peak:
                for _ in range(repeat if rows < 10**6 else 1):
                    begun = time.perf_counter()
                    scores = score_job.score(features, head, settings)
                    seconds.append(time.perf_counter() - begun)
                    weights = SCHEMES["imu"](scores.influence, scores.losses, settings.intensity, 0)
                    written = sum(len(part) for part in score_job.intensity_table(features, scores, weights))
                    assert written == rows
                    del scores, weights
            entry = {
                "samples": rows, "features": width, "classes": classes, "shards": len(features.refs), "seconds": statistics.median(seconds),
                "driver": peak.driver, "largest_worker": peak.worker, "feature_mb": rows * width * 4 / 2**20, "object_store_mb": store / 2**20,
                "rounds": seconds,
            }  # fmt: skip
            print(json.dumps(entry), flush=True)
            found.append(entry)
            del features
    return found


def measure_growth(repeat: int) -> dict[str, Any]:
    """The sizes in turn within each round, so that a noisy minute meets them all."""
    settings = config(2)
    with cluster(2, 6 * 10**9):
        sets = {rows: random_features(rows, 512, 10, settings) for rows in GROWTH}
        head, rounds = random_head(512, 10), []
        for turn in range(repeat + 1):  # the first warms up
            seconds = {}
            for rows, features in sets.items():
                begun = time.perf_counter()
                score_job.score(features, head, settings)
                seconds[rows] = time.perf_counter() - begun
            print(json.dumps(seconds), flush=True)
            if turn:
                rounds.append(seconds)
    steps = itertools.pairwise(GROWTH)
    ratios = {f"{less} to {more}": [seconds[more] / seconds[less] for seconds in rounds] for less, more in steps}
    return {
        "seconds": {rows: statistics.median(seconds[rows] for seconds in rounds) for rows in GROWTH},
        "ratios": {step: statistics.median(found) for step, found in ratios.items()}, "rounds": rounds,
    }  # fmt: skip


def plain_loop(images: int, results: "multiprocessing.Queue[float] | None" = None, barrier: Any = None) -> float:
    """Seconds of a plain forward pass in batches of 256, one thread."""
    torch.set_num_threads(1)
    model = torchvision.models.resnet18(weights=None, num_classes=10).eval()
    data = torch.randn(images, 3, 32, 32)
    with torch.inference_mode():
        model(data[:256])
        if barrier is not None:
            barrier.wait()
        begun = time.perf_counter()
        for batch in data.split(256):
            model(batch)
        seconds = time.perf_counter() - begun
    if results is not None:
        results.put(seconds)
    return seconds


def two_loops(images: int) -> float:
    """The slower of two processes, each with half of the images."""
    context = multiprocessing.get_context("spawn")
    results, barrier = context.Queue(), context.Barrier(2)
    group = [context.Process(target=plain_loop, args=(images // 2, results, barrier)) for _ in range(2)]
    for process in group:
        process.start()
    seconds = [results.get() for _ in group]
    for process in group:
        process.join()
    return max(seconds)


class Repeated(Images):
    """Many rows of few images, so that no time goes into moving a large dataset to the workers."""

    def __init__(self, rows: int) -> None:
        super().__init__(torch.randn(256, 3, 32, 32), torch.randint(10, (rows,)))

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.inputs[row % len(self.inputs)], int(self.labels[row])


def measure_workers(repeat: int, images: int = 16_384) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None, num_classes=10).eval()
    samples = Repeated(images)
    rounds: list[dict[str, float]] = []
    with cluster(2):
        for turn in range(repeat + 1):  # the first warms up
            seconds = {}
            for workers in (1, 2):
                settings = config(workers)
                inputs = Inputs.open(model, samples, "classification", None, settings)
                begun = time.perf_counter()
                inputs = inputs.extract(settings)
                score_job.score(inputs.features["forget"], inputs.part, settings)
                seconds[f"workers_{workers}"] = time.perf_counter() - begun
            seconds |= {"loop": plain_loop(images), "two_loops": two_loops(images)}
            print(json.dumps(seconds), flush=True)
            if turn:
                rounds.append(seconds)
    for seconds in rounds:
        seconds["speed_up"] = seconds["workers_1"] / seconds["workers_2"]
        seconds["speed_up_of_loops"] = seconds["loop"] / seconds["two_loops"]
        seconds["share"] = seconds["speed_up"] / seconds["speed_up_of_loops"]
        seconds["over_the_forward_pass"] = seconds["workers_1"] / seconds["loop"]
    return {
        "images": images,
        **{key: statistics.median(seconds[key] for seconds in rounds) for key in rounds[0]},
        "rounds": rounds,
    }


def stand_in(shard: FeatureShard, seconds: float) -> int:
    """What a task would do, without doing it."""
    if seconds:
        time.sleep(seconds)
    return len(shard.labels_n)


def measure_tasks(shards: int, seconds: float = 0.5, each: int = 20) -> dict[str, Any]:
    found: dict[str, Any] = {"task_seconds": seconds, "workers": []}
    with cluster(32):
        kept = ray.put(random_shard(0, 1, 4, 2))
        report = ShardReport(0, 1, (1,), b"", (), 0.0, 16, np.zeros(1, np.uint64))

        def stage(count: int, workers: int, length: float) -> float:
            features = FeatureSet(TaskRunner(config(workers)), [kept] * count, [report] * count)
            begun = time.perf_counter()
            features.map("stand-ins", functools.partial(stand_in, seconds=length))
            return time.perf_counter() - begun

        stage(64, 32, seconds)  # starts and warms all processes
        for workers in (4, 8, 16, 32):
            took = statistics.median(stage(each * workers, workers, seconds) for _ in range(3))
            entry = {
                "workers": workers,
                "shards": each * workers,
                "seconds": took,
                "orchestration": took / (each * seconds) - 1,
            }
            print(json.dumps(entry), flush=True)
            found["workers"].append(entry)
        took = stage(shards, 32, 0.0)
        found["empty"] = {"shards": shards, "workers": 32, "seconds": took, "tasks_per_s": shards / took}
    return found


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["samples", "growth", "workers", "tasks"]
    parser.add_argument("--only", choices=parts, nargs="+", default=parts)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    date = datetime.date.today().isoformat()
    path = Path(__file__).parent / "results" / f"scaling-{date}.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    measures: dict[str, Callable[[], Any]] = {
        "samples": lambda: measure_samples(options.repeat),
        "growth": lambda: measure_growth(options.repeat),
        "workers": lambda: measure_workers(options.repeat),
        "tasks": lambda: measure_tasks(options.shards),
    }
    for part in options.only:
        load = os.getloadavg()[0]
        record[part] = measures[part]()
        record |= {
            "date": date,
            "processor": processor(),
            "cpus": os.cpu_count(),
            "torch": torch.__version__,
            "ray": ray.__version__,
        }
        record.setdefault("load_before", {})[part] = load
        path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
