"""The whole job on CIFAR-10 Parquet, and scoring beside a plain forward pass of the same model in the same run.

    python tests/benchmarks/bench_cifar.py --data DIR --model original.safetensors --retrained retrain-class0.safetensors

Writes ``results/cifar10-job-DATE.json`` and prints a table. A first run warms the caches of files and workers; the figures are
medians of ``--repeat`` runs after it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import imu_ray
from imu_ray.data import open_source
from imu_ray.tasks.classification import ClassificationTask
from tests.benchmarks.train_cifar import MEAN, STD, forget_rows

FACTORY = "tests.benchmarks.nets:small_resnet"
DATA = {"forget_set.mean": list(MEAN), "forget_set.std": list(STD)}


def split_sets(data: Path, out: Path, without: str) -> dict[str, str]:
    """Write forget and retain rows as Parquet; paths of forget, retain and test."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted(data.glob("train-*.parquet"))])
    mask = forget_rows(torch.tensor(table["label"].to_pylist()), without).numpy()
    for name, rows in (("forget", mask), ("retain", ~mask)):
        pq.write_table(table.filter(pa.array(rows)), out / f"{name}.parquet", row_group_size=1024)
    return {
        "forget": str(out / "forget.parquet"),
        "retain": str(out / "retain.parquet"),
        "test": str(next(data.glob("test-*.parquet"))),
    }


def plain_forward(model: torch.nn.Module, path: str) -> float:
    """Samples/s of the model alone, eval mode, blocks of 256 that are decoded already, one thread."""
    config = imu_ray.UnlearnConfig().with_overrides(DATA).forget_set
    source = open_source(path, config)
    task = ClassificationTask(config, "fc", 10)
    blocks = [
        task.collate(source.read(i, min(i + 256, source.num_rows))).inputs for i in range(0, source.num_rows, 256)
    ]
    torch.set_num_threads(1)
    with torch.inference_mode():
        model(blocks[0])
        started = time.perf_counter()
        for block in blocks:
            model(block)
        return source.num_rows / (time.perf_counter() - started)


def main() -> None:
    """Run the job, measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--retrained", type=Path, required=True)
    parser.add_argument("--without", default="class:0")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    spec = imu_ray.ModelSpec(FACTORY, checkpoint=str(options.model.resolve()))
    work = Path(tempfile.mkdtemp())
    paths = split_sets(options.data, work, options.without)
    evaluation = {"retain": paths["retain"], "test": paths["test"]}
    recipe = "classes" if options.without.startswith("class") else "samples"
    settings = imu_ray.UnlearnConfig.from_recipe(recipe).with_overrides({**DATA, "resources.workers": options.workers})
    with ray.init(num_cpus=2, logging_level="warning", runtime_env={"env_vars": {"PYTHONPATH": str(Path.cwd())}}):
        result = imu_ray.unlearn(spec, paths["forget"], evaluation=evaluation, config=settings, run_dir=work / "run")
        retrained = imu_ray.ModelSpec(FACTORY, checkpoint=str(options.retrained.resolve()))
        reference = imu_ray.audit(retrained, paths["forget"], evaluation=evaluation, config=settings)["after"]
        rates = []
        model = spec.build()
        for number in range(options.repeat + 1):
            run = work / f"score{number}"
            plain = plain_forward(model, paths["forget"])
            started = time.perf_counter()
            imu_ray.score(spec, paths["forget"], config=settings, run_dir=run)
            whole = time.perf_counter() - started
            manifest = json.loads((run / "manifest.json").read_text())
            rows, forward = manifest["forget_set"]["rows_used"], manifest["forget_set"]["forward_seconds"]
            rates.append(
                {"plain_forward": plain, "forward_in_job": rows / forward, "features_stage": rows / manifest["seconds"]["features"],
                 "scores_stage_seconds": manifest["seconds"]["scores"], "whole_call": rows / whole}
            )  # fmt: skip
    medians = {key: round(statistics.median(rate[key] for rate in rates[1:]), 3) for key in rates[0]}
    sides = {**result.metrics, "retrained": reference}
    record = {
        "date": time.strftime("%Y-%m-%d"), "hardware": result.manifest["hardware"], "versions": result.manifest["versions"],
        "command": " ".join(sys.argv[:1] + [f"--without {options.without} --workers {options.workers}"]),
        "seconds": result.manifest["seconds"], "ascent": result.manifest["ascent"],
        "accuracy": {side: {name: figures[name]["accuracy"] for name in paths} for side, figures in sides.items()},
        "membership": {side: figures["membership"] for side, figures in sides.items()},
        "samples_per_second": medians,
        "scoring_over_plain_forward": round(medians["features_stage"] / medians["plain_forward"], 3),
    }  # fmt: skip
    name = f"cifar10-job-{options.without.replace(':', '')}-{record['date']}.json"
    (Path(__file__).parent / "results" / name).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
