"""Whether features may be kept in half precision: scores of a trained CIFAR-10 model from float32, bfloat16 and float16 features.

    python tests/benchmarks/bench_precision.py --data DIR --model original.safetensors

Spearman correlation of the influence with that from float32 features, the largest difference over the largest score, and how many
samples are kept by one and not by the other. Writes ``results/precision-DATE.json``.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import imu_ray
from imu_ray.run.record import processor
from tests.benchmarks.bench_cifar import DATA, FACTORY, split_sets

KINDS = ("float32", "bfloat16", "float16")


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--without", nargs="+", default=["class:0", "random:0.10"])
    parser.add_argument("--curvatures", nargs="+", default=["diagonal_fisher", "kfac"])
    options = parser.parse_args()
    spec = imu_ray.ModelSpec(FACTORY, checkpoint=str(options.model.resolve()))
    found = []
    with ray.init(num_cpus=2, logging_level="warning", runtime_env={"env_vars": {"PYTHONPATH": str(Path.cwd())}}):
        for without in options.without:
            forget = split_sets(options.data, Path(tempfile.mkdtemp()), without)["forget"]
            for curvature in options.curvatures:
                settings = imu_ray.UnlearnConfig().with_overrides(
                    {**DATA, "resources.workers": 2, "influence.curvature": curvature}
                )
                scores = {
                    kind: imu_ray.score(
                        spec, forget, config=settings.with_overrides({"influence.feature_dtype": kind})
                    )["influence"].to_numpy()
                    for kind in KINDS
                }
                exact = scores["float32"]
                for kind in KINDS[1:]:
                    entry = {
                        "forget_set": without, "curvature": curvature, "rows": len(exact), "kept_in": kind,
                        "spearman": float(spearmanr(exact, scores[kind]).statistic),
                        "largest_difference": float(np.abs(scores[kind] - exact).max() / np.abs(exact).max()),
                        "kept_otherwise": int(((scores[kind] < 0) != (exact < 0)).sum()),
                    }  # fmt: skip
                    print(json.dumps(entry), flush=True)
                    found.append(entry)
    record = {"date": time.strftime("%Y-%m-%d"), "processor": processor(), "scores": found}
    (Path(__file__).parent / "results" / f"precision-{record['date']}.json").write_text(
        json.dumps(record, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
