"""The orchestration on a cluster of several nodes (logical CPUs of one machine), of which some are lost and added while it works.

    python tests/benchmarks/bench_cluster.py [--shards 2000] [--counts 100 1000 10000] [--repeat 3] [--nodes 3]

What is timed or measured:

- ``tasks``: wall-clock of ``Inputs.extract`` and of ``score_job.score`` over ``--shards`` shards of one row and 12 features, whose
  work is next to nothing, after a warm-up; the median of ``--repeat``. Tasks are one per shard and round (features, moments, scores) and
  the merges. ``driver_cpu_ms_per_task`` is the driver's own processor time, all threads, over the same span: what one driver cannot
  go below. On a machine whose cores the workers share, tasks per second are those of driver, Ray and workers together.
- ``nodes``: wall-clock of extract and score of 160 shards of 16 x 2048 features (131 kB each, so that they lie in the object store of
  the node that made them): undisturbed; with the node killed that works on the middle shard in the scoring round; and with a node that is
  started when the middle of the features is read. Seconds lost are differences from the undisturbed run of the same repeat; medians.
  Ray's own settings decide when a dead node is noticed; here they are its defaults. All tables of scores are compared bit by bit.
- ``moved``: bytes, as Ray serialises them, of what a shard's tasks send to the driver (report, ids, score table, predictions) for 1 row
  and for 1024, and of the statistics of one part, for several heads.
- ``memory``: resident memory of a driver of its own after extract and score, for each of ``--counts`` shards of one row, in ascending
  order in one process; with ``--without-task-events``, without Ray's export of them. ``samples``: the same for 100 shards of 1024 rows.

Writes ``results/cluster-DATE.json`` and prints a table.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
# ruff: noqa: E402 - this tree comes first

import numpy as np
import pyarrow as pa
import ray
import torch
from architectures import named
from nodes_driver import CountedPairs, Losing, OneRowShards, Wide, memory
from ray.cluster_utils import Cluster
from samples import Pairs, tensors

from imu_ray.audits.base import predict_shard
from imu_ray.config import ForgetSetConfig, UnlearnConfig
from imu_ray.distributed import feature_job, score_job
from imu_ray.influence.curvature.base import Moments
from imu_ray.inputs import Inputs
from imu_ray.run.record import processor
from imu_ray.scopes.extraction import extract_features
from imu_ray.scopes.features import FeatureShard
from imu_ray.scopes.head import Head, score_shard, shard_statistics
from imu_ray.tasks.classification import ClassificationTask

HEADS = [(10, 513), (1000, 2049)]
DISTURBED_SHARDS = 160  # of 16 rows each
MIDDLE = DISTURBED_SHARDS // 2 * 16


# For Ray's processes, which import this tree; and a cluster that is private and quiet.
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
}  # fmt: skip


class WaitingPairs(CountedPairs):
    """Asks for a node when the middle row is read for the first time; nobody waits for it."""

    def __getitem__(self, row):
        if row == MIDDLE:
            (Path(self.folder) / "wanted").touch()
        return super().__getitem__(row)


def config(workers: int, rows: int = 1, blocks: int = 1) -> UnlearnConfig:
    return UnlearnConfig().with_overrides(
        {"influence.block_rows": rows, "influence.blocks_per_shard": blocks, "resources.workers": workers}
    )


def start(nodes: int, cpus: int = 1) -> tuple[Cluster, list[Any]]:
    """A head node without CPUs to offer, and some others."""
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(dir="/tmp")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    added = [cluster.add_node(num_cpus=cpus) for _ in range(nodes)]
    ray.init(address=cluster.address, log_to_driver=False)
    return cluster, added


def stop(cluster: Cluster) -> None:
    ray.shutdown()
    cluster.shutdown()


def work(model: torch.nn.Module, samples: Any, settings: UnlearnConfig) -> tuple[float, float, Any]:
    """Seconds of the features and of the scores, and the table."""
    inputs = Inputs.open(model, samples, "classification", None, settings)
    begun = time.perf_counter()
    inputs = inputs.extract(settings)
    made = time.perf_counter()
    scores = score_job.score(inputs.features["forget"], inputs.part, settings)
    seconds = time.perf_counter() - made
    table = score_job.intensity_table(inputs.features["forget"], scores, scores.influence)
    return made - begun, seconds, pa.concat_tables(table)


def merges(shards: int) -> int:
    """Merge tasks of one reduce."""
    total = 0
    while shards > 1:
        shards = -(-shards // feature_job.REDUCE_FAN_IN)
        total += shards
    return total


def measure_tasks(shards: int, repeat: int, nodes: int) -> dict[str, Any]:
    cluster, _ = start(nodes)
    settings = config(nodes)
    work(named(), OneRowShards(20 * nodes), settings)
    seen = []
    for _ in range(repeat):
        cpu = time.process_time()
        features, scores, _ = work(named(), OneRowShards(shards), settings)
        cpu = time.process_time() - cpu
        count = 3 * shards + merges(shards)
        seen.append(
            {"features_per_s": shards / features, "scoring_per_s": (count - shards) / scores, "tasks_per_s": count / (features + scores),
             "driver_cpu_ms_per_task": 1e3 * cpu / count}
        )  # fmt: skip
    stop(cluster)
    return {
        "shards": shards,
        "workers": nodes,
        **{key: statistics.median(run[key] for run in seen) for key in seen[0]},
        "runs": seen,
    }


def measure_nodes(repeat: int, nodes: int) -> dict[str, Any]:
    cluster, _ = start(nodes)
    data, settings = tensors(DISTURBED_SHARDS * 16), config(nodes, rows=16)
    settings = settings.with_overrides({"resources.autoscaling": True})
    plain = score_job.score_shard
    run = functools.partial(work, Wide(2048), settings=settings)
    *_, reference = run(Pairs(*data))
    runs = []
    for _ in range(repeat):
        seconds = {}
        *seconds["undisturbed"], table = run(Pairs(*data))
        same = table.equals(reference)
        with tempfile.TemporaryDirectory() as folder:
            counted = CountedPairs(*data, folder)
            score_job.score_shard = Losing(plain, folder)
            *seconds["lost"], table = run(counted)
            score_job.score_shard = plain
            again = (Path(folder) / "reads").stat().st_size - len(data[1]) - 1
            same &= table.equals(reference) and (Path(folder) / "lost").exists()
        cluster.add_node(num_cpus=1)  # in place of the lost one; warmed by the next run
        run(Pairs(*data))
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
            future = pool.submit(
                run, WaitingPairs(*data, folder), settings=settings.with_overrides({"resources.workers": nodes + 1})
            )
            while not (Path(folder) / "wanted").exists() and not future.done():
                time.sleep(0.01)
            late = cluster.add_node(num_cpus=1)  # by the main thread, because Ray wants it so
            *seconds["added"], table = future.result()
            same &= table.equals(reference)
        cluster.remove_node(late)
        runs.append(
            {**{key: sum(value) for key, value in seconds.items()}, "same_bits": same, "rows_read_again_after_the_loss": again,
             "seconds_lost_when_one_is_lost": sum(seconds["lost"]) - sum(seconds["undisturbed"]),
             "seconds_lost_when_one_is_added": sum(seconds["added"]) - sum(seconds["undisturbed"])}
        )  # fmt: skip
    stop(cluster)
    return {
        "nodes": nodes,
        "shards": DISTURBED_SHARDS,
        **{key: statistics.median(r[key] for r in runs) for key in runs[0]},
        "runs": runs,
    }


def measure_moved() -> dict[str, Any]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=tempfile.mkdtemp(dir="/tmp"))
    context = ray._private.worker.global_worker.get_serialization_context()

    def size(value: Any) -> int:
        return int(context.serialize(value).total_bytes)

    settings = config(1, 256, 4)
    inputs = Inputs.open(named(), OneRowShards(1024), "classification", None, settings)
    moved: dict[str, Any] = {"shard": {}, "statistics": []}
    for rows in (1, 1024):
        (shard, *_) = OneRowShards(rows).shards(256, 4)
        features, report = extract_features(
            inputs.sources["forget"], shard, inputs.part, inputs.model, torch.device("cpu")
        )
        table = score_shard(features, inputs.part, *inputs.part.parameters.values())
        parts = {
            "report": report,
            "ids": features.ids,
            "scores": table,
            "predictions": predict_shard(features, inputs.part),
        }
        moved["shard"][rows] = {name: size(part) for name, part in parts.items()}
    one, many = moved["shard"][1], moved["shard"][1024]
    moved["bytes_per_sample"] = {name: (many[name] - one[name]) / 1023 for name in one}
    for classes, width in HEADS:
        head = Head(
            "fc",
            torch.zeros(classes, width, dtype=torch.float64),
            True,
            ClassificationTask(ForgetSetConfig(), "fc", classes),
        )
        shard = FeatureShard(
            np.ones((4, width - 1), np.float32), np.zeros(4, np.int64), pa.array(list("abcd")), (4,), np.arange(4)
        )
        part = size(shard_statistics(shard, head, functools.partial(Moments.of, clip=None)))
        moved["statistics"].append(
            {"classes": classes, "width": width, "bytes_per_part": part, "in_the_drivers_reply": part < 100 * 1024}
        )
    ray.shutdown()
    return moved


def drive_memory(counts: list[int]) -> None:
    """In a process of its own: a line of JSON per number of shards."""
    cluster, _ = start(2)
    settings = config(2)
    for shards in counts:
        work(named(), OneRowShards(shards), settings)
        print(json.dumps({"shards": shards, "rows": shards, **memory()}), flush=True)
    work(named(), OneRowShards(100 * 1024), config(2, 256, 4))
    print(json.dumps({"shards": 100, "rows": 100 * 1024, **memory()}), flush=True)
    stop(cluster)


def measure_memory(counts: list[int], events: bool) -> dict[str, Any]:
    """Resident MB, and the slope between the first and the last count."""
    environment = {**os.environ, **({} if events else {"RAY_task_events_report_interval_ms": "0"})}
    arguments = [sys.executable, __file__, "--drive-memory", "--counts", *map(str, counts)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    *lines, samples = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    kb = (lines[-1]["VmHWM"] - lines[0]["VmRSS"]) * 1024 / (lines[-1]["shards"] - lines[0]["shards"])
    return {"task_events": events, "resident_mb": lines, "samples": samples, "kb_per_shard": kb}


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=2000)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument(
        "--only",
        choices=["tasks", "nodes", "moved", "memory"],
        nargs="+",
        default=["tasks", "nodes", "moved", "memory"],
    )
    parser.add_argument(
        "--without-task-events", action="store_true", help="memory: without Ray's export of task events"
    )
    parser.add_argument("--drive-memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    if options.drive_memory:
        drive_memory(options.counts)
        return
    path = Path(__file__).parent / "results" / f"cluster-{time.strftime('%Y-%m-%d')}.json"
    # What an earlier call of the day measured stays: the parts take minutes each.
    record = json.loads(path.read_text()) if path.exists() else {}
    measures = {
        "tasks": lambda: measure_tasks(options.shards, options.repeat, options.nodes),
        "nodes": lambda: measure_nodes(options.repeat, options.nodes),
        "moved": measure_moved,
        "memory": lambda: (
            [entry for entry in record.get("memory", []) if entry["task_events"] == options.without_task_events]
            + [measure_memory(options.counts, not options.without_task_events)]
        ),
    }
    for part in options.only:
        before = os.getloadavg()[0]
        record[part] = measures[part]()
        record.setdefault("load_average", {})[part] = [before, os.getloadavg()[0]]
        record |= {
            "date": time.strftime("%Y-%m-%d"), "platform": platform.platform(), "processor": processor(), "cpus": os.cpu_count(),
            "ray": ray.__version__, "torch": torch.__version__,
        }  # fmt: skip
        path.write_text(json.dumps(record, indent=2) + "\n")
        show(part, record[part])


def show(part: str, found: Any) -> None:
    """The figures without the single runs."""
    for entry in found if isinstance(found, list) else [found]:
        for key, value in entry.items():
            if key != "runs":
                print(f"{part:8} {key:36} {value:.4g}" if isinstance(value, float) else f"{part:8} {key:36} {value}")


if __name__ == "__main__":
    main()
