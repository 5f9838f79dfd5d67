"""An ensemble on a part of CIFAR-10: writes its rows as Parquet and its job file, and holds its net and its training.

    python tests/benchmarks/ensemble_cifar.py --data DIR --out DIR
    PYTHONPATH=. imu-ray ensemble --config DIR/ensemble.yaml          # from the repository's root

2,000 training rows, 100 of them to forget, 1,000 unseen ones, drawn once. The net learns its rows by heart (no
augmentation), so that there is something to forget; recipe ``views`` is left out, because such a net has not learnt
the pictures' views.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch import Tensor, nn

FORGET, RETAIN, TEST = 100, 1900, 1000
METHODS = {
    "samples": {"recipe": "samples"},
    "samples, last:3": {"recipe": "samples", "ascent.scope": "last:3"},
    "paper (IMU weights)": {"recipe": "paper"},
    "uniform weights": {"recipe": "paper", "intensity.scheme": "uniform"},
    "NPO": {"call": "tests.benchmarks.ensemble_methods:baseline", "name": "NPO", "setting": 0},
    "SSD": {
        "call": "tests.benchmarks.ensemble_methods:baseline",
        "name": "SSD",
        "setting": 0,
        "needs": "forget and retain",
    },
    "fine-tune on retain": {
        "call": "tests.benchmarks.ensemble_methods:fine_tune",
        "lr": 0.001,
        "epochs": 3,
        "needs": "retain",
    },
}


def small_cnn() -> nn.Module:
    """Three convolutions with BatchNorm and a linear head ``64 -> 10``, for 32x32 colours."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    body = [*block(3, 16), *block(16, 32), *block(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(64, 10))


def fit(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> None:
    """25 epochs of AdamW in batches of 64, with a one-cycle schedule."""
    epochs, batch = 25, 64
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images))[: len(images) // batch * batch].split(batch):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimiser.step()
            schedule.step()


def rows_of(data: Path, split: str, count: int) -> pa.Table:
    """``count`` rows of a split, drawn once: ``id``, ``image`` and ``label``."""
    table = pa.concat_tables(
        pq.read_table(path, columns=["image", "label"]) for path in sorted(data.glob(f"{split}-*.parquet"))
    )
    chosen = np.sort(np.random.default_rng(0).permutation(len(table))[:count])
    ids = pa.array([f"{split}-{row:05d}" for row in chosen])
    return table.take(chosen).add_column(0, "id", ids)


def main() -> None:
    """Write the rows and the job file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of train-*.parquet and test-*.parquet")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    train = rows_of(options.data, "train", FORGET + RETAIN)
    forgotten = np.zeros(len(train), bool)
    forgotten[np.random.default_rng(1).permutation(len(train))[:FORGET]] = True
    sets = {
        "forget": train.filter(forgotten),
        "retain": train.filter(~forgotten),
        "test": rows_of(options.data, "test", TEST),
    }
    for name, table in sets.items():
        pq.write_table(table, options.out / f"{name}.parquet")
    place = options.out.absolute()
    job = {
        "model": {"factory": "tests.benchmarks.ensemble_cifar:small_cnn"},
        "forget_set": {"path": str(place / "forget.parquet")},
        "evaluation": {name: str(place / f"{name}.parquet") for name in ("retain", "test")},
        "run_dir": str(place / "ensemble"),
        "ensemble": {"train_fn": "tests.benchmarks.ensemble_cifar:fit", "models": 32, "methods": METHODS},
    }
    (options.out / "ensemble.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    print(options.out / "ensemble.yaml")


if __name__ == "__main__":
    sys.exit(main())
