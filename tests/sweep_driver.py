"""A sweep on handwritten digits in a process of its own, on a Ray with two CPUs; run by test_sweep.py.

sweep_driver.py FOLDER AXES SETTINGS OVERRIDES [kill-after-trials]
"""

import json
import os
import signal
import sys
from pathlib import Path

import ray

import imu_ray
from imu_ray import ModelSpec, SweepConfig, UnlearnConfig
from imu_ray.demo import SETTINGS, digits, train_and_save, write_digits
from imu_ray.experiments import sweep as sweep_run


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
    kill_after = int(sys.argv[5]) if len(sys.argv) > 5 else None
    paths = {path.stem: str(path) for path in folder.glob("*.parquet")} or samples(folder)
    spec = ModelSpec("faults:counting_digits", {"log": str(folder / "forward")}, checkpoint=str(folder / "model.safetensors"))

    write, written = sweep_run._Rows._write, []

    def write_and_die(self, *arguments):
        write(self, *arguments)
        written.append(1)
        if len(written) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    sweep_run._Rows._write = write_and_die
    with ray.init(address="local", num_cpus=2, logging_level="warning", log_to_driver=False):
        result = imu_ray.sweep(
            spec, paths.pop("forget"), axes, evaluation=paths, settings=SweepConfig(**settings), sweep_dir=folder / "sweep",
            config=UnlearnConfig().with_overrides({**SETTINGS, "resources.workers": 1, **overrides}), resume=True,
        )  # fmt: skip
    print(json.dumps({"best": result.best, "rows": result.table.to_pylist()}))
