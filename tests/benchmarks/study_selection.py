"""Which choice of the best trial, made without retain data, agrees with the retain accuracy?

    python tests/benchmarks/study_selection.py [--seeds 3]

Sweeps on handwritten digits (objective x preconditioner x learning rate), for a forgotten class and for 10 % random samples, each on
``--seeds`` models. Among the trials that reached their target: Spearman correlation of each retain-free figure with the accuracy on
retained samples (1: it would order the trials as retain data does), and the retain accuracy lost by choosing with it. Writes JSON to
``results/``.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import imu_ray
from imu_ray.demo import FORGOTTEN_CLASS, SETTINGS, digits, train_digits, write_digits

AXES = {
    "ascent.objective": ["ascent", "bounded_ascent", "row_mask", "renormalise"],
    "ascent.preconditioner": ["none", "block_ggn"],
    "ascent.learning_rate": [0.01, 0.1],
}
FIGURES = ("output_change", "parameter_drift")


def sweep(folder: Path, what: str, seed: int) -> list[dict]:
    pixels, labels, train, test = digits()
    model = train_digits(torch.from_numpy(pixels[train]).unsqueeze(1) / 255, torch.from_numpy(labels[train]), seed=seed)
    folder.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    drawn = np.random.default_rng(seed).random(len(train)) < 0.1
    mask = labels[train] == FORGOTTEN_CLASS if what == "class" else drawn
    paths = {name: str(write_digits(folder / f"{name}.parquet", rows)) for name, rows in
             (("forget", train[mask]), ("retain", train[~mask]), ("test", test))}  # fmt: skip
    spec = imu_ray.ModelSpec("imu_ray.demo:digits_cnn", checkpoint=str(folder / "model.safetensors"))
    changes = {**SETTINGS, "resources.workers": 1, "ascent.stop.max_epochs": 60, "audit.report": False}
    config = imu_ray.UnlearnConfig().with_overrides(changes | {"ascent.stop.forget_accuracy": 0.01 if what == "class" else 0.9})
    forget = paths.pop("forget")
    return imu_ray.sweep(spec, forget, AXES, evaluation=paths, config=config, sweep_dir=folder / "sweep").table.to_pylist()


def judge(rows: list[dict]) -> dict:
    """How each figure orders the trials that reached their target."""
    reached = [row for row in rows if row["status"] == "reached"]
    retain = [row["retain_accuracy"] for row in reached]
    record = {"reached": len(reached), "retain_best": max(retain), "retain_worst": min(retain)}
    for figure in FIGURES:
        values = [row[figure] for row in reached]
        differ = len(set(retain)) > 1  # with equal retain accuracies there is nothing to agree with
        record[figure] = {
            "spearman": float(spearmanr([-value for value in values], retain).statistic) if differ else None,
            "retain_lost": max(retain) - retain[int(np.argmin(values))],
        }
    return record


def main() -> None:
    """Sweep, judge and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    result: dict = {"date": time.strftime("%Y-%m-%d"), "platform": platform.platform(), "torch": torch.__version__, "axes": AXES}
    with tempfile.TemporaryDirectory() as folder, ray.init(address="local", num_cpus=2, logging_level="warning", log_to_driver=False):
        for what in ("class", "random"):
            judged = [judge(sweep(Path(folder) / f"{what}{seed}", what, seed)) for seed in range(options.seeds)]
            result[what] = {
                "runs": judged,
                **{
                    figure: {
                        key: statistics.median(run[figure][key] for run in judged if run[figure][key] is not None)
                        for key in ("spearman", "retain_lost")
                    }
                    for figure in FIGURES
                },
            }
    path = Path(__file__).parent / "results" / f"selection-{result['date']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
