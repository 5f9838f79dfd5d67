"""A sweep on handwritten digits in a process of its own, on a Ray with two CPUs; run by test_sweep.py.

sweep_driver.py FOLDER AXES SETTINGS OVERRIDES [SIGNAL TRIALS]: a signal to this process once so many trials have ended
"""

import json
import os
import sys
from pathlib import Path

import ray

import imu_ray
from imu_ray import ModelSpec, SweepConfig, UnlearnConfig
from imu_ray.demo import digits, train_and_save, write_digits
from imu_ray.experiments.trials import Rows

CONFIG = UnlearnConfig.from_recipe("paper").with_overrides(
    {
        "forget_set.image_mode": "L", "influence.block_rows": 64, "influence.blocks_per_shard": 1,
        "ascent.batch_size": 32, "ascent.learning_rate": 0.03,
        "ascent.stop.max_epochs": 30, "ascent.stop.every_steps": 1,
    }
)  # fmt: skip


def samples(folder):
    """Forget, retain and test parts of the digits, and a trained model that counts its forward calls."""
    _, labels, train, test = digits()
    three = labels[train] == 3
    parts = {"forget": train[~three][:600], "retain": train[~three][600:], "test": test}
    paths = {name: str(write_digits(folder / f"{name}.parquet", rows)) for name, rows in parts.items()}
    train_and_save(folder / "model.safetensors", train)
    return paths


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    axes, settings, overrides = (json.loads(text) for text in sys.argv[2:5])
    number, after = (int(text) for text in sys.argv[5:] or (0, 0))
    paths = {path.stem: str(path) for path in folder.glob("*.parquet")} or samples(folder)
    spec = ModelSpec(
        "faults:counting_digits", {"log": str(folder / "forward")}, checkpoint=str(folder / "model.safetensors")
    )

    write = Rows._write

    def write_and_signal(self, *arguments):
        write(self, *arguments)
        if self.written == after:
            os.kill(os.getpid(), number)

    Rows._write = write_and_signal
    with ray.init(address="local", num_cpus=2, logging_level="warning", log_to_driver=False):
        result = imu_ray.sweep(
            spec, paths.pop("forget"), axes, evaluation=paths, settings=SweepConfig(**settings),
            sweep_dir=folder / "sweep", config=CONFIG.with_overrides(overrides), resume=True,
        )  # fmt: skip
    print(json.dumps({"best": result.best, "rows": result.table.to_pylist()}))
