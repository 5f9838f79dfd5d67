"""An ensemble in a process of its own, which is killed when the model of seed 1 is trained for the first time."""

import functools
import os
import signal
import sys
from pathlib import Path

from faults import once

from imu_ray import EnsembleConfig, ModelSpec, UnlearnConfig, ensemble
from imu_ray.demo import fit_digits


def train(model, inputs, labels, seed, folder=None, driver=None):
    if seed == 1 and once(folder, "killed"):
        os.kill(driver, signal.SIGKILL)
    fit_digits(model, inputs, labels, seed, epochs=1)


if __name__ == "__main__":
    out, sets = Path(sys.argv[1]), Path(sys.argv[2])
    settings = {"forget_set.image_mode": "L", "influence.block_rows": 64, "resources.workers": 1}
    ensemble(
        ModelSpec("imu_ray.demo:digits_cnn"),
        str(sets / "forget.parquet"),
        train_fn=functools.partial(train, folder=str(out), driver=os.getpid()),
        evaluation={name: str(sets / f"{name}.parquet") for name in ("retain", "test")},
        config=UnlearnConfig().with_overrides(settings),
        settings=EnsembleConfig(models=2, retain_points=20),
        run_dir=out / "run",
    )
